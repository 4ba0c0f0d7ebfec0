"""One number measured with several seeds: mean, spread and confidence interval."""

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from trompe.files import real

CONFIDENCE = 0.95


class OverSeeds(NamedTuple):
    """`seeds` values; their mean, sample standard deviation and 95 % confidence interval.

    std, low and high are nan for a single value, all of them if a value is nan.
    """

    seeds: int
    mean: float
    std: float
    low: float
    high: float

    def text(self, digits: int = 4, interval: bool = True) -> str:
        """ "mean ± std [low, high]", or the mean alone where there is no spread."""
        if math.isnan(self.std):
            return f"{self.mean:.{digits}f}"
        spread = f"{self.mean:.{digits}f} ± {self.std:.{digits}f}"
        return f"{spread} [{self.low:.{digits}f}, {self.high:.{digits}f}]" if interval else spread


def over_seeds(values: Iterable[float | None]) -> OverSeeds:
    """values: at least one; None stands for nan, as in JSON.

    The interval is Student's: mean ± t std / sqrt(n), t of n - 1 degrees of freedom.
    """
    numbers = [real(value) for value in values]
    mean = statistics.fmean(numbers)
    if len(numbers) == 1 or math.isnan(mean):
        return OverSeeds(len(numbers), mean, math.nan, math.nan, math.nan)
    from scipy.special import stdtrit  # half a second, which few commands need

    std = statistics.stdev(numbers)
    quantile = float(stdtrit(len(numbers) - 1, (1 + CONFIDENCE) / 2))
    half = quantile * std / math.sqrt(len(numbers))
    return OverSeeds(len(numbers), mean, std, mean - half, mean + half)
