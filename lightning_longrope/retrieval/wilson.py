"""The interval of a success rate."""

import math


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson score): stays in [0, 1] and has a width at 0 and at 1.

    Args:
        successes: Number of successes.
        trials: Number of trials, at least 1.

    Returns:
        The lower and the upper end, in [0, 1].

    Raises:
        ValueError: If ``successes`` is not in [0, trials] or there is no trial.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"A rate needs 0 <= successes <= trials and a trial, got {successes} of {trials}.")
    z = 1.959963984540054  # 97.5 % point of the normal distribution
    rate, shrink = successes / trials, 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / shrink
    # At the ends the exact value is 0 or 1; rounding must not leave it out of its own interval.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)
