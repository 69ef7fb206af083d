"""From scores of cases to the rows of a results table, and the table in the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from evaluation.scoring import Score, Space
from evaluation.significance import (
    Interval,
    PairedTest,
    bootstrap_interval,
    holm,
    paired_wilcoxon,
)

Metric = Literal["dice", "dice_reference_present", "hd95"]
METRICS: tuple[Metric, ...] = ("dice", "dice_reference_present", "hd95")
ROLES = ("teacher", "baseline", "student")
SPACE_NAMES = {"native": "native space", "grid": "training grid"}


@dataclass(frozen=True)
class Moments:
    """Mean, standard deviation and median over cases; NaN where there are too few of them.

    Attributes:
        n: Cases that entered.
        mean: NaN without cases.
        sd: Sample standard deviation over cases; NaN below two.
        median: NaN without cases.
    """

    n: int
    mean: float
    sd: float
    median: float


@dataclass(frozen=True)
class Summary:
    """One network in one region and space.

    Attributes:
        role: "teacher", "baseline" or "student".
        region: Name of the region.
        space: "grid" or "native".
        dice: Over all cases; both empty counts 1, one empty 0.
        dice_reference_present: Over the cases whose reference is not empty.
        hd95: Over all cases, with the penalties of `evaluation.metrics`.
        hd95_unit: "mm" or "voxel".
        reference_empty: Cases whose reference is empty.
        false_alarms: Of these, the cases with a prediction all the same.
        missed: Cases with a reference and no prediction.
    """

    role: str
    region: str
    space: Space
    dice: Moments
    dice_reference_present: Moments
    hd95: Moments
    hd95_unit: str
    reference_empty: int
    false_alarms: int
    missed: int


@dataclass(frozen=True)
class Gain:
    """What one network has over another on the same cases; for HD95, less is better.

    Attributes:
        role: The network of interest.
        against: The network it is compared with.
        region: Name of the region.
        space: "grid" or "native".
        metric: Which score.
        n: Pairs that entered.
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


def summarise(scores: Sequence[Score]) -> list[Summary]:
    """Mean, sd and median over cases for every network, region and space.

    Args:
        scores: Scores of any number of networks.

    Returns:
        Rows ordered by space, region and role as they first appear in `scores`.
    """
    groups: dict[tuple[Space, str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.space, score.region, score.role), []).append(score)
    rows = [_summary(group) for group in groups.values()]
    spaces = list(dict.fromkeys(row.space for row in rows))
    regions = list(dict.fromkeys(row.region for row in rows))
    return sorted(rows, key=lambda row: (spaces.index(row.space), regions.index(row.region)))


def gains(
    scores: Sequence[Score],
    *,
    role: str = "student",
    against: str = "baseline",
    seed: int = 0,
) -> list[Gain]:
    """Paired differences between two networks, per metric, space and region.

    Args:
        scores: Scores that hold both networks on the same cases.
        role: The network of interest.
        against: The network it is compared with.
        seed: Of the bootstrap.

    Returns:
        One gain per metric, space and region; empty if one of the networks has no scores.
    """
    ours = {_place(score): score for score in scores if score.role == role}
    theirs = {_place(score): score for score in scores if score.role == against}
    shared = [place for place in ours if place in theirs]
    families = list(dict.fromkeys(space for space, _, _ in shared))
    regions = list(dict.fromkeys(region for _, region, _ in shared))
    result: list[Gain] = []
    for metric in METRICS:
        for space in families:
            family = []
            for region in regions:
                places = [place for place in shared if place[:2] == (space, region)]
                pairs = [(getattr(ours[p], metric), getattr(theirs[p], metric)) for p in places]
                differences = [one - other for one, other in pairs]
                moments = _moments(differences)
                family.append(
                    Gain(
                        role=role,
                        against=against,
                        region=region,
                        space=space,
                        metric=metric,
                        n=moments.n,
                        mean=moments.mean,
                        interval=bootstrap_interval(differences, seed),
                        test=paired_wilcoxon(differences),
                    )
                )
            result += _corrected(family)
    return result


def _place(score: Score) -> tuple[Space, str, str]:
    return score.space, score.region, score.case


def _summary(group: Sequence[Score]) -> Summary:
    first = group[0]
    empty = [score for score in group if score.reference_voxels == 0]
    return Summary(
        role=first.role,
        region=first.region,
        space=first.space,
        dice=_moments([score.dice for score in group]),
        dice_reference_present=_moments([score.dice_reference_present for score in group]),
        hd95=_moments([score.hd95 for score in group]),
        hd95_unit=first.hd95_unit,
        reference_empty=len(empty),
        false_alarms=sum(score.predicted_voxels > 0 for score in empty),
        missed=sum(score.reference_voxels > 0 == score.predicted_voxels for score in group),
    )


def _moments(values: Sequence[float]) -> Moments:
    kept = [value for value in values if not math.isnan(value)]
    return Moments(
        n=len(kept),
        mean=statistics.fmean(kept) if kept else math.nan,
        sd=statistics.stdev(kept) if len(kept) > 1 else math.nan,
        median=statistics.median(kept) if kept else math.nan,
    )


def _corrected(family: Sequence[Gain]) -> list[Gain]:
    corrected = holm([gain.test.p_value for gain in family])
    return [replace(gain, p_holm=p) for gain, p in zip(family, corrected, strict=True)]


def format_number(value: float, digits: int = 3, *, signed: bool = False) -> str:
    """A number for a table; a dash for NaN.

    Args:
        value: Any number.
        digits: After the decimal point.
        signed: Whether to write a plus.

    Returns:
        Text with a true minus sign.

    Example:
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
    """A p value for a table.

    Args:
        value: Between 0 and 1, or NaN.

    Returns:
        Three digits, "< 0.001" below, a dash for NaN.
    """
    return "< 0.001" if value < 0.001 else format_number(value)


def render_tables(
    scores: Sequence[Score], *, phantom: bool, title: str = "Held-out cases"
) -> Group:
    """The results as rich tables for the terminal, one per space.

    Args:
        scores: Scores of all networks.
        phantom: Whether the subjects are synthetic; the titles then say so.
        title: What the cases are.

    Returns:
        A renderable for `rich.console.Console.print`.
    """
    rows, differences = summarise(scores), gains(scores)
    label = f"{title} (phantom)" if phantom else title
    spaces = list(dict.fromkeys(row.space for row in rows))
    parts: list[Table | Text] = []
    for space in spaces:
        parts.append(
            _summary_table(
                [row for row in rows if row.space == space], f"{label}, {SPACE_NAMES[space]}"
            )
        )
        parts.append(_gain_table([gain for gain in differences if gain.space == space]))
    parts.append(Text(_note(rows), style="dim"))
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
