"""Scores as the tables and sentences of a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kdnet.evaluation.scoring import Score
from kdnet.results.tables import (
    METRICS,
    SPACE_NAMES,
    Gain,
    Metric,
    Moments,
    Summary,
    format_number,
    format_p,
    summarise,
)

_LEVEL = 0.05
METRIC_NAMES = {
    "dice": "Dice, all cases",
    "dice_reference_present": "Dice, cases with the region in the reference",
    "hd95": "HD95",
    "nsd": "Surface Dice at 1 mm",
}


@dataclass(frozen=True)
class Row:
    """One region under one metric, as it is printed.

    Attributes:
        region: Name of the region.
        networks: Role to "mean ± sd".
        n: Cases that entered.
        gain: Mean difference of student and baseline; empty without both.
        interval: Its interval, or why there is none.
        p_value: Of the paired test, or why there is none.
        p_holm: Corrected over regions.
        verdict: "better", "worse" or "open"; decides the colour.
    """

    region: str
    networks: dict[str, str]
    n: str
    gain: str
    interval: str
    p_value: str
    p_holm: str
    verdict: str


@dataclass(frozen=True)
class Block:
    """The rows of one metric.

    Attributes:
        title: Name of the metric, with its unit.
        rows: One per region.
    """

    title: str
    rows: list[Row]


@dataclass(frozen=True)
class SpaceTable:
    """The results in one space.

    Attributes:
        title: Name of the space.
        blocks: One per metric.
        empties: One line per region about empty references and predictions.
    """

    title: str
    blocks: list[Block]
    empties: list[tuple[str, str, dict[str, str]]]


def _the(name: str) -> str:
    return f"the {name}"


def verdict(gain: Gain) -> str:
    """Say what an interval allows to say, and no more."""
    # Few cases make the bootstrap interval too narrow, so it does not decide alone.
    if not gain.p_holm < _LEVEL:
        return "open"
    lower, upper = gain.interval.lower, gain.interval.upper
    if gain.metric == "hd95":
        lower, upper = -upper, -lower
    if lower > 0:
        return "better"
    return "worse" if upper < 0 else "open"


def headline(differences: Sequence[Gain], label: Callable[[str], str] = _the) -> list[str]:
    """The outcome in sentences, one per region, from the Dice in native space."""
    return [
        _sentence(gain, label)
        for gain in differences
        if (gain.metric, gain.space) == ("dice", "native")
    ]


def space_tables(scores: Sequence[Score], differences: Sequence[Gain]) -> list[SpaceTable]:
    """The results of a run, one table per space."""
    rows = summarise(scores)
    spaces = [space for space in ("native", "grid") if any(row.space == space for row in rows)]
    tables = []
    for space in spaces:
        here = [row for row in rows if row.space == space]
        blocks = []
        for metric in measured(here):
            place = (space, metric)
            gained = [gain for gain in differences if (gain.space, gain.metric) == place]
            blocks.append(_block(metric, here, gained))
        tables.append(SpaceTable(SPACE_NAMES[space], blocks, empties(here)))
    return tables


def measured(rows: Sequence[Summary]) -> list[Metric]:
    """Which metrics any case has; surface Dice is not given where the spacing is nominal."""
    return [metric for metric in METRICS if any(getattr(row, metric).n for row in rows)]


def metric_title(metric: Metric, rows: Sequence[Summary]) -> str:
    """Name of a metric, with its unit."""
    unit = f" [{rows[0].hd95_unit}]" if metric == "hd95" else ""
    return METRIC_NAMES[metric] + unit


def case_table(scores: Sequence[Score]) -> dict[str, Any]:
    """The native Dice of every case."""
    native = [
        score for score in scores if score.space == "native" and score.postprocessing == "off"
    ]
    columns = list(dict.fromkeys((score.region, score.role) for score in native))
    values = {(s.case, s.region, s.role): format_number(s.dice) for s in native}
    return {
        "columns": columns,
        "rows": [
            (case, [values.get((case, *column), format_number(math.nan)) for column in columns])
            for case in dict.fromkeys(score.case for score in native)
        ],
    }


def interval_of(gain: Gain, digits: int = 3) -> str:
    """The interval of a gain, as it is printed."""
    lower = format_number(gain.interval.lower, digits, signed=True)
    upper = format_number(gain.interval.upper, digits, signed=True)
    return f"{gain.interval.level:.0%} interval {lower} to {upper}"


def relation(p_value: float) -> str:
    """A p value after the letter p."""
    text = format_p(p_value)
    return text if text.startswith("<") else f"= {text}"


def _sentence(gain: Gain, label: Callable[[str], str]) -> str:
    mean = format_number(gain.mean, signed=True)
    if gain.interval.reason:
        reason = f"no interval: {gain.interval.reason}"
        return f"{gain.region}: {mean}, {reason}. Nothing can be concluded."
    said = {
        "better": f"{label(gain.role)} is better than {label(gain.against)}",
        "worse": f"{label(gain.role)} is worse than {label(gain.against)}",
        "open": "no difference is shown",
    }[verdict(gain)]
    tested = gain.test.reason or f"Holm-corrected p {relation(gain.p_holm)}"
    return f"{gain.region}: {mean} ({interval_of(gain)}; {tested}), {said}."


def _block(metric: Metric, rows: Sequence[Summary], differences: Sequence[Gain]) -> Block:
    printed = []
    for region in dict.fromkeys(row.region for row in rows):
        moments = {row.role: getattr(row, metric) for row in rows if row.region == region}
        gain = next((gain for gain in differences if gain.region == region), None)
        printed.append(_row(region, moments, gain, digits=1 if metric == "hd95" else 3))
    return Block(metric_title(metric, rows), printed)


def _row(region: str, moments: dict[str, Moments], gain: Gain | None, digits: int) -> Row:
    numbers = sorted({m.n for m in moments.values()})
    return Row(
        region=region,
        networks={
            role: f"{format_number(m.mean, digits)} ± {format_number(m.sd, digits)}"
            for role, m in moments.items()
        },
        n=" / ".join(map(str, numbers)),
        gain=format_number(gain.mean, digits, signed=True) if gain else "",
        interval=(gain.interval.reason or interval_of(gain, digits)) if gain else "",
        p_value=(gain.test.reason or f"p {relation(gain.test.p_value)}") if gain else "",
        p_holm="" if gain is None or math.isnan(gain.p_holm) else f"Holm {relation(gain.p_holm)}",
        verdict=verdict(gain) if gain else "open",
    )


def empties(rows: Sequence[Summary]) -> list[tuple[str, str, dict[str, str]]]:
    """How often a region is empty, and what the networks make of it."""
    lines = []
    for region in dict.fromkeys(row.region for row in rows):
        chosen = [row for row in rows if row.region == region]
        first = chosen[0]
        by_role = {
            row.role: f"{row.false_alarms} predicted all the same, {row.missed} missed"
            for row in chosen
        }
        lines.append((region, f"{first.reference_empty} of {first.dice.n}", by_role))
    return lines
