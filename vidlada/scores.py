"""Means of scores in percent, with standard errors and intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.96  # of 95 % intervals


@dataclass(frozen=True)
class Score:
    """A mean in percent.

    Attributes:
        percent: NaN without samples.
        standard_error: percent; NaN with fewer than two clusters.
        number: of samples.
        low, high: of the 95 % interval, percent; known wherever there is a sample.
    """

    percent: float
    standard_error: float
    number: int
    low: float
    high: float

    def __str__(self) -> str:
        return "–" if math.isnan(self.percent) else f"{self.percent:.1f}"


NONE = Score(math.nan, math.nan, 0, math.nan, math.nan)


def mean_score(values: Sequence[float], clusters: Sequence[str]) -> Score:
    """Mean with the standard error of means over clusters (each sample its own cluster gives the usual one).

    Where samples do not differ, or there is one cluster only, they say nothing about their spread: the interval is
    Wilson's then, of as many samples as there are clusters.

    Args:
        values: 0 to 1.
        clusters: of each; the values of one may depend on each other.
    """
    number = len(values)
    if not number:
        return NONE
    mean = sum(values) / number
    sums: dict[str, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    count = len(sums)
    variance = sum(s * s for s in sums.values()) * count / max(count - 1, 1) / number**2
    error = math.sqrt(variance) if count > 1 else math.nan
    low, high = (mean - Z * error, mean + Z * error) if error > 0 else wilson(mean, count)
    return Score(100 * mean, 100 * error, number, 100 * low, 100 * high)


def wilson(mean: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share among so many samples."""
    middle = (mean + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(mean * (1 - mean) / count + Z**2 / (4 * count**2))
    return min(middle - half, mean), max(middle + half, mean)


def mean_of_scores(scores: Sequence[Score]) -> Score:
    """Every part counts alike; parts are taken as independent, their intervals combined by their half widths."""
    parts = [score for score in scores if score.number]
    if not parts:
        return NONE
    count = len(parts)
    percent = sum(part.percent for part in parts) / count
    error = math.hypot(*(part.standard_error for part in parts)) / count
    low = percent - math.hypot(*(part.percent - part.low for part in parts)) / count
    high = percent + math.hypot(*(part.high - part.percent for part in parts)) / count
    return Score(percent, error, sum(part.number for part in parts), low, high)
