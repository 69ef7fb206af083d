"""The tables of a study, as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from kdnet.results.significance import Interval
from kdnet.results.tables import SPACE_NAMES, format_number, format_p
from kdnet.results.text_table import TextTable
from kdnet.studies.analysis import Analysis
from kdnet.studies.cells import Cells
from kdnet.studies.gains import Comparison, NetworkDice
from kdnet.studies.lead import LeadAndGain, Slope

_TIMES = "\N{MULTIPLICATION SIGN}"
_UNITS = f"folds {_TIMES} seeds"
_DRAWN = "95 % intervals: bootstrap over cases and, in every fold, over seeds."


def all_tables(analysis: Analysis) -> list[TextTable]:
    """Make all tables of one space."""
    makers = (dice_table, gain_table, most_table, unit_table, slope_table, quartile_table)
    return [table for table in (make(analysis) for make in makers) if table.rows]


def dice_table(analysis: Analysis) -> TextTable:
    """Dice of every network and region."""
    note = (
        "± is the sd over cases; a case counts once, with the mean over its seeds; folds and seeds "
        f"are pooled. {_DRAWN} Steps: optimizer steps, mean over units."
    )
    return TextTable(
        title=f"Dice, {_where(analysis)}",
        columns=[
            *("trained on", "network", "region", "Dice", "95 % interval", _UNITS),
            *("steps", "cases"),
        ],
        rows=[_dice_line(analysis, one) for one in analysis.dice],
        notes=[note, *_reasons(one.interval for one in analysis.dice)],
        words=3,
    )


def gain_table(analysis: Analysis) -> TextTable:
    """Gain of every student over the reference with as many labels."""
    reference = analysis.facts.label(analysis.facts.reference)
    title = f"Gain in Dice over the {reference} with as many labels, {_where(analysis)}"
    return _gains(analysis, title, analysis.gains)


def most_table(analysis: Analysis) -> TextTable:
    """Gain of the students with fewer labels over the reference with most."""
    reference = analysis.facts.label(analysis.facts.reference)
    title = f"Gain in Dice over the {reference} with most labels, {_where(analysis)}"
    return _gains(analysis, title, analysis.over_most)


def unit_table(analysis: Analysis) -> TextTable:
    """Gain of every fold and seed, beside the teacher's lead."""
    seeds = sorted({seed for one in analysis.gains for seed in one.cells.seeds})
    leads = {id(one.comparison): one.lead for one in analysis.leads}
    rows = [
        line
        for one in analysis.gains
        for line in _unit_lines(analysis, one, leads.get(id(one)), seeds)
    ]
    columns = ["trained on", "network", "region", "fold", *(f"seed {seed}" for seed in seeds)]
    note = (
        "Units of one fold share held-out cases and teacher, so that their gains are alike: they "
        "are not studies of their own. Mean and lead: a case counts once."
    )
    return TextTable(
        title=f"Gain in Dice per fold and seed, {_where(analysis)}",
        columns=[*columns, "mean", "teacher's lead"],
        rows=rows,
        notes=[note],
        words=4,
    )


def slope_table(analysis: Analysis) -> TextTable:
    """Rise of the gain with the teacher's lead."""
    reference = analysis.facts.label(analysis.facts.reference)
    note = (
        f"Slope: gain per unit of the teacher's lead, over cases. From both the {reference} is "
        "taken away, so that its luck alone gives a positive slope. Other seeds: the lead is that "
        f"over the {reference} of the other seeds, which takes the luck of a training out, not "
        f"what makes a case easy for all of them. {_DRAWN}"
    )
    slopes = [slope.interval for one in analysis.leads for slope in (one.slope, one.apart)]
    return TextTable(
        title=f"Gain against the teacher's lead, {_where(analysis)}",
        columns=[
            *("trained on", "network", "region", "lead", "gain", "slope (95 % interval)"),
            *("slope, other seeds (95 % interval)", "cases"),
        ],
        rows=[_slope_line(analysis, one) for one in analysis.leads],
        notes=[note, *_reasons(slopes)],
        words=3,
    )


def quartile_table(analysis: Analysis) -> TextTable:
    """Gain per quarter of the cases, by the teacher's lead."""
    rows = [line for one in analysis.leads for line in _quartile_lines(analysis, one)]
    quartiles = [quartile for one in analysis.leads for quartile in one.quartiles]
    return TextTable(
        title=f"Gain in Dice per quarter of the teacher's lead, {_where(analysis)}",
        columns=["trained on", "network", "region", "lead", "gain", "95 % interval", "cases"],
        rows=rows,
        notes=[
            f"Quarters of the cases by lead, lowest first. {_DRAWN}",
            *_reasons(quartile.interval for quartile in quartiles),
        ],
        words=3,
    )


def format_gain(cells: Cells, interval: Interval) -> str:
    """A mean gain with its interval, as sentences and tables show it."""
    return f"{format_number(cells.mean, signed=True)} ({_ends(interval, signed=True)})"


def _gains(analysis: Analysis, title: str, comparisons: Sequence[Comparison]) -> TextTable:
    note = (
        "Paired by fold, seed, case and region. p: Wilcoxon's signed-rank test on the cases' means "
        f"over seeds; Holm: corrected over the {len(comparisons)} lines of this table. Better, "
        "worse: cases whose mean over seeds rises, falls. Steps: the student's optimizer steps "
        f"relative to those it is compared with. {_DRAWN}"
    )
    notes = [
        note,
        *_seed_note(comparisons),
        *_reasons(one.interval for one in comparisons),
        *dict.fromkeys(f"No p: {one.test.reason}." for one in comparisons if one.test.reason),
    ]
    return TextTable(
        title=title,
        columns=[
            *("trained on", "network", "region", "gain (95 % interval)", "p", "Holm"),
            *("better / worse", "share better", _UNITS, "pairs", "cases", "steps"),
        ],
        rows=[_gain_line(analysis, one) for one in comparisons],
        notes=notes,
        words=3,
    )


def _dice_line(analysis: Analysis, one: NetworkDice) -> list[str]:
    cells = one.cells
    return [
        one.network.setting,
        analysis.name(one.network),
        one.region,
        f"{format_number(cells.mean)} ± {format_number(cells.sd)}",
        _ends(one.interval),
        _units(cells),
        f"{one.network.steps:.0f}",
        str(len(cells.cases)),
    ]


def _gain_line(analysis: Analysis, one: Comparison) -> list[str]:
    steps = format_number(one.steps, 2)
    return [
        one.network.setting,
        analysis.name(one.network),
        one.region,
        format_gain(one.cells, one.interval),
        format_p(one.test.p_value),
        format_p(one.corrected),
        f"{one.wins} / {one.losses}",
        f"{100 * one.improved:.0f} %",
        _units(one.cells),
        str(len(one.cells.found())),
        str(len(one.cells.cases)),
        steps if math.isnan(one.steps) else f"{_TIMES} {steps}",
    ]


def _unit_lines(
    analysis: Analysis, one: Comparison, lead: Cells | None, seeds: Sequence[int]
) -> list[list[str]]:
    means = one.cells.unit_means
    lines = []
    for fold in one.cells.folds:
        gains = [means.get((fold, seed), math.nan) for seed in seeds]
        shown = [*gains, _of_fold(one.cells, fold).mean]
        lines.append(
            [
                one.network.setting,
                analysis.name(one.network),
                one.region,
                str(fold),
                *(format_number(gain, signed=True) for gain in shown),
                format_number(math.nan if lead is None else _of_fold(lead, fold).mean, signed=True),
            ]
        )
    return lines


def _slope_line(analysis: Analysis, one: LeadAndGain) -> list[str]:
    network = one.comparison.network
    return [
        network.setting,
        analysis.name(network),
        one.comparison.region,
        format_number(one.lead.mean, signed=True),
        format_number(one.gain.mean, signed=True),
        _slope(one.slope),
        _slope(one.apart),
        str(len(one.gain.cases)),
    ]


def _quartile_lines(analysis: Analysis, one: LeadAndGain) -> list[list[str]]:
    network = one.comparison.network
    return [
        [
            network.setting,
            analysis.name(network),
            one.comparison.region,
            _between(quartile.lowest, quartile.highest, signed=True),
            format_number(quartile.gain.mean, signed=True),
            _ends(quartile.interval, signed=True),
            str(len(quartile.gain.cases)),
        ]
        for quartile in one.quartiles
    ]


def _slope(slope: Slope) -> str:
    ends = slope.interval
    shown = f"{format_number(ends.lower, 2)} to {format_number(ends.upper, 2)}"
    return f"{format_number(slope.value, 2)} ({shown if ends.reason is None else 'none'})"


def _of_fold(cells: Cells, fold: int) -> Cells:
    return Cells.of({at: value for at, value in cells.found().items() if at[1][0] == fold})


def _ends(interval: Interval, *, signed: bool = False) -> str:
    if interval.reason is not None:
        return "none"
    return _between(interval.lower, interval.upper, signed=signed)


def _between(lower: float, upper: float, *, signed: bool) -> str:
    return " to ".join(format_number(end, signed=signed) for end in (lower, upper))


def _units(cells: Cells) -> str:
    """Folds times seeds, or the number of units where not all are there."""
    full = f"{len(cells.folds)} {_TIMES} {len(cells.seeds)}"
    count = len(cells.units)
    return full if count == len(cells.folds) * len(cells.seeds) else f"{count} of {full}"


def _seed_note(comparisons: Sequence[Comparison]) -> list[str]:
    if any(len(one.cells.seeds) == 1 for one in comparisons):
        return ["Where there is one seed, the interval holds the choice of cases alone."]
    return []


def _reasons(intervals: Iterable[Interval]) -> list[str]:
    return [
        f"No interval: {reason}."
        for reason in dict.fromkeys(interval.reason for interval in intervals)
        if reason
    ]


def _where(analysis: Analysis) -> str:
    where = SPACE_NAMES[analysis.pairing.space]
    return where + ", PHANTOM" * analysis.facts.phantom
