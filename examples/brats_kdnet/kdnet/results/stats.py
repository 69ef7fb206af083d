"""Statistics over cases: is a gain larger than what the choice of patients and seeds explains?

A number that too few patients cannot support is not given; the reason takes its place. Functions
take lines of the table of scores; `cells` arranges one score as cases by units (fold, seed).
Visits of one patient are alike: means are over cases, intervals and tests are over patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from kdnet.errors import UserError

Array = NDArray[np.float64]

# With five pairs the smallest two-sided p of the signed-rank test is 2 / 2^5 = 0.0625.
FEWEST = 6
LEVEL = 0.95
RESAMPLES = 10_000
METRICS = ("dice", "dice_reference_present", "hd95", "nsd")
_PAIR = ["fold", "seed", "case", "region", "space", "postprocessing"]


@dataclass(frozen=True)
class Interval:
    """95 % bootstrap interval.

    Attributes:
        lower: Lower end, NaN where no interval is given.
        upper: Upper end.
        reason: Why there is no interval; empty where there is one.
    """

    lower: float
    upper: float
    reason: str = ""


@dataclass(frozen=True)
class Gain:
    """What a row has over another on the same cases of the same units; for HD95, less is better.

    Attributes:
        row: The network of interest.
        against: The one that it is compared with.
        region: Name of the region.
        metric: Which score.
        cells: Differences, cases by units.
        interval: Of the mean difference.
        p: Of Wilcoxon's signed-rank test, two-sided; NaN where it was not carried out.
        reason: Why there is no p; empty where there is one.
        steps: Optimizer steps relative to those of the other; NaN where they are not known.
        p_holm: The same, corrected for all tests of its family.
    """

    row: str
    against: str
    region: str
    metric: str
    cells: pd.DataFrame
    interval: Interval
    p: float
    reason: str
    steps: float
    p_holm: float = math.nan

    @property
    def means(self) -> pd.Series[float]:
        """Of every case over its units."""
        return self.cells.mean(axis=1)

    @property
    def mean(self) -> float:
        """Over cases."""
        return float(self.means.mean())

    def changed(self, sign: int) -> int:
        """Count the cases whose mean over units rises (1) or falls (-1)."""
        return int((sign * self.means > 0).sum())

    @property
    def verdict(self) -> str:
        """What interval and test together allow to say: better, worse, or open."""
        if not self.p_holm < 1 - LEVEL or self.interval.reason:
            return "open"
        ends = (self.interval.lower, self.interval.upper)
        lower, upper = sorted(-end for end in ends) if self.metric == "hd95" else ends
        return "better" if lower > 0 else "worse" if upper < 0 else "open"


def cells(scores: pd.DataFrame, metric: str = "dice") -> pd.DataFrame:
    """Arrange a score of one row and region as cases by units, without those that have none.

    Cases stand behind their patients; without such a column each is a patient of its own.
    """
    return _there(_arranged(scores, metric))


def all_cells(scores: pd.DataFrame) -> list[pd.DataFrame]:
    """Arrange every score of a row and region that has some, in about the time of one."""
    table = _arranged(scores, [*METRICS])
    return [_there(table[metric]) for metric in METRICS]


def gains(scores: pd.DataFrame, metric: str = "dice", *, together: bool = False) -> list[Gain]:
    """Compare every row with the one that its lines name, in one space and post-processing.

    Holm's correction covers the regions of a row, or all comparisons together.
    """
    groups = _paired(scores, metric).groupby(["row", "against", "region"], sort=False)
    found = [_gain(pairs, metric, *names) for names, pairs in groups]
    corrected: list[Gain] = []
    for row in [""] if together else dict.fromkeys(gain.row for gain in found):
        family = [gain for gain in found if together or gain.row == row]
        p_values = holm([gain.p for gain in family])
        corrected += [replace(gain, p_holm=p) for gain, p in zip(family, p_values, strict=True)]
    return corrected


def over_most_labels(scores: pd.DataFrame) -> pd.DataFrame:
    """Let rows with fewer labels be compared with the baseline that has most in their unit."""
    unit = ["fold", "seed"]
    baselines = scores[scores["row"].isin(scores["against"])]
    most = baselines.sort_values("labelled", kind="stable").groupby(unit)[["row", "labelled"]]
    found = scores.merge(most.last(), how="left", on=unit, suffixes=("", "_most"))
    fewer = (found["against"] != "") & (found["labelled_most"] > found["labelled"])
    moved = found.assign(against=found["row_most"].where(fewer, ""))
    return moved.drop(columns=["row_most", "labelled_most"])


def lead(
    scores: pd.DataFrame, gain: Gain, teacher: str, *, other_seeds: bool = False
) -> pd.DataFrame:
    """The teacher's lead in the cells of a gain, both networks averaged over the seeds of a fold.

    With `other_seeds` the lead is that over the baselines that the gain was not measured against.
    """
    here = scores[scores["region"] == gain.region]
    ahead, plain = (cells(here[here["row"] == row]).T for row in (teacher, gain.against))
    if ahead.empty or plain.empty:
        return pd.DataFrame()
    units, cases = gain.cells.columns, gain.cells.index
    folds = [fold for fold, _ in units]
    own = plain.reindex(index=units, columns=cases).to_numpy()
    groups = plain.groupby(level="fold")
    total, count = (
        part.reindex(index=folds, columns=cases) for part in (groups.sum(), groups.count())
    )
    if other_seeds:
        total, count = total - np.nan_to_num(own), count - ~np.isnan(own)
    before = (total / count.where(count > 0)).to_numpy()
    after = ahead.groupby(level="fold").mean().reindex(index=folds, columns=cases).to_numpy()
    leads = pd.DataFrame((after - before).T, index=cases, columns=units)
    return leads.where(gain.cells.notna()).dropna(how="all").dropna(how="all", axis=1)


def wilcoxon(differences: Sequence[float]) -> tuple[float, str]:
    """P of the two-sided signed-rank test, zero differences dropped, or why there is none."""
    values = np.asarray(differences, dtype=np.float64)
    values = values[~np.isnan(values)]
    changed = values[values != 0]
    reason = ""
    if values.size < FEWEST:
        reason = _too_few(values.size)
    elif changed.size < FEWEST:
        reason = (
            f"{values.size - changed.size} of {values.size} differences are zero; at least "
            f"{FEWEST} others are needed"
        )
    return (math.nan, reason) if reason else (float(stats.wilcoxon(changed).pvalue), "")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for several tests of one family; NaN are none."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        corrected[index] = largest
    return corrected


def interval(values: pd.DataFrame, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of a mean over cases, resampling patients and seeds."""
    # Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; two crossed
    # factors are drawn apart from each other as in Owen 2007, The pigeonhole bootstrap, Annals of
    # Applied Statistics 1(2).
    return _interval(values, seed, lambda draws: draws.means(values.to_numpy()))


def slope(x: pd.DataFrame, y: pd.DataFrame, seed: int = 0) -> tuple[float, Interval]:
    """Least-squares slope of y on x over cases and units, and its interval, drawn like a mean's."""
    if y.empty:
        return math.nan, Interval(math.nan, math.nan, _too_few(0))
    once = _Draws(np.ones((1, len(y))), np.ones((1, y.shape[1])))
    value = float(once.slopes(x.to_numpy(), y.to_numpy())[0])
    if math.isnan(value):
        return value, Interval(math.nan, math.nan, "all values of x are equal")
    return value, _interval(y, seed, lambda draws: draws.slopes(x.to_numpy(), y.to_numpy()))


@dataclass(frozen=True)
class _Draws:
    """How often each case, (samples, cases), and each unit, (samples, units), is drawn."""

    cases: Array
    units: Array

    def means(self, values: Array) -> Array:
        """Mean over the drawn cases of their means over the drawn units."""
        if (self.units == 1).all():  # one seed a fold
            each = np.nanmean(values, axis=1)
            return _quotient(self.cases @ each, self.cases.sum(axis=1), least=0.0)
        present = ~np.isnan(values)
        counts = self.units @ present.T.astype(np.float64)
        totals = self.units @ np.nan_to_num(values).T
        means = np.divide(totals, counts, out=np.zeros_like(totals), where=counts > 0)
        weights = self.cases * (counts > 0)
        return _quotient((weights * means).sum(axis=1), weights.sum(axis=1), least=0.0)

    def slopes(self, x: Array, y: Array) -> Array:
        """Least-squares slope of y on x, every case with weight one, spread over its units."""
        x_mean, y_mean, product, square = map(self.means, (x, y, x * y, x * x))
        # Rounding leaves about 1e-17 of a variance that is zero.
        return _quotient(product - x_mean * y_mean, square - x_mean**2, least=1e-12)


def _interval(values: pd.DataFrame, seed: int, draw: Callable[[_Draws], Array]) -> Interval:
    patients, names = pd.factorize(values.index.get_level_values("patient"))
    if len(names) < FEWEST:
        return Interval(math.nan, math.nan, _too_few(len(names)))
    folds = tuple(int(fold) for fold, _ in values.columns)
    found = draw(_drawn(tuple(patients.tolist()), folds, seed))
    tail = (1 - LEVEL) / 2
    lower, upper = np.quantile(found[~np.isnan(found)], [tail, 1 - tail])
    return Interval(float(lower), float(upper))


# Rows of a table share cases and units, and with them the draws.
@lru_cache(maxsize=4)
def _drawn(patients: tuple[int, ...], folds: tuple[int, ...], seed: int) -> _Draws:
    """Draw patients, who bring all their cases, and the seeds of every fold."""
    generator = np.random.default_rng(seed)
    number = max(patients) + 1
    counts = generator.multinomial(number, np.full(number, 1 / number), size=RESAMPLES)
    units = np.zeros((RESAMPLES, len(folds)))
    for fold in sorted(set(folds)):
        columns = [index for index, other in enumerate(folds) if other == fold]
        seeds = len(columns)
        units[:, columns] = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    return _Draws(counts[:, patients].astype(np.float64), units)


def _arranged(scores: pd.DataFrame, metric: str | list[str]) -> pd.DataFrame:
    if "patient" not in scores:
        scores = scores.assign(patient=scores["case"])
    return scores.pivot(index=["patient", "case"], columns=["fold", "seed"], values=metric)


def _there(table: pd.DataFrame) -> pd.DataFrame:
    found = table.notna().to_numpy()
    kept: pd.DataFrame = table.loc[found.any(axis=1), found.any(axis=0)]
    return kept


def _quotient(above: Array, below: Array, least: float) -> Array:
    result = np.full(above.shape, math.nan)
    np.divide(above, below, out=result, where=below > least)
    return result


def _paired(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Lines beside those of the row that they are compared with, and the difference."""
    values = [metric, "reference_voxels", *({"steps"} & {*scores.columns})]
    other = scores[["row", *_PAIR, *values]].rename(columns={"row": "against"})
    pairs = scores.merge(other, on=["against", *_PAIR], suffixes=("", "_other"))
    changed = pairs["reference_voxels"] - pairs["reference_voxels_other"]
    if changed.fillna(0).any():
        first = pairs[changed.fillna(0) != 0].iloc[0]
        raise UserError(
            f"{first['case']}: the reference of {first['region']} had another size when "
            f"{first['against']} was scored than for {first['row']}; the segmentation has changed "
            "in between. Train and score both with the same files."
        )
    pairs[metric] -= pairs[f"{metric}_other"]
    return pairs.dropna(subset=metric)


def _gain(pairs: pd.DataFrame, metric: str, row: str, against: str, region: str) -> Gain:
    table = cells(pairs, metric)
    by_patient = table.mean(axis=1).groupby(level="patient", sort=False).mean()
    p, reason = wilcoxon(by_patient.tolist())
    steps = math.nan
    if "steps" in pairs:
        units = pairs.drop_duplicates(["fold", "seed"])
        steps = float((units["steps"] / units["steps_other"].replace(0, math.nan)).mean())
    return Gain(row, against, region, metric, table, interval(table), p, reason, steps)


def _too_few(n: int) -> str:
    return f"{n} patient{'s' * (n != 1)}; at least {FEWEST} are needed"
