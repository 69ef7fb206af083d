"""What the folder of a plan holds, whatever its command: read from its files alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from kdnet.config import in_words
from kdnet.data.description import Description, load_description
from kdnet.data.subjects import patient_of
from kdnet.errors import UserError
from kdnet.evaluation.scoring import COLUMNS, read_scores, read_table
from kdnet.files import read_mapping
from kdnet.rows import Row
from kdnet.runs.folder import Facts, Folder
from kdnet.training.history import read_history

PLAN, ROWS = "plan.json", "rows.csv"

#: Columns of rows.csv, the published scores of a study, by which its lines differ.
_PLACE = ("row", "labelled", "unlabelled", "fold", "seed", "case", "region", "space")


@dataclass(frozen=True)
class Results:
    """A folder of results.

    Attributes:
        root: The folder.
        facts: What plan.json says.
        rows: By name, in the order of the tables.
        scores: The long table, and the patient of every case; those of a study have `steps`.
        description: The data set, as it was described when the run began.
    """

    root: Path
    facts: Facts
    rows: Mapping[str, Row]
    scores: pd.DataFrame = field(repr=False)
    description: Description | None = None

    @property
    def own_options(self) -> list[str]:
        """What rows differ in from the protocol, a line each."""
        own = [row for row in self.rows.values() if row.options]
        return [*dict.fromkeys(f"{self.label(row.name)}: {in_words(row.options)}" for row in own)]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration that all rows share."""
        return optional_mapping(self.root / "config.yaml")

    @property
    def seen(self) -> list[str]:
        """Modalities of the student."""
        seen = self.config.get("student_modalities")
        return [str(name) for name in seen] if isinstance(seen, list) else []

    @cached_property
    def subsets(self) -> pd.DataFrame | None:
        """Scores of networks on every subset of the modalities, where there are any."""
        path = self.root / "subsets.csv"
        return read_scores(path) if path.is_file() else None

    @cached_property
    def student(self) -> str:
        """The row of interest: the distilled one of fewest own options; may be empty."""
        compared = {*self.scores["row"][self.scores["against"] != ""]}
        rows = [row for row in self.rows.values() if row.name in compared and row.role != "teacher"]
        distilled = [row for row in rows if row.teacher] or rows
        return min(distilled, key=lambda row: len(row.options)).name if distilled else ""

    @cached_property
    def baseline(self) -> str:
        """What the row of interest is compared with; may be empty."""
        against = self.scores["against"][self.scores["row"] == self.student]
        return str(against.iloc[0]) if len(against) else ""

    @property
    def teachers(self) -> list[str]:
        """Rows that see what the student does not."""
        return [name for name, row in self.rows.items() if row.role == "teacher"]

    def label(self, row: str) -> str:
        """How tables call a row."""
        return (row in self.rows and self.rows[row].label) or row

    def units(self, row: str) -> list[Path]:
        """Folders of the units of a row that are scored, in the order of their seeds."""
        own = self.scores[self.scores["row"] == row]
        places = own[["seed", "fold"]].drop_duplicates().sort_values(["seed", "fold"])
        folder = self.root / "units" / row
        return [folder / f"fold{fold}-seed{seed}" for seed, fold in places.itertuples(index=False)]


def read_folder(root: Path) -> Results:
    """Read the folder of a plan; scores of a study may be published without those of distances."""
    facts = Folder(root).read_plan()
    if facts is None:
        raise UserError(
            f"{root}: expected the folder of a run, a cross-validation or a study, found no {PLAN} "
            "in it. Give the folder that was written to (--out)."
        )
    rows = {row.name: row for row in facts.rows}
    path = root / "description.json"
    description = load_description(path) if path.is_file() else None
    published = (root / ROWS).is_file()
    if not (published or (root / "scores.csv").is_file()):
        raise UserError(
            f"{root}: the scores of its units have not been put together in scores.csv. Give the "
            "command that trained it once more, without --unit."
        )
    scores = _published(root / ROWS, rows) if published else read_scores(root / "scores.csv")
    scores = scores[scores["row"].isin(rows)]
    views = scores.groupby("row")["modalities"].nunique()
    if (views > 1).any():
        raise UserError(
            f"{root / 'scores.csv'}: {views.idxmax()} has scores for several subsets of its "
            "modalities; expected those of one, and the others in subsets.csv."
        )
    visits = description.visits if description else ""
    patients = {case: patient_of(case, visits) for case in scores["case"].unique()}
    scores = scores.assign(patient=scores["case"].map(patients))
    if facts.kind == "study":
        rows, scores = _of_study(rows, scores, facts.labels)
        scores = scores if published else scores.assign(steps=_steps(root, scores))
    order = {row: place for place, row in enumerate(rows)}
    scores = scores.sort_values("row", key=lambda names: names.map(order), kind="stable")
    return Results(root, facts, rows, scores, description)


def optional_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file of keys and values; empty if there is none."""
    return read_mapping(path) if path.is_file() else {}


def _published(path: Path, rows: Mapping[str, Row]) -> pd.DataFrame:
    """Read the Dice of every case; what rows are compared with is said by the plan."""
    columns = {name: COLUMNS[name] for name in (*_PLACE, "dice")} | {"steps": "count"}
    scores = read_table(path, columns, _PLACE)
    against = scores["row"].map({name: row.against or "" for name, row in rows.items()})
    scores = scores.assign(against=against, postprocessing="off", modalities="")
    return scores.assign(reference_voxels=math.nan)


def _of_study(
    rows: Mapping[str, Row], scores: pd.DataFrame, labels: Mapping[str, str]
) -> tuple[dict[str, Row], pd.DataFrame]:
    """Sort rows by their subjects, baseline first and teacher last; kinds have labels."""
    # Subjects without a reference are for those that have a teacher.
    taught = scores["row"].map({name: bool(row.teacher) for name, row in rows.items()})
    scores = scores.assign(unlabelled=scores["unlabelled"].where(taught, 0))
    spans = scores.groupby("row")[["labelled", "unlabelled"]].agg(["min", "max"])
    compared_with = {row.against for row in rows.values()}
    kinds = {kind: place for place, kind in enumerate(labels)}

    def rank(name: str) -> tuple[Any, ...]:
        row = rows[name]
        group = 0 if name in compared_with else 2 if row.role == "teacher" else 1
        return (*spans.loc[name], group, kinds.get(row.kind, len(kinds)), name)

    kept = [rows[name] for name in sorted(spans.index, key=rank)]
    found = {row.name: replace(row, label=labels.get(row.kind, row.kind)) for row in kept}
    return found, scores


def _steps(root: Path, scores: pd.DataFrame) -> pd.Series[Any]:
    """Optimizer steps of the unit of every line, as its history says."""
    folds, seeds = scores["fold"].astype(str), scores["seed"].astype(str)
    units = scores["row"] + "/fold" + folds + "-seed" + seeds
    histories = {
        unit: read_history(root / "units" / unit / "history.csv") for unit in units.unique()
    }
    last = {
        u: lines[-1].get("step", math.nan) if lines else math.nan for u, lines in histories.items()
    }
    return units.map(last)
