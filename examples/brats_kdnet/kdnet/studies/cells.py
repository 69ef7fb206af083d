"""Values of cases in units, and intervals that resample both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kdnet.results.significance import FEWEST_PAIRS, Interval

Unit = tuple[int, int]
Array = NDArray[np.float64]
RESAMPLES = 10_000


@dataclass(frozen=True)
class Cells:
    """One value per case and unit of one row: a Dice, a gain or a lead.

    Attributes:
        cases: Names, sorted, of those with a value.
        units: Folds and seeds, sorted, of those with a value.
        values: Shape (cases, units); NaN where there is none, as a unit holds out few cases.
    """

    cases: tuple[str, ...]
    units: tuple[Unit, ...]
    values: Array

    @classmethod
    def of(cls, found: Mapping[tuple[str, Unit], float]) -> Cells:
        """Arrange values."""
        kept = {place: value for place, value in found.items() if not math.isnan(value)}
        cases = sorted({case for case, _ in kept})
        units = sorted({unit for _, unit in kept})
        rows = [[kept.get((case, unit), math.nan) for unit in units] for case in cases]
        values = np.array(rows, dtype=np.float64).reshape(len(cases), len(units))
        return cls(tuple(cases), tuple(units), values)

    def found(self) -> dict[tuple[str, Unit], float]:
        """Return case and unit to value, without the NaN."""
        return {
            (case, unit): float(self.values[row, column])
            for row, case in enumerate(self.cases)
            for column, unit in enumerate(self.units)
            if not math.isnan(self.values[row, column])
        }

    @property
    def case_means(self) -> Array:
        """Mean of every case over its units, shape (cases,)."""
        # Every case has a value, so that no mean is of nothing.
        return np.asarray(np.nanmean(self.values, axis=1) if self.cases else np.empty(0))

    @property
    def unit_means(self) -> dict[Unit, float]:
        """Mean of every unit over its cases."""
        if not self.cases:
            return {}
        return dict(zip(self.units, np.nanmean(self.values, axis=0).tolist(), strict=True))

    @property
    def mean(self) -> float:
        """Mean over cases of their means over units; NaN without cases."""
        return float(self.case_means.mean()) if self.cases else math.nan

    @property
    def sd(self) -> float:
        """Sample standard deviation of the cases' means; NaN below two cases."""
        return float(self.case_means.std(ddof=1)) if len(self.cases) > 1 else math.nan

    @property
    def folds(self) -> list[int]:
        """Folds of the units, sorted."""
        return sorted({fold for fold, _ in self.units})

    @property
    def seeds(self) -> list[int]:
        """Seeds of the units, sorted."""
        return sorted({seed for _, seed in self.units})


@dataclass(frozen=True)
class Draws:
    """How often each case and each unit enters each bootstrap sample.

    Attributes:
        cases: Shape (samples, cases).
        units: Shape (samples, units).
    """

    cases: Array
    units: Array

    def means(self, values: Array) -> Array:
        """Mean over the drawn cases of their means over the drawn units."""
        present = ~np.isnan(values)
        counts = self.units @ present.T.astype(np.float64)
        totals = self.units @ np.nan_to_num(values).T
        means = np.divide(totals, counts, out=np.zeros_like(totals), where=counts > 0)
        weights = self.cases * (counts > 0)
        weight = weights.sum(axis=1)
        drawn = (weights * means).sum(axis=1)
        return _quotient(drawn, weight, weight > 0)

    def slopes(self, x: Array, y: Array) -> Array:
        """Least-squares slope of y on x, every case with weight one, spread over its units."""
        x_mean, y_mean, product, square = map(self.means, (x, y, x * y, x * x))
        variance = square - x_mean**2
        covariance = product - x_mean * y_mean
        # Rounding leaves about 1e-17 of a variance that is zero.
        return _quotient(covariance, variance, variance > 1e-12)


def mean_interval(
    cells: Cells, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap interval of a mean over cases and seeds."""
    # Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; two crossed
    # factors are drawn apart from each other as in Owen 2007, The pigeonhole bootstrap, Annals of
    # Applied Statistics 1(2).
    reason = _too_few(cells)
    means = draw(cells, seed, resamples).means(cells.values) if reason is None else np.empty(0)
    return _percentiles(means, level, len(cells.cases), reason)


def slope(x: Cells, y: Cells) -> float:
    """Least-squares slope of y on x."""
    once = Draws(np.ones((1, len(y.cases))), np.ones((1, len(y.units))))
    return float(once.slopes(x.values, y.values)[0]) if y.cases else math.nan


def slope_interval(
    x: Cells, y: Cells, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap interval of the slope of y on x, drawn like that of a mean."""
    reason = _too_few(y)
    if reason is None and math.isnan(slope(x, y)):
        reason = "all values of x are equal"
    kept = reason is None
    slopes = draw(y, seed, resamples).slopes(x.values, y.values) if kept else np.empty(0)
    return _percentiles(slopes, level, len(y.cases), reason)


def draw(cells: Cells, seed: int, resamples: int) -> Draws:
    """Draw cases, and the seeds of every fold."""
    return _drawn(len(cells.cases), tuple(fold for fold, _ in cells.units), seed, resamples)


# Rows of a study share cases and units, and with them the draws.
@lru_cache(maxsize=4)
def _drawn(cases: int, folds: tuple[int, ...], seed: int, resamples: int) -> Draws:
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(cases, np.full(cases, 1 / cases), size=resamples)
    units = np.zeros((resamples, len(folds)))
    for fold in sorted(set(folds)):
        columns = [index for index, other in enumerate(folds) if other == fold]
        seeds = len(columns)
        units[:, columns] = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    return Draws(counts.astype(np.float64), units)


def _quotient(above: Array, below: Array, where: NDArray[np.bool_]) -> Array:
    """Quotient where it can be told, NaN elsewhere."""
    result = np.full(above.shape, math.nan)
    np.divide(above, below, out=result, where=where)
    return result


def _too_few(cells: Cells) -> str | None:
    count = len(cells.cases)
    if count >= FEWEST_PAIRS:
        return None
    return f"{count} case{'' if count == 1 else 's'}; at least {FEWEST_PAIRS} are needed"


def _percentiles(values: Array, level: float, n: int, reason: str | None) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"The coverage must lie between 0 and 1, got {level}.")
    if reason is not None:
        return Interval(math.nan, math.nan, level, n, reason)
    tail = (1 - level) / 2
    lower, upper = np.quantile(values[~np.isnan(values)], [tail, 1 - tail])
    return Interval(float(lower), float(upper), level, n)
