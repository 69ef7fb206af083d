"""The tables of a study: recipes, tried with several numbers of labelled subjects."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from kdnet.config import in_words
from kdnet.errors import UserError
from kdnet.evaluation.scoring import scored_in
from kdnet.files import UnreadableError, read_json
from kdnet.results import stats
from kdnet.results.stats import Gain, Interval, cells, interval
from kdnet.results.stored import Results
from kdnet.results.tables import SPACES, Table, ends, number, p_value, spread

_TIMES = "\N{MULTIPLICATION SIGN}"
_DRAWN = "95 % intervals: bootstrap over patients and, in every fold, over seeds."
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
        return scored_in(self.results.scores, self.space)

    @cached_property
    def gains(self) -> list[Gain]:
        """Of all students, over the baseline with as many labels."""
        return stats.gains(self.scores, together=True)

    @cached_property
    def over_most(self) -> list[Gain]:
        """Of the students with fewer labels, over the baseline with most."""
        return stats.gains(stats.over_most_labels(self.scores), together=True)

    @cached_property
    def leads(self) -> dict[tuple[str, str], pd.DataFrame]:
        """Lead of the teacher by row and region, in the cells of the gain; those that have one."""
        pairs = [(g, stats.lead(self.scores, g, self.teacher(g.row))) for g in self.gains]
        return {(g.row, g.region): values for g, values in pairs if not values.empty}

    @cached_property
    def chosen(self) -> list[str]:
        """Rows that the study is about, if its file says so."""
        return [row for row in self.results.rows if row in self.results.facts.chosen]

    @property
    def reference(self) -> str:
        """How tables call what gains are measured against."""
        return self.results.label(self.gains[0].against) if self.gains else "baseline"

    @property
    def where(self) -> str:
        """The space, and a warning."""
        return SPACES[self.space] + ", PHANTOM" * self.results.facts.phantom

    @cached_property
    def spans(self) -> pd.DataFrame:
        """Fewest and most labelled and unlabelled subjects of every row, over the folds."""
        return self.scores.groupby("row")[["labelled", "unlabelled"]].agg(["min", "max"])

    def subjects(self, row: str) -> tuple[float, float]:
        """Labelled and unlabelled subjects, mean of fewest and most over the folds."""
        labelled, unlabelled = (self.spans.loc[row, n].mean() for n in ("labelled", "unlabelled"))
        return float(labelled), float(unlabelled)

    def setting(self, row: str) -> str:
        """What a row was trained on, in words."""
        labelled, unlabelled = (self.spans.loc[row, n] for n in ("labelled", "unlabelled"))
        more = f" + {_span(unlabelled)} unlabelled" * bool(unlabelled["max"])
        return f"{_span(labelled)} labelled{more}"

    def of(self, row: str) -> pd.DataFrame:
        """Lines of a row."""
        return self.scores[self.scores["row"] == row]

    def teacher(self, row: str) -> str:
        """Name of the row that teaches a row; may be empty."""
        return self.results.rows[row].teacher or ""

    def kind(self, row: str) -> str:
        """Which recipe, teacher or baseline a row is."""
        return self.results.rows[row].kind

    def head(self, row: str, region: str) -> dict[str, str]:
        """First cells of a line."""
        label = self.results.label(row)
        return {"trained on": self.setting(row), "network": label, "region": region}


def study_tables(study: Study) -> list[Table]:
    """All tables of one space."""
    return [
        _dice(study),
        _gains(study, study.gains, "with as many labels"),
        _gains(study, study.over_most, "with most labels"),
        _units(study),
        _slopes(study),
        _quarters(study),
    ]


def outcomes(study: Study) -> list[str]:
    """What the chosen recipe gained, in a sentence for each setting and region."""
    compared = [(gain, "with as many labels") for gain in study.gains]
    compared += [(gain, "with most labels") for gain in study.over_most]
    return [
        f"{study.setting(gain.row)}, {gain.region}: {study.results.label(gain.row)} gains "
        f"{_gained(gain.mean, gain.interval)} over the {study.reference} {labels}; "
        f"{gain.changed(1)} of {len(gain.cells)} cases are better, {gain.changed(-1)} worse; "
        f"p after Holm {p_value(gain.p_holm)}."
        for gain, labels in compared
        if gain.row in study.chosen
    ]


def unpaired(study: Study) -> list[str]:
    """What has no partner and is in no gain, a sentence for each unit and region."""
    scored = study.scores.dropna(subset="dice")
    place = ["fold", "seed", "case", "region"]
    others = scored[["row", *place]].rename(columns={"row": "against"})
    students = scored[scored["against"] != ""]
    lines = students.merge(others, how="left", on=["against", *place], indicator=True)
    alone = lines[lines["_merge"] == "left_only"]
    return [
        f"{row}, fold {fold}, seed {seed}: {len(own)} cases have no Dice of {region} by {against}, "
        f"such as {own['case'].min()}."
        for (row, against, fold, seed, region), own in alone.groupby(
            ["row", "against", "fold", "seed", "region"]
        )
    ]


def trials_table(folder: Path) -> Table:
    """What the trials of a search reached, the best first."""
    try:
        settings, trials = (read_json(folder / name) for name in ("search.json", "trials.json"))
        lines = [
            {
                "options": in_words(trial["options"]),
                "trial": str(trial["number"]),
                "Dice": number(trial["dice"]),
                "gain": f"{100 * trial['gain']:+.1f}".replace("-", "\N{MINUS SIGN}"),
            }
            for trial in trials
        ]
        labelled, shared = settings["labelled"], in_words(settings["options"]) or "no options"
        seeds, folds = (", ".join(map(str, settings[name])) for name in ("seeds", "folds"))
    except (UnreadableError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder}: search.json and trials.json are not those of a search ({error}). Fetch "
            "them again, or remove the folder."
        ) from error
    note = (
        f"Labelled subjects: {labelled}; seeds {seeds}; training subjects of fold {folds}, split "
        "once more. Gain: in points, over the baseline of the same subjects, seed and steps. All "
        f"trials: {shared}."
    )
    title = f"Trials of the search {folder.name.removeprefix('search-')}, training grid"
    return Table.of(title, lines, note)


def _dice(study: Study) -> Table:
    lines, intervals = [], []
    for (row, region), own in study.scores.groupby(["row", "region"], sort=False):
        values = cells(own)
        intervals.append(interval(values))
        lines.append(
            {
                **study.head(row, region),
                "Dice": spread(values.mean(axis=1)),
                "95 % interval": ends(intervals[-1]),
                f"folds {_TIMES} seeds": _folds_and_seeds(values),
                "steps": number(own.drop_duplicates(["fold", "seed"])["steps"].mean(), 0),
                "cases": str(len(values)),
            }
        )
    note = (
        "± is the sd over cases; a case counts once, with the mean over its seeds; folds and seeds "
        f"are pooled. {_DRAWN} Steps: optimizer steps, mean over units."
    )
    return Table.of(f"Dice, {study.where}", lines, note, *_reasons(intervals), words=3)


def _gains(study: Study, found: Sequence[Gain], labels: str) -> Table:
    lines = [
        {
            **study.head(gain.row, gain.region),
            "gain (95 % interval)": _gained(gain.mean, gain.interval),
            "p": p_value(gain.p),
            "Holm": p_value(gain.p_holm),
            "better / worse": f"{gain.changed(1)} / {gain.changed(-1)}",
            "share better": f"{100 * gain.changed(1) / len(gain.cells):.0f} %",
            f"folds {_TIMES} seeds": _folds_and_seeds(gain.cells),
            "pairs": str(int(gain.cells.count().sum())),
            "cases": str(len(gain.cells)),
            "steps": f"{_TIMES} {number(gain.steps, 2)}" if gain.steps > 0 else number(math.nan),
        }
        for gain in found
    ]
    first = (
        "Paired by fold, seed, case and region. p: Wilcoxon's signed-rank test on the patients' "
        f"means over seeds; Holm: corrected over the {len(found)} lines of this table. Better, "
        "worse: cases whose mean over seeds rises, falls. Steps: the student's optimizer steps "
        f"relative to those it is compared with. {_DRAWN} With one seed, they hold the choice of "
        "patients alone."
    )
    notes = [
        first,
        *_reasons(gain.interval for gain in found),
        *dict.fromkeys(f"No p: {gain.reason}." for gain in found if gain.reason),
    ]
    title = f"Gain in Dice over the {study.reference} {labels}, {study.where}"
    return Table.of(title, lines, *notes, words=3)


def _units(study: Study) -> Table:
    seeds = sorted({seed for gain in study.gains for _, seed in gain.cells.columns})
    lines = []
    for gain in study.gains:
        leads = study.leads.get((gain.row, gain.region), pd.DataFrame())
        ahead = {} if leads.empty else leads.T.groupby(level="fold").mean().mean(axis=1)
        for fold, own in gain.cells.T.groupby(level="fold"):
            means = own.droplevel("fold").mean(axis=1)
            line = study.head(gain.row, gain.region) | {"fold": str(fold)}
            for seed in seeds:
                line[f"seed {seed}"] = number(means.get(seed, math.nan), signed="+")
            line["mean"] = number(own.mean().mean(), signed="+")
            line["teacher's lead"] = number(ahead.get(fold, math.nan), signed="+")
            lines.append(line)
    note = (
        "Units of one fold share held-out cases and teacher, so that their gains are alike: they "
        "are not studies of their own. Mean and lead: a case counts once."
    )
    return Table.of(f"Gain in Dice per fold and seed, {study.where}", lines, note, words=4)


def _slopes(study: Study) -> Table:
    lines, intervals = [], []
    for gain, leads in _with_leads(study):
        apart = stats.lead(study.scores, gain, study.teacher(gain.row), other_seeds=True)
        both = [stats.slope(values, _same(gain.cells, values)) for values in (leads, apart)]
        intervals += [found for _, found in both]
        same, others = (f"{number(value, 2)} ({ends(found, 2)})" for value, found in both)
        lines.append(
            {
                **study.head(gain.row, gain.region),
                "lead": number(leads.mean(axis=1).mean(), signed="+"),
                "gain": number(_same(gain.cells, leads).mean(axis=1).mean(), signed="+"),
                "slope (95 % interval)": same,
                "slope, other seeds (95 % interval)": others,
                "cases": str(len(leads)),
            }
        )
    note = (
        f"Slope: gain per unit of the teacher's lead, over cases. From both the {study.reference} "
        "is taken away, so that its luck alone gives a positive slope. Other seeds: the lead is "
        f"that over the {study.reference} of the other seeds, which takes the luck of a training "
        f"out, not what makes a case easy for all of them. {_DRAWN}"
    )
    title = f"Gain against the teacher's lead, {study.where}"
    return Table.of(title, lines, note, *_reasons(intervals), words=3)


def _quarters(study: Study) -> Table:
    lines, intervals = [], []
    for gain, leads in _with_leads(study):
        means, here = leads.mean(axis=1), _same(gain.cells, leads)
        # Cases are sorted by name, so that equal leads are dealt the same way each time.
        order = np.argsort(means.to_numpy(), kind="stable")
        for part in np.array_split(order, _QUARTERS) if len(leads) >= _QUARTERS else ():
            own = here.iloc[np.sort(part)].dropna(how="all", axis=1)
            intervals.append(interval(own))
            lowest, highest = (number(means.iloc[part[end]], signed="+") for end in (0, -1))
            lines.append(
                {
                    **study.head(gain.row, gain.region),
                    "lead": f"{lowest} to {highest}",
                    "gain": number(own.mean(axis=1).mean(), signed="+"),
                    "95 % interval": ends(intervals[-1], signed="+"),
                    "cases": str(len(own)),
                }
            )
    note = f"Quarters of the cases by lead, lowest first. {_DRAWN}"
    title = f"Gain in Dice per quarter of the teacher's lead, {study.where}"
    return Table.of(title, lines, note, *_reasons(intervals), words=3)


def _with_leads(study: Study) -> list[tuple[Gain, pd.DataFrame]]:
    """Gains of rows whose teacher was scored, and the teacher's lead in their cells."""
    places = [(gain, (gain.row, gain.region)) for gain in study.gains]
    return [(gain, study.leads[place]) for gain, place in places if place in study.leads]


def _same(values: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Values in the cells that another table has."""
    return values.reindex(index=other.index, columns=other.columns).where(other.notna())


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


def _span(ends: pd.Series[int]) -> str:
    low, high = ends["min"], ends["max"]
    return str(low) if low == high else f"{low} to {high}"
