"""What a study stores: one row per case and unit in rows.csv."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kdnet.errors import UserError
from kdnet.files import write_text
from kdnet.studies.facts import FACTS, Facts, listed, read_facts

ROWS = "rows.csv"
SPACES = ("native", "grid")


@dataclass(frozen=True)
class StudyRow:
    """Dice of one network on one held-out case.

    Attributes:
        study: Name of the study.
        row: Full name of the row, such as 20-of-56_chosen.
        kind: "teacher", the reference of the gains (baseline), or a recipe's name.
        labelled: Training subjects of the unit with a reference.
        unlabelled: Training subjects without one; 0 for teacher and baseline.
        fold: The fold that was held out.
        seed: Of weights and order.
        case: Name of the held-out subject.
        region: Name of the region.
        space: "native" or "grid".
        dice: From 0 to 1; NaN where there is none.
        steps: Optimizer steps of the unit.
    """

    study: str
    row: str
    kind: str
    labelled: int
    unlabelled: int
    fold: int
    seed: int
    case: str
    region: str
    space: str
    dice: float
    steps: int

    @property
    def unit(self) -> tuple[int, int]:
        """Fold and seed."""
        return self.fold, self.seed

    @property
    def place(self) -> tuple[str, int, int, str, str, str]:
        """What only one row of the file may have; also the order of the file."""
        return self.row, self.fold, self.seed, self.case, self.region, self.space


COLUMNS = tuple(column.name for column in fields(StudyRow))


@dataclass(frozen=True)
class Study:
    """A study as it is stored.

    Attributes:
        facts: What it is about.
        rows: In the order of `StudyRow.place`.
    """

    facts: Facts
    rows: list[StudyRow]


def write_rows(path: Path, rows: Iterable[StudyRow]) -> None:
    """Write rows.csv, sorted, so that the order in which units end does not show."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda row: row.place):
        values = asdict(row)
        writer.writerow(values | {"dice": "" if math.isnan(row.dice) else row.dice})
    write_text(path, stream.getvalue())


def read_rows(path: Path) -> list[StudyRow]:
    """Read what `write_rows` wrote, in any order of rows."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            _check_columns(path, reader.fieldnames or ())
            numbered = [(reader.line_num, _from_text(path, reader.line_num, row)) for row in reader]
    except FileNotFoundError as error:
        raise UserError(f"{path}: expected the rows of a study, found no such file.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path}: expected a CSV file in UTF-8, which it is not ({error})."
        ) from error
    if not numbered:
        raise UserError(f"{path}: expected at least one row, found none. Run a unit first.")
    _check_places(path, numbered)
    rows = sorted((row for _, row in numbered), key=lambda row: row.place)
    _check_units(path, rows)
    return rows


def read_study(folder: Path) -> Study:
    """Read a study's folder."""
    facts, rows = read_facts(folder / FACTS), read_rows(folder / ROWS)
    names = sorted({row.study for row in rows} - {facts.name})
    if names:
        raise UserError(
            f"{folder / ROWS}: expected rows of the study '{facts.name}' ({FACTS}), found rows of "
            f"{listed(map(repr, names))}. Give each study a folder of its own."
        )
    return Study(facts, rows)


def _check_columns(path: Path, found: Sequence[str]) -> None:
    if set(found) != set(COLUMNS) or len(found) != len(COLUMNS):
        raise UserError(
            f"{path}: expected the columns {listed(COLUMNS)}; found {listed(found) or 'none'}."
        )


def _from_text(path: Path, line: int, row: Mapping[str, str | None]) -> StudyRow:
    values: dict[str, Any] = {}
    for name in COLUMNS:
        text = row.get(name)
        form, read = _READERS.get(name, _NAME)
        try:
            values[name] = read("" if text is None else text)
        except ValueError as error:
            raise UserError(
                f"{path}, line {line}: {name} is {'missing' if text is None else repr(text)}; "
                f"expected {form}."
            ) from error
    if None in row:
        raise UserError(f"{path}, line {line}: expected {len(COLUMNS)} values, found more.")
    return StudyRow(**values)


def _check_places(path: Path, numbered: Sequence[tuple[int, StudyRow]]) -> None:
    lines: dict[tuple[object, ...], int] = {}
    for line, row in numbered:
        first = lines.setdefault(row.place, line)
        if first != line:
            raise UserError(
                f"{path}: lines {first} and {line} are both about {row.row}, fold {row.fold}, "
                f"seed {row.seed}, {row.case}, {row.region}, {row.space}; expected one line for "
                "each. Remove one of them."
            )


def _check_units(path: Path, rows: Sequence[StudyRow]) -> None:
    """A row has one kind; a unit has one number of subjects and of steps."""
    kinds: dict[str, str] = {}
    units: dict[tuple[str, int, int], tuple[int, int, int]] = {}
    for row in rows:
        if kinds.setdefault(row.row, row.kind) != row.kind:
            raise UserError(
                f"{path}: {row.row} is of the kinds {kinds[row.row]} and {row.kind}; expected one."
            )
        counts = row.labelled, row.unlabelled, row.steps
        first = units.setdefault((row.row, *row.unit), counts)
        if first != counts:
            raise UserError(
                f"{path}: {row.row}, fold {row.fold}, seed {row.seed} has labelled, unlabelled and "
                f"steps {first} and {counts}; expected the same in all of its lines."
            )


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError(text)
    return text


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text)
        if number < least:
            raise ValueError(text)
        return number

    return read


def _dice(text: str) -> float:
    if not text or text.lower() == "nan":
        return math.nan
    number = float(text)
    if not 0 <= number <= 1:
        raise ValueError(text)
    return number


def _space(text: str) -> str:
    if text not in SPACES:
        raise ValueError(text)
    return text


_NAME: tuple[str, Callable[[str], object]] = ("a name", _name)
_READERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "labelled": ("a whole number, 1 or more", _whole(1)),
    "unlabelled": ("a whole number, 0 or more", _whole(0)),
    "fold": ("a whole number, 0 or more", _whole(0)),
    "seed": ("a whole number, 0 or more", _whole(0)),
    "steps": ("a whole number, 0 or more", _whole(0)),
    "space": (f"one of {listed(SPACES)}", _space),
    "dice": ("a number from 0 to 1, or nothing where there is none", _dice),
}
