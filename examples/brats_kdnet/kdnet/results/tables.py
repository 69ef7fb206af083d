"""From scores of cases to the rows of a results table, and the table in the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kdnet.errors import UserError
from kdnet.evaluation.scoring import Postprocessing, Score, Space
from kdnet.results.significance import (
    Interval,
    PairedTest,
    bootstrap_interval,
    holm,
    paired_wilcoxon,
)

Metric = Literal["dice", "dice_reference_present", "hd95", "nsd"]
METRICS: tuple[Metric, ...] = ("dice", "dice_reference_present", "hd95", "nsd")
ROLES = ("teacher", "baseline", "student")
SPACE_NAMES = {"native": "native space", "grid": "training grid"}
POSTPROCESSING_NAMES = {"off": "no post-processing", "on": "small regions removed"}


@dataclass(frozen=True)
class Moments:
    """One metric of one network over cases; NaN where there are too few of them.

    Attributes:
        n: Cases that entered.
        mean: Mean over cases; NaN without cases.
        sd: Sample standard deviation over cases; NaN below two.
        median: NaN without cases.
        lower_quartile: NaN without cases.
        upper_quartile: NaN without cases.
        interval: Bootstrap interval of the mean over cases.
        folds_mean: Mean of the means of the folds, the seeds of a fold pooled.
        folds_sd: Sample standard deviation of the means of the folds; NaN below two folds.
        seeds_sd: Sample standard deviation of the means of the seeds, the folds of a seed pooled;
            NaN below two seeds.
    """

    n: int
    mean: float
    sd: float
    median: float
    lower_quartile: float
    upper_quartile: float
    interval: Interval
    folds_mean: float
    folds_sd: float
    seeds_sd: float


@dataclass(frozen=True)
class Summary:
    """One network in one region and space.

    Attributes:
        role: Name of the row, such as "teacher", "baseline" or "student".
        region: Name of the region.
        space: "grid" or "native".
        dice: Over all cases; both empty counts 1, one empty 0.
        dice_reference_present: Over the cases whose reference is not empty.
        hd95: Over all cases, with the penalties of `kdnet.evaluation.metrics`.
        nsd: Surface Dice at 1 mm; without cases where the spacing is nominal.
        hd95_unit: "mm" or "voxel".
        reference_empty: Cases whose reference is empty.
        false_alarms: Of these, the cases with a prediction all the same, by one seed at least.
        missed: Cases with a reference and no prediction, by one seed at least.
        postprocessing: "off" or "on".
        modalities: What the network saw; empty if that was not recorded.
        folds: Number of folds.
        seeds: Number of seeds.
    """

    role: str
    region: str
    space: Space
    dice: Moments
    dice_reference_present: Moments
    hd95: Moments
    nsd: Moments
    hd95_unit: str
    reference_empty: int
    false_alarms: int
    missed: int
    postprocessing: Postprocessing
    modalities: str
    folds: int
    seeds: int


@dataclass(frozen=True)
class Gain:
    """What one network has over another on the same cases; for HD95, less is better.

    Attributes:
        role: The network of interest.
        against: The network it is compared with.
        region: Name of the region.
        space: "grid" or "native".
        metric: Which score.
        n: Cases that entered, each once.
        mean: Mean paired difference, `role` minus `against`; NaN without pairs.
        interval: Bootstrap interval of the mean, over cases.
        test: Two-sided Wilcoxon signed-rank test.
        p_holm: Its p value, corrected for the regions tested in this space with this metric.
    """

    role: str
    against: str
    region: str
    space: Space
    metric: Metric
    n: int
    mean: float
    interval: Interval
    test: PairedTest
    p_holm: float = math.nan


def summarise(
    scores: Sequence[Score], *, postprocessing: Postprocessing = "off", seed: int = 0
) -> list[Summary]:
    """Statistics over cases, folds and seeds for every network, region and space."""
    groups: dict[tuple[Space, str, str, str], list[Score]] = {}
    for score in scores:
        if score.postprocessing == postprocessing:
            key = (score.space, score.region, score.role, score.modalities)
            groups.setdefault(key, []).append(score)
    rows = [_summary(group, seed) for group in groups.values()]
    spaces = list(dict.fromkeys(row.space for row in rows))
    regions = list(dict.fromkeys(row.region for row in rows))
    return sorted(rows, key=lambda row: (spaces.index(row.space), regions.index(row.region)))


def gains(
    scores: Sequence[Score],
    *,
    role: str = "student",
    against: str = "baseline",
    seed: int = 0,
    postprocessing: Postprocessing = "off",
) -> list[Gain]:
    """Paired differences between two networks, per metric, space and region."""
    chosen = [score for score in scores if score.postprocessing == postprocessing]
    ours = _placed(score for score in chosen if score.role == role)
    theirs = _placed(score for score in chosen if score.role == against)
    pairs = [(score, theirs[place]) for place, score in ours.items() if place in theirs]
    _check_references(pairs)
    spaces = list(dict.fromkeys(score.space for score, _ in pairs))
    regions = list(dict.fromkeys(score.region for score, _ in pairs))
    result: list[Gain] = []
    for metric in METRICS:
        for space in spaces:
            family = []
            for region in regions:
                here = [
                    pair for pair in pairs if (pair[0].space, pair[0].region) == (space, region)
                ]
                family.append(_gain(here, against, metric, seed))
            result += _corrected(family)
    return result


def _check_references(pairs: Sequence[tuple[Score, Score]]) -> None:
    """Refuse pairs whose reference was another one when the second of them was scored."""
    for one, other in pairs:
        if one.reference_voxels != other.reference_voxels:
            raise UserError(
                f"{one.case}: the reference of {one.region} had {other.reference_voxels} voxels "
                f"when {other.role} was scored and {one.reference_voxels} for {one.role}; the "
                "segmentation has changed in between. Train and score both with the same files."
            )


def _gain(pairs: Sequence[tuple[Score, Score]], against: str, metric: Metric, seed: int) -> Gain:
    first = pairs[0][0]
    differences = per_case(
        (one.case, getattr(one, metric) - getattr(other, metric)) for one, other in pairs
    )
    return Gain(
        role=first.role,
        against=against,
        region=first.region,
        space=first.space,
        metric=metric,
        n=len(differences),
        mean=_mean(differences),
        interval=bootstrap_interval(differences, seed),
        test=paired_wilcoxon(differences),
    )


def per_case(values: Iterable[tuple[str, float]]) -> list[float]:
    """Average what was measured several times on the same case."""
    cases: dict[str, list[float]] = {}
    for case, value in values:
        if not math.isnan(value):
            cases.setdefault(case, []).append(value)
    return [statistics.fmean(measured) for measured in cases.values()]


def _placed(scores: Iterable[Score]) -> dict[tuple[object, ...], Score]:
    """Scores of one network by what pairs them with another's."""
    placed: dict[tuple[object, ...], Score] = {}
    for score in scores:
        place = (score.space, score.region, score.case, score.fold, score.seed)
        if place in placed:
            raise UserError(
                f"'{score.role}' is scored twice on {score.case} ({score.region}, {score.space}, "
                f"fold {score.fold}, seed {score.seed}). Give scores of one subset of modalities, "
                "and those of every training once."
            )
        placed[place] = score
    return placed


def _summary(group: Sequence[Score], seed: int) -> Summary:
    _placed(group)
    first = group[0]
    empty = [score for score in group if score.reference_voxels == 0]
    return Summary(
        role=first.role,
        region=first.region,
        space=first.space,
        **{metric: _moments(group, metric, seed) for metric in METRICS},
        hd95_unit=first.hd95_unit,
        reference_empty=len({score.case for score in empty}),
        false_alarms=len({score.case for score in empty if score.predicted_voxels > 0}),
        missed=len({s.case for s in group if s.reference_voxels > 0 == s.predicted_voxels}),
        postprocessing=first.postprocessing,
        modalities=first.modalities,
        folds=len({score.fold for score in group}),
        seeds=len({score.seed for score in group}),
    )


def _moments(group: Sequence[Score], metric: Metric, seed: int) -> Moments:
    values = per_case((score.case, getattr(score, metric)) for score in group)
    folds = per_case((str(score.fold), getattr(score, metric)) for score in group)
    seeds = per_case((str(score.seed), getattr(score, metric)) for score in group)
    quartiles = np.quantile(values, [0.25, 0.5, 0.75]) if values else [math.nan] * 3
    return Moments(
        n=len(values),
        mean=_mean(values),
        sd=_sd(values),
        median=float(quartiles[1]),
        lower_quartile=float(quartiles[0]),
        upper_quartile=float(quartiles[2]),
        interval=bootstrap_interval(values, seed, unit="case"),
        folds_mean=_mean(folds),
        folds_sd=_sd(folds),
        seeds_sd=_sd(seeds),
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _sd(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _corrected(family: Sequence[Gain]) -> list[Gain]:
    corrected = holm([gain.test.p_value for gain in family])
    return [replace(gain, p_holm=p) for gain, p in zip(family, corrected, strict=True)]


def format_number(value: float, digits: int = 3, *, signed: bool = False) -> str:
    """A number for a table; a dash for NaN.

    >>> format_number(0.12345), format_number(float("nan"))
    ('0.123', '–')
    """
    if math.isnan(value):
        return "\N{EN DASH}"
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    if float(text) == 0:
        text = text.replace("-", "").replace("+", "")
    return text.replace("-", "\N{MINUS SIGN}")


def format_p(value: float) -> str:
    """A p value for a table."""
    return "< 0.001" if value < 0.001 else format_number(value)


def render_tables(
    scores: Sequence[Score], *, phantom: bool, title: str = "Held-out cases"
) -> Group:
    """The results as rich tables for the terminal, one per space and post-processing."""
    label = f"{title} (phantom)" if phantom else title
    parts: list[Table | Text] = []
    treatments = list(dict.fromkeys(score.postprocessing for score in scores))
    for treatment in treatments:
        rows = summarise(scores, postprocessing=treatment)
        differences = gains(scores, postprocessing=treatment)
        treated = "" if treatments == ["off"] else f", {POSTPROCESSING_NAMES[treatment]}"
        for space in dict.fromkeys(row.space for row in rows):
            here = [row for row in rows if row.space == space]
            parts.append(_summary_table(here, f"{label}, {SPACE_NAMES[space]}{treated}"))
            parts.append(_gain_table([gain for gain in differences if gain.space == space]))
    parts.append(Text(_note(summarise(scores)), style="dim"))
    return Group(*parts)


def _summary_table(rows: Sequence[Summary], title: str) -> Table:
    unit = rows[0].hd95_unit
    table = Table(title=title, title_justify="left")
    table.add_column("region")
    table.add_column("network")
    for heading in ("Dice, mean ± sd", "Dice, reference present (n)", f"HD95 ({unit})", "n"):
        table.add_column(heading, justify="right")
    previous = ""
    for row in rows:
        table.add_row(
            row.region if row.region != previous else "",
            row.role,
            _mean_sd(row.dice),
            f"{_mean_sd(row.dice_reference_present)} ({row.dice_reference_present.n})",
            _mean_sd(row.hd95, digits=1),
            str(row.dice.n),
        )
        previous = row.region
    return table


def _gain_table(rows: Sequence[Gain]) -> Table | Text:
    shown = [row for row in rows if row.metric == "dice"]
    if not shown:
        return Text("No gain: baseline and student have no scores on the same cases.")
    table = Table(title=f"Dice of {shown[0].role} minus {shown[0].against}", title_justify="left")
    table.add_column("region")
    for heading in ("mean", "95 % interval", "p (Wilcoxon)", "p (Holm)", "n"):
        table.add_column(heading, justify="right")
    for row in shown:
        interval, test = row.interval, row.test
        ends = f"{format_number(interval.lower, signed=True)} to "
        ends += format_number(interval.upper, signed=True)
        table.add_row(
            row.region,
            format_number(row.mean, signed=True),
            interval.reason or ends,
            test.reason or format_p(test.p_value),
            format_p(row.p_holm),
            str(row.n),
        )
    return table


def _mean_sd(moments: Moments, digits: int = 3) -> str:
    return f"{format_number(moments.mean, digits)} ± {format_number(moments.sd, digits)}"


def _note(rows: Sequence[Summary]) -> str:
    counts = {row.region: row.reference_empty for row in rows if row.space == "native"}
    listed = ", ".join(f"{region} {count}" for region, count in counts.items())
    return (
        "sd over cases. Both masks empty: Dice 1, HD95 0; exactly one empty: Dice 0, HD95 the "
        f"diagonal of the image. Cases with an empty reference: {listed}."
    )
