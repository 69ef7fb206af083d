"""What the folder of a plan holds, whatever its command: read from its files alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from kdnet.data.description import Description, load_description
from kdnet.errors import UserError
from kdnet.evaluation.scoring import COLUMNS, read_scores, read_table
from kdnet.files import UnreadableError, is_name, read_yaml
from kdnet.training.history import read_history

PLAN, ROWS, FACTS = "plan.json", "rows.csv", "study.json"
TEACHER = "teacher"

#: The columns of rows.csv, the published rows of a study, that scores.csv does not have.
_KEPT = {"kind": "name", "steps": "count", "study": "name"}
_OF_ROWS = ("row", "labelled", "unlabelled", "fold", "seed", "case", "region", "space", "dice")
_OF_A_ROW = ("kind", "label", "role", "teacher", "against")
_TEXTS = ("kind", "title", "name", "dataset", "protocol", "reference")
_FORMS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(_TEXTS, str),
    "labels": dict,
    "chosen": (str, dict),
    "phantom": bool,
    "commands": list,
    "rows": list,
}


@dataclass(frozen=True)
class Results:
    """A folder of results.

    Attributes:
        root: The folder.
        facts: What plan.json says, or study.json.
        rows: Name to the fields of its row, in the order of the tables.
        scores: The long table, in the order of `rows`; those of a study have `kind` and `steps`.
    """

    root: Path
    facts: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]
    scores: pd.DataFrame = field(repr=False)

    @property
    def is_study(self) -> bool:
        """Whether recipes are compared over numbers of labels."""
        return "kind" in self.scores

    @cached_property
    def description(self) -> Description | None:
        """The data set, as it was described when the run began."""
        path = self.root / "description.json"
        return load_description(path) if path.is_file() else None

    @property
    def title(self) -> str:
        """Of the page."""
        return str(self.facts.get("title") or self.facts.get("name") or self.root.resolve().name)

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        named = self.description.name if self.description else "unknown data set"
        return str(self.facts.get("dataset") or named)

    @property
    def phantom(self) -> bool:
        """Whether the subjects are synthetic."""
        return bool(self.facts.get("phantom") or (self.description and self.description.phantom))

    @property
    def protocol(self) -> str:
        """How all rows were trained, one line."""
        return str(self.facts.get("protocol", ""))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration that all rows share."""
        return read_mapping(self.root / "config.yaml")

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
        """The row of interest: the taught one with the fewest options of its own; may be empty."""
        compared = {*self.scores["row"][self.scores["against"] != ""]}
        names = [row for row in self.rows if row in compared and self.role(row) != TEACHER]
        taught = [row for row in names if self.rows[row].get("teacher")]

        def options(row: str) -> int:
            return len(self.rows[row].get("options") or {})

        return min(taught or names, key=options, default="")

    @cached_property
    def baseline(self) -> str:
        """What the row of interest is compared with; may be empty."""
        against = self.scores["against"][self.scores["row"] == self.student]
        return str(against.iloc[0]) if len(against) else ""

    def role(self, row: str) -> str:
        """Whose modalities a row has: teacher or student."""
        return str(self.rows[row].get("role", "student")) if row in self.rows else ""

    def label(self, row: str) -> str:
        """How tables call a row."""
        return str(self.rows.get(row, {}).get("label") or row)

    def units(self, row: str | None = None) -> Iterator[Path]:
        """Folders of trained units, in the order of the tables."""
        for name in self.rows if row is None else [row]:
            yield from sorted((self.root / "units" / name).glob("fold*-seed*"), key=_numbers)


def read_folder(root: Path) -> Results:
    """Read the folder of a plan, or the published rows of a study."""
    if (root / ROWS).is_file():
        return _published_study(root)
    if not (root / PLAN).is_file():
        raise UserError(
            f"{root}: expected the folder of a run, a cross-validation or a study, found neither "
            f"{PLAN} nor {ROWS} in it. Give the folder that was written to (--out)."
        )
    facts = _facts(root / PLAN, "rows")
    rows = {row["name"]: row for row in _rows(root / PLAN, facts["rows"])}
    scores = read_scores(root / "scores.csv")
    scores = scores[scores["row"].isin(rows) & (scores["row"] != scores["against"])]
    views = scores.groupby("row")["modalities"].nunique()
    if (views > 1).any():
        raise UserError(
            f"{root / 'scores.csv'}: {views.idxmax()} has scores for several subsets of its "
            "modalities; expected those of one, and the others in subsets.csv."
        )
    if facts.get("kind") == "study":
        # Rows without a kind are teachers that only teach.
        kinds = {row: fields["kind"] for row, fields in rows.items() if fields.get("kind")}
        scores = scores[scores["row"].isin(kinds)]
        scores = scores.assign(kind=scores["row"].map(kinds), steps=_steps(root, scores))
        return _study(root, facts, rows, scores)
    order = scores["row"].map({row: place for place, row in enumerate(rows)})
    return Results(root, facts, rows, scores.iloc[order.argsort(kind="stable")])


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file with keys and values; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        content = read_yaml(path)
    except UnreadableError as error:
        raise UserError(f"{path}: expected YAML or JSON, which it is not ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, found {type(content).__name__}.")
    return content


def _published_study(root: Path) -> Results:
    """Read rows.csv and study.json, in which rows are compared by kind and number of labels."""
    facts = _facts(root / FACTS, "name", "dataset", "protocol", "labels")
    columns = {name: COLUMNS[name] for name in _OF_ROWS} | _KEPT
    place = ("row", "fold", "seed", "case", "region", "space")
    scores = read_table(root / ROWS, columns, place).sort_values([*place])
    names = {*scores["study"]} - {facts["name"]}
    if names:
        raise UserError(f"{root / ROWS}: expected rows of {facts['name']}, found {sorted(names)}.")
    first = scores.drop_duplicates("row").set_index("row")
    by_labels: dict[tuple[str, int], str] = {}
    for line in scores.drop_duplicates(["row", "labelled"]).itertuples():
        known = by_labels.setdefault((line.kind, line.labelled), line.row)
        if line.kind in {TEACHER, _reference(facts)} and known != line.row:
            raise UserError(
                f"{root / ROWS}: {known} and {line.row} are both of the kind {line.kind} with "
                f"{line.labelled} labelled subjects; expected one."
            )
    rows = {}
    for row, line in first.iterrows():
        teacher = by_labels.get((TEACHER, line["labelled"]), "")
        against = by_labels.get((_reference(facts), line["labelled"]), "")
        student = line["kind"] not in {TEACHER, _reference(facts)}
        rows[str(row)] = {
            "kind": line["kind"],
            "role": TEACHER if line["kind"] == TEACHER else "student",
            "teacher": teacher * student,
            "against": against * student,
        }
    against = scores["row"].map({row: fields["against"] for row, fields in rows.items()})
    more = {"postprocessing": "off", "modalities": "", "reference_voxels": math.nan}
    return _study(root, facts, rows, scores.assign(against=against, **more))


def _study(
    root: Path, facts: dict[str, Any], rows: dict[str, Any], scores: pd.DataFrame
) -> Results:
    """Order the rows of a study by subjects and kind; unlabelled ones are for students alone."""
    alone = [row for row, fields in rows.items() if not fields.get("teacher")]
    scores = scores.assign(unlabelled=scores["unlabelled"].where(~scores["row"].isin(alone), 0))
    kinds = [*facts.get("labels", {})]

    def rank(row: str) -> tuple[object, ...]:
        own, kind = scores[scores["row"] == row], rows[row].get("kind") or row
        spans = [(own[column].min(), own[column].max()) for column in ("labelled", "unlabelled")]
        group = {_reference(facts): 0, TEACHER: 2}.get(kind, 1)
        return (*spans, group, kinds.index(kind) if kind in kinds else len(kinds), kind, row)

    order = {row: place for place, row in enumerate(sorted(scores["row"].unique(), key=rank))}
    scores = scores.assign(place=scores["row"].map(order))
    scores = scores.sort_values(["place", "region", "fold", "seed", "case"], kind="stable")
    named = {row: {"name": row} | rows[row] for row in order}
    for fields in named.values():
        fields["label"] = facts.get("labels", {}).get(fields.get("kind")) or fields.get("kind")
    return Results(root, facts, named, scores.drop(columns="place"))


def _steps(root: Path, scores: pd.DataFrame) -> pd.Series[Any]:
    """Optimizer steps of the unit of every line, as its history says."""
    found: dict[tuple[str, int, int], float] = {}
    units = scores[["row", "fold", "seed"]].drop_duplicates()
    for row, fold, seed in units.itertuples(index=False):
        history = read_history(root / "units" / row / f"fold{fold}-seed{seed}" / "history.csv")
        found[row, fold, seed] = history[-1].get("step", math.nan) if history else math.nan
    places = zip(scores["row"], scores["fold"], scores["seed"], strict=True)
    return pd.Series([found[place] for place in places], index=scores.index)


def _reference(facts: Mapping[str, Any]) -> str:
    """The kind that the gains of a study are measured against."""
    return str(facts.get("reference", "baseline"))


def _facts(path: Path, *needed: str) -> dict[str, Any]:
    facts = read_mapping(path)
    missing = [name for name in needed if name not in facts]
    wrong = [k for k, form in _FORMS.items() if k in facts and not isinstance(facts[k], form)]
    if missing or wrong:
        raise UserError(
            f"{path}: expected {', '.join([*missing, *wrong])} of another form, or at all. Restore "
            "it from a copy, or give the command of the run again."
        )
    return facts


def _rows(path: Path, rows: list[Any]) -> list[dict[str, Any]]:
    """Names of rows become folders; what they say of each other are texts."""
    for row in rows:
        fits = isinstance(row, dict) and is_name(row.get("name"))
        fits = fits and isinstance(row.get("options") or {}, dict)
        if not fits or not all(isinstance(row.get(text) or "", str) for text in _OF_A_ROW):
            raise UserError(
                f"{path}: rows must have names that can name a folder, options, and texts for "
                f"{', '.join(_OF_A_ROW)}."
            )
    return rows


def _numbers(unit: Path) -> list[int]:
    """Seed and fold of a unit's folder, for their order."""
    fold, _, seed = unit.name.removeprefix("fold").partition("-seed")
    return [int(n) if n.isdecimal() else 0 for n in (seed, fold)]
