"""The tables of a study: recipes, tried with several numbers of labelled subjects."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdnet.errors import UserError
from kdnet.files import UnreadableError, read_json
from kdnet.results.stats import (
    Gain,
    Interval,
    cells,
    gains,
    interval,
    lead,
    over_most_labels,
    slope,
)
from kdnet.results.stored import Results
from kdnet.results.tables import SPACES, Table, ends, number, p_value, spread

_TIMES = "\N{MULTIPLICATION SIGN}"
_NETWORK = ("trained on", "network", "region")
_DRAWN = "95 % intervals: bootstrap over cases and, in every fold, over seeds."
_QUARTERS = 4


@dataclass(frozen=True)
class Study:
    """All that is worked out from a study's scores in one space.

    Attributes:
        results: The study.
        space: "native" or "grid".
    """

    results: Results
    space: str

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Lines of this space, without post-processing."""
        scores = self.results.scores
        return scores[(scores["space"] == self.space) & (scores["postprocessing"] == "off")]

    @cached_property
    def gains(self) -> list[Gain]:
        """Of all students, over the baseline with as many labels."""
        return gains(self._students, together=True)

    @cached_property
    def over_most(self) -> list[Gain]:
        """Of the students with fewer labels, over the baseline with most."""
        return gains(over_most_labels(self._students), together=True)

    @cached_property
    def leads(self) -> dict[tuple[str, str], pd.DataFrame]:
        """Lead of the teacher by row and region, in the cells of the gain; those that have one."""
        found = {(g.row, g.region): lead(self.scores, g, self.teacher(g.row)) for g in self.gains}
        return {place: values for place, values in found.items() if not values.empty}

    @property
    def reference(self) -> str:
        """How tables call what gains are measured against."""
        kind = str(self.results.facts.get("reference", "baseline"))
        return str(self.results.facts.get("labels", {}).get(kind) or kind)

    @property
    def where(self) -> str:
        """The space, and a warning."""
        return SPACES[self.space] + ", PHANTOM" * self.results.phantom

    def of(self, row: str) -> pd.DataFrame:
        """Lines of a row."""
        return self.scores[self.scores["row"] == row]

    def teacher(self, row: str) -> str:
        """Name of the row that teaches a row; may be empty."""
        return str(self.results.rows[row].get("teacher") or "")

    def subjects(self, row: str) -> tuple[float, float]:
        """Labelled and unlabelled subjects, mean of fewest and most over the folds."""
        own = self.of(row)[["labelled", "unlabelled"]]
        labelled, unlabelled = (own.min() + own.max()) / 2
        return float(labelled), float(unlabelled)

    @cached_property
    def settings(self) -> dict[str, str]:
        """What every row was trained on, in words."""
        found = {}
        for row, own in self.scores.groupby("row"):
            more = f" + {_span(own['unlabelled'])} unlabelled" * bool(own["unlabelled"].max())
            found[str(row)] = f"{_span(own['labelled'])} labelled{more}"
        return found

    def is_chosen(self, row: str) -> bool:
        """Say whether a row is the chosen recipe of its setting."""
        chosen, kind = self.results.facts.get("chosen", "chosen"), self.kind(row)
        if isinstance(chosen, str):
            return kind == chosen
        return bool(kind == chosen.get(row.removesuffix(f"_{kind}")))

    def kind(self, row: str) -> str:
        """Which recipe, teacher or baseline a row is."""
        return str(self.results.rows[row].get("kind") or row)

    def head(self, row: str, region: str) -> list[str]:
        """First cells of a line."""
        return [self.settings[row], self.results.label(row), region]

    def is_student(self, row: str) -> bool:
        """Say whether a row is compared: neither a teacher nor what gains are measured against."""
        reference = self.results.facts.get("reference", "baseline")
        return self.results.role(row) != "teacher" and self.kind(row) != reference

    @property
    def _students(self) -> pd.DataFrame:
        others = [row for row in self.results.rows if not self.is_student(row)]
        against = self.scores["against"].where(~self.scores["row"].isin(others), "")
        return self.scores.assign(against=against)


def study_tables(study: Study) -> list[Table]:
    """All tables of one space."""
    made = [
        _dice(study),
        _gains(study, study.gains, "with as many labels"),
        _gains(study, study.over_most, "with most labels"),
        _units(study),
        _slopes(study),
        _quarters(study),
    ]
    return [table for table in made if len(table.frame)]


def outcomes(study: Study) -> list[str]:
    """What the chosen recipe gained, in a sentence for each setting and region."""
    return [
        f"{study.settings[gain.row]}, {gain.region}: {study.results.label(gain.row)} gains "
        f"{_gained(gain.mean, gain.interval)} over the {study.reference} {labels}; "
        f"{_better(gain)} of {len(gain.cells)} cases are better, {_better(gain, -1)} worse; "
        f"p after Holm {p_value(gain.p_holm)}."
        for found, labels in (
            (study.gains, "with as many labels"),
            (study.over_most, "with most labels"),
        )
        for gain in found
        if study.is_chosen(gain.row)
    ]


def unpaired(study: Study) -> list[str]:
    """What has no partner and is in no gain, a sentence for each unit."""
    sentences = []
    scored = study.scores.dropna(subset="dice")
    places = {
        unit: {*zip(part["case"], part["region"], strict=True)}
        for unit, part in scored.groupby(["row", "fold", "seed"])
    }
    for (row, fold, seed), own in places.items():
        if not study.is_student(row):
            continue
        against = str(study.results.rows[row].get("against") or "")
        other = places.get((against, fold, seed))
        where = f"{row}, fold {fold}, seed {seed}"
        if other is None:
            sentences.append(
                f"{where}: no {study.reference} with as many labelled subjects of this fold and "
                "seed; the unit has no pairs."
            )
            continue
        for name, missing in ((against, own - other), (row, other - own)):
            if missing:
                counts = sorted(Counter(region for _, region in missing).items())
                listed = ", ".join(f"{n} in {region}" for region, n in counts)
                example = min(missing)[0]
                sentences.append(f"{where}: {name} has no Dice of {listed}, such as {example}.")
    return sentences


def trials_table(folder: Path) -> Table:
    """What the trials of a search reached, the best first."""
    try:
        settings, trials = (read_json(folder / name) for name in ("search.json", "trials.json"))
        lines = [
            [
                _said(trial["options"]),
                str(trial["number"]),
                f"{trial['dice']:.3f}",
                f"{100 * trial['gain']:+.1f}".replace("-", "\N{MINUS SIGN}"),
            ]
            for trial in sorted(trials, key=lambda trial: (-trial["gain"], trial["number"]))
        ]
        labelled, shared = settings.get("labelled"), _said(settings.get("options", {}))
        seeds, folds = (", ".join(map(str, settings.get(name, ()))) for name in ("seeds", "folds"))
    except (UnreadableError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder}: search.json and trials.json are not those of a search ({error}). Fetch "
            "them again, or remove the folder."
        ) from error
    note = (
        f"Labelled subjects: {labelled}; seeds {seeds}; training subjects of fold {folds}, split "
        "once more. Gain: in points, over the baseline of the same subjects, seed and steps. All "
        f"trials: {shared or 'no options'}."
    )
    title = f"Trials of the search {folder.name.removeprefix('search-')}, training grid"
    return Table.of(title, ["options", "trial", "Dice", "gain"], lines, [note])


def _dice(study: Study) -> Table:
    lines, intervals = [], []
    for (row, region), own in study.scores.groupby(["row", "region"], sort=False):
        values = cells(own)
        if values.empty:
            continue
        means, found = values.mean(axis=1), interval(values)
        intervals.append(found)
        steps = own.drop_duplicates(["fold", "seed"])["steps"].mean()
        lines.append(
            [
                *study.head(row, region),
                spread(means.mean(), means.std()),
                ends(found),
                _folds_and_seeds(values),
                number(steps, 0),
                str(len(values)),
            ]
        )
    columns = [*_NETWORK, "Dice", "95 % interval", f"folds {_TIMES} seeds", "steps", "cases"]
    note = (
        "± is the sd over cases; a case counts once, with the mean over its seeds; folds and seeds "
        f"are pooled. {_DRAWN} Steps: optimizer steps, mean over units."
    )
    title = f"Dice, {study.where}"
    return Table.of(title, columns, lines, [note, *_reasons(intervals)], words=3)


def _gains(study: Study, found: Sequence[Gain], labels: str) -> Table:
    lines = [
        [
            *study.head(gain.row, gain.region),
            _gained(gain.mean, gain.interval),
            p_value(gain.p),
            p_value(gain.p_holm),
            f"{_better(gain)} / {_better(gain, -1)}",
            f"{100 * _better(gain) / len(gain.cells):.0f} %",
            _folds_and_seeds(gain.cells),
            str(int(gain.cells.count().sum())),
            str(len(gain.cells)),
            f"{_TIMES} {number(gain.steps, 2)}" if gain.steps > 0 else number(math.nan),
        ]
        for gain in found
    ]
    columns = [*_NETWORK, "gain (95 % interval)", "p", "Holm", "better / worse", "share better"]
    columns += [f"folds {_TIMES} seeds", "pairs", "cases", "steps"]
    note = (
        "Paired by fold, seed, case and region. p: Wilcoxon's signed-rank test on the cases' means "
        f"over seeds; Holm: corrected over the {len(found)} lines of this table. Better, worse: "
        "cases whose mean over seeds rises, falls. Steps: the student's optimizer steps relative "
        f"to those it is compared with. {_DRAWN}"
    )
    notes = [note]
    if any(len({seed for _, seed in gain.cells.columns}) == 1 for gain in found):
        notes.append("Where there is one seed, the interval holds the choice of cases alone.")
    notes += _reasons(gain.interval for gain in found)
    notes += dict.fromkeys(f"No p: {gain.reason}." for gain in found if gain.reason)
    title = f"Gain in Dice over the {study.reference} {labels}, {study.where}"
    return Table.of(title, columns, lines, notes, words=3)


def _units(study: Study) -> Table:
    seeds = sorted({seed for gain in study.gains for _, seed in gain.cells.columns})
    lines = []
    for gain in study.gains:
        leads = study.leads.get((gain.row, gain.region))
        ahead = {} if leads is None else leads.T.groupby(level="fold").mean().mean(axis=1)
        for fold, own in gain.cells.T.groupby(level="fold"):
            by_seed = own.droplevel("fold").T
            lines.append(
                [
                    *study.head(gain.row, gain.region),
                    str(fold),
                    *(
                        number(by_seed[s].mean() if s in by_seed else math.nan, signed="+")
                        for s in seeds
                    ),
                    number(own.mean().mean(), signed="+"),
                    number(ahead.get(fold, math.nan), signed="+"),
                ]
            )
    columns = [*_NETWORK, "fold", *(f"seed {seed}" for seed in seeds), "mean", "teacher's lead"]
    note = (
        "Units of one fold share held-out cases and teacher, so that their gains are alike: they "
        "are not studies of their own. Mean and lead: a case counts once."
    )
    title = f"Gain in Dice per fold and seed, {study.where}"
    return Table.of(title, columns, lines, [note], words=4)


def _slopes(study: Study) -> Table:
    lines, intervals = [], []
    for gain in study.gains:
        leads = study.leads.get((gain.row, gain.region))
        if leads is None:
            continue
        apart = lead(study.scores, gain, study.teacher(gain.row), other_seeds=True)
        both = [slope(values, _same(gain.cells, values)) for values in (leads, apart)]
        intervals += [found for _, found in both]
        here = _same(gain.cells, leads).mean(axis=1)
        lines.append(
            [
                *study.head(gain.row, gain.region),
                number(leads.mean(axis=1).mean(), signed="+"),
                number(here.mean(), signed="+"),
                *(f"{number(value, 2)} ({ends(found, 2)})" for value, found in both),
                str(len(here)),
            ]
        )
    columns = [*_NETWORK, "lead", "gain", "slope (95 % interval)"]
    columns += ["slope, other seeds (95 % interval)", "cases"]
    note = (
        f"Slope: gain per unit of the teacher's lead, over cases. From both the {study.reference} "
        "is taken away, so that its luck alone gives a positive slope. Other seeds: the lead is "
        f"that over the {study.reference} of the other seeds, which takes the luck of a training "
        f"out, not what makes a case easy for all of them. {_DRAWN}"
    )
    title = f"Gain against the teacher's lead, {study.where}"
    return Table.of(title, columns, lines, [note, *_reasons(intervals)], words=3)


def _quarters(study: Study) -> Table:
    lines, intervals = [], []
    for gain in study.gains:
        leads = study.leads.get((gain.row, gain.region))
        if leads is None or len(leads) < _QUARTERS:
            continue
        means, here = leads.mean(axis=1), _same(gain.cells, leads)
        # Cases are sorted by name, so that equal leads are dealt the same way each time.
        for part in np.array_split(np.argsort(means.to_numpy(), kind="stable"), _QUARTERS):
            own = here.iloc[np.sort(part)].dropna(how="all", axis=1)
            found = interval(own)
            intervals.append(found)
            lowest, highest = (number(means.iloc[part[end]], signed="+") for end in (0, -1))
            lines.append(
                [
                    *study.head(gain.row, gain.region),
                    f"{lowest} to {highest}",
                    number(own.mean(axis=1).mean(), signed="+"),
                    ends(found, signed="+"),
                    str(len(own)),
                ]
            )
    columns = [*_NETWORK, "lead", "gain", "95 % interval", "cases"]
    notes = [f"Quarters of the cases by lead, lowest first. {_DRAWN}", *_reasons(intervals)]
    title = f"Gain in Dice per quarter of the teacher's lead, {study.where}"
    return Table.of(title, columns, lines, notes, words=3)


def _same(values: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Values in the cells that another table has."""
    return values.reindex(index=other.index, columns=other.columns).where(other.notna())


def _better(gain: Gain, sign: int = 1) -> int:
    """Cases that gain in the mean over units, or lose."""
    return int((sign * gain.means > 0).sum())


def _gained(mean: float, found: Interval) -> str:
    return f"{number(mean, signed='+')} ({ends(found, signed='+')})"


def _folds_and_seeds(values: pd.DataFrame) -> str:
    """Folds times seeds, or the number of units where not all are there."""
    folds, seeds = ({*values.columns.get_level_values(level)} for level in (0, 1))
    full = f"{len(folds)} {_TIMES} {len(seeds)}"
    count = values.shape[1]
    return full if count == len(folds) * len(seeds) else f"{count} of {full}"


def _reasons(intervals: Iterable[Interval]) -> list[str]:
    return [f"No interval: {r}." for r in dict.fromkeys(i.reason for i in intervals) if r]


def _span(values: pd.Series[Any]) -> str:
    low, high = values.min(), values.max()
    return str(low) if low == high else f"{low} to {high}"


def _said(options: dict[str, Any]) -> str:
    """Options in one line."""
    return ", ".join(f"{name} {'none' if v is None else v}" for name, v in options.items())
