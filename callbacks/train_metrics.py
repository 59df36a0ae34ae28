"""The `train/*` metrics, one row an optimizer step."""

import time
from typing import Any

import lightning.pytorch as pl
import torch


class TrainMetrics(pl.Callback):
    """Logs loss, learning rate, gradient norm, tokens per second and pack fill, every step.

    `train/loss` at step k is the token mean of the global batch that made step k, computed with
    the weights before it. `train/grad_norm` is the norm before clipping. `train/tokens_per_second`
    counts all tokens that went through the model on all ranks, fillers' apart, over the time since
    the last optimizer step less what measurements took. `train/skipped_steps` counts the steps that
    `on_nonfinite_loss: skip` passed over.
    """

    def __init__(self) -> None:
        self.step = -1
        self.latest: dict[str, float] = {}  # what was logged at `step`, the same on all ranks
        self._reset()

    def _reset(self) -> None:
        self.loss = 0.0
        self.num_tokens = 0
        self.capacity = 0
        self.seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting; on a resumed run, after the checkpoint's step."""
        self.step = trainer.global_step
        self._reset()

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Note the learning rate before the scheduler moves it."""
        self.started = time.perf_counter()
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Add a micro-batch; write the row when it completed an optimizer step."""
        self.seconds += time.perf_counter() - self.started
        # Lightning hands the loss over as it was divided for the accumulation
        self.loss += float(outputs["loss"])
        self.num_tokens += batch["input_ids"].numel() if batch["capacity"] else 0  # no filler's
        self.capacity += batch["capacity"]
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        sums = torch.tensor([self.loss, self.num_tokens, self.capacity], dtype=torch.float64)
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(
                sums.to(trainer.strategy.root_device), reduce_op="sum"
            ).cpu()
        loss, num_tokens, capacity = sums.tolist()
        metrics = {
            "train/loss": loss / trainer.world_size,
            "train/lr": self.lr,
            "train/tokens_per_second": num_tokens / self.seconds,
            "train/pack_fill": num_tokens / capacity,
        }
        grad_norm = getattr(pl_module, "grad_norm", None)
        if grad_norm is not None:
            metrics["train/grad_norm"] = grad_norm
        if getattr(pl_module, "on_nonfinite_loss", "stop") == "skip":
            metrics["train/skipped_steps"] = pl_module.num_skipped_steps
        self.latest = metrics
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self.step)
        pl_module.log("loss", loss / trainer.world_size, prog_bar=True, logger=False)
        self._reset()
