"""Statistics over cases: is a gain larger than what the choice of cases explains?

A number that too few cases cannot support is not given; the reason takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

# With five pairs the smallest two-sided p of the signed-rank test is 2 / 2^5 = 0.0625.
FEWEST_PAIRS = 6


@dataclass(frozen=True)
class Interval:
    """Bootstrap interval of a mean.

    Attributes:
        lower: Lower end, NaN where no interval is given.
        upper: Upper end, NaN where no interval is given.
        level: Nominal coverage, between 0 and 1.
        n: Values that entered; NaN do not.
        reason: Why there is no interval; None where there is one.
    """

    lower: float
    upper: float
    level: float
    n: int
    reason: str | None = None


@dataclass(frozen=True)
class PairedTest:
    """Outcome of a two-sided paired test.

    Attributes:
        p_value: NaN where the test was not carried out.
        n: Pairs that entered; pairs with a NaN do not.
        n_nonzero: Of these, the pairs that differ; the ranks are theirs alone.
        reason: Why there is no p value; None where there is one.
    """

    p_value: float
    n: int
    n_nonzero: int
    reason: str | None = None


def bootstrap_interval(
    values: Sequence[float],
    seed: int,
    level: float = 0.95,
    resamples: int = 10_000,
    unit: str = "paired case",
) -> Interval:
    """Percentile bootstrap interval of a mean over cases, resampling cases."""
    # Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    if not 0 < level < 1:
        raise ValueError(f"The coverage must lie between 0 and 1, got {level}.")
    kept = _without_nan(values)
    if kept.size < FEWEST_PAIRS:
        return Interval(math.nan, math.nan, level, kept.size, _too_few(kept.size, unit))
    means = _resampled(kept.size, seed, resamples) @ kept / kept.size
    tail = (1 - level) / 2
    lower, upper = np.quantile(means, [tail, 1 - tail])
    return Interval(float(lower), float(upper), level, kept.size)


def paired_wilcoxon(differences: Sequence[float]) -> PairedTest:
    """Two-sided Wilcoxon signed-rank test on paired differences."""
    values = _without_nan(differences)
    nonzero = values[values != 0]
    reason = _why_no_test(values.size, nonzero.size)
    if reason is not None:
        return PairedTest(math.nan, values.size, nonzero.size, reason)
    p_value = float(stats.wilcoxon(nonzero).pvalue)
    return PairedTest(p_value, values.size, nonzero.size)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for several tests of one family."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        corrected[index] = largest
    return corrected


# A table asks for dozens of intervals over the same number of cases.
@lru_cache(maxsize=4)
def _resampled(n: int, seed: int, resamples: int) -> NDArray[np.float64]:
    """How often each of n cases enters each bootstrap sample, (resamples, n)."""
    draws = np.random.default_rng(seed).integers(n, size=(resamples, n))
    rows = np.arange(resamples)[:, None] * n
    counts = np.bincount((draws + rows).ravel(), minlength=resamples * n)
    return counts.reshape(resamples, n).astype(np.float64)


def _without_nan(differences: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(differences, dtype=np.float64)
    return values[~np.isnan(values)]


def _too_few(n: int, unit: str = "paired case") -> str:
    return f"{n} {unit}{'' if n == 1 else 's'}; at least {FEWEST_PAIRS} are needed"


def _why_no_test(n: int, n_nonzero: int) -> str | None:
    if n < FEWEST_PAIRS:
        return _too_few(n)
    if n_nonzero == 0:
        return f"all {n} differences are zero"
    if n_nonzero < FEWEST_PAIRS:
        return f"only {n_nonzero} of {n} differences are not zero; {FEWEST_PAIRS} are needed"
    return None
