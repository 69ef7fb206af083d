"""Every network in one space: what a reviewer asks of a table of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdnet.evaluation.scoring import Postprocessing, Score, Space
from kdnet.results.tables import (
    POSTPROCESSING_NAMES,
    SPACE_NAMES,
    Moments,
    Summary,
    format_number,
    summarise,
)
from kdnet.results.text_table import TextTable

_COLUMNS = [
    *("network", "region", "Dice", "median (quartiles)", "95 % interval", "sd of folds"),
    *("sd of seeds", "Dice, reference present (n)", "HD95", "surface Dice", "n"),
]


def results_table(
    scores: Sequence[Score],
    *,
    space: Space,
    postprocessing: Postprocessing = "off",
    labels: Mapping[str, str] | None = None,
) -> TextTable:
    """Mean, spread and intervals of every network and region."""
    rows = [row for row in summarise(scores, postprocessing=postprocessing) if row.space == space]
    order = list(dict.fromkeys(score.role for score in scores))
    rows = sorted(rows, key=lambda row: order.index(row.role))
    where = f"{SPACE_NAMES[space]}, {POSTPROCESSING_NAMES[postprocessing]}"
    return TextTable(
        title=f"Results, {where}",
        columns=[*_COLUMNS],
        rows=[_line((labels or {}).get(row.role) or row.role, row) for row in rows],
        notes=[_note(rows)] if rows else [],
        words=2,
    )


def _line(label: str, row: Summary) -> list[str]:
    dice, interval = row.dice, row.dice.interval
    ends = f"{format_number(interval.lower)} to {format_number(interval.upper)}"
    quartiles = f"{format_number(dice.lower_quartile)} to {format_number(dice.upper_quartile)}"
    present = row.dice_reference_present
    return [
        label,
        row.region,
        _mean_sd(dice),
        f"{format_number(dice.median)} ({quartiles})",
        ends if interval.reason is None else "too few cases",
        format_number(dice.folds_sd),
        format_number(dice.seeds_sd),
        f"{_mean_sd(present)} ({present.n})",
        f"{_mean_sd(row.hd95, 1)} {row.hd95_unit}",
        _mean_sd(row.nsd),
        str(dice.n),
    ]


def _mean_sd(moments: Moments, digits: int = 3) -> str:
    return f"{format_number(moments.mean, digits)} ± {format_number(moments.sd, digits)}"


def _note(rows: Sequence[Summary]) -> str:
    empties = {row.region: row.reference_empty for row in rows}
    alarms = [f"{row.role} {row.region} {row.false_alarms}" for row in rows if row.false_alarms]
    listed = ", ".join(f"{region} {count}" for region, count in empties.items())
    return (
        "± is the sd over cases. Both masks empty: Dice and surface Dice 1, HD95 0; exactly one "
        "empty: Dice and surface Dice 0, HD95 the diagonal of the image. Surface Dice at 1 mm. "
        f"Cases with an empty reference: {listed}."
        + f" Predicted all the same: {', '.join(alarms)}."
        * bool(alarms)
    )
