"""Rows of a results table: which network is trained how, with which teacher."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from kdnet.configuration.arguments import Arguments
from kdnet.configuration.config import Config
from kdnet.configuration.data import DataConfig
from kdnet.configuration.network import NetworkConfig
from kdnet.configuration.objective import ObjectiveConfig
from kdnet.configuration.parsing import changed
from kdnet.configuration.training import TrainingConfig
from kdnet.errors import UserError
from kdnet.files import LONGEST, UnreadableError, is_name, read_yaml
from kdnet.models import in_two_dimensions

Role = Literal["student", "teacher"]

RECIPES = ("supervised", "distilled", "missing_modality", "synthesised", "shared")
_BUILT_IN = Path(__file__).with_name("rows.yaml")
_SMALL_PRESETS = ("demo", "cpu")
_SHARED_FOLDERS = ("predictions", "tensorboard")
# Names become folders.
_NAME = re.compile(r"[a-z0-9][a-z0-9_+-]*")
#: Options that a row may have. Others would make it another experiment: test subjects, grid, seed.
#: The network of a row's teacher is that teacher's own row.
ROW_OPTIONS = [
    *(
        item.name
        for group in (NetworkConfig, ObjectiveConfig)
        for item in fields(group)
        if not item.name.startswith(("teacher_backbone", "teacher_model", "trust_", "recipe"))
    ),
    *(item.name for item in fields(TrainingConfig) if item.name != "seed"),
    "student_modalities",
    "labelled",
    "unlabelled",
    "leave_out",
]


@dataclass(frozen=True)
class Row:
    """One network of a table.

    Attributes:
        name: Its name in folders, files and tables.
        recipe: How it is trained.
        role: Whose modalities and backbone it has.
        teacher: Row whose trained network is frozen and imitated; None without one.
        more_teachers: Further rows that teach it; each subject is then taught by those of its
            teachers that were not trained on it.
        label: How tables call it.
        options: Options of the configuration that differ from those of the run.
        small: Arguments of its backbone under the presets demo and cpu, whose networks are small.
    """

    name: str
    recipe: str = "supervised"
    role: Role = "student"
    teacher: str | None = None
    more_teachers: tuple[str, ...] = ()
    label: str = ""
    options: Arguments = field(default_factory=dict)
    small: Arguments = field(default_factory=dict)

    @property
    def teachers(self) -> tuple[str, ...]:
        """All rows that teach it."""
        return () if self.teacher is None else (self.teacher, *self.more_teachers)

    def configure(self, config: Config) -> Config:
        """Return the configuration that this row is trained with."""
        chosen, (shared, own) = dict(self.options), config.network.of(self.role)
        arguments = chosen.get("backbone_arguments", {})
        if config.run.preset in _SMALL_PRESETS:
            arguments = self.small | arguments
        if chosen.get("backbone", shared) == shared:
            arguments = own | arguments
        if self.recipe == "synthesised":
            arguments = _segmenter(shared, own, config.data) | arguments
        if self.role == "teacher":
            # What the row says about its backbone is meant for the network that it trains.
            chosen |= {"teacher_backbone": None, "teacher_backbone_arguments": None}
            chosen.setdefault("backbone", shared)
        try:
            return changed(config, chosen | {"backbone_arguments": arguments})
        except UserError as error:
            raise UserError(f"Row {self.name!r}: {error}") from error


def read_rows(path: Path | None = None) -> tuple[dict[str, Row], dict[str, list[str]]]:
    """Read the built-in rows and groups, and those of a file."""
    rows: dict[str, Row] = {}
    groups: dict[str, list[str]] = {}
    for file in [_BUILT_IN, path] if path else [_BUILT_IN]:
        content = _read(file)
        rows |= {name: _row(file, name, values) for name, values in content["rows"].items()}
        groups |= content["groups"]
    return rows, groups


def select_rows(
    wanted: Sequence[str], rows: Mapping[str, Row], groups: Mapping[str, Sequence[str]]
) -> list[Row]:
    """Choose rows by their names or those of groups, teachers first."""
    names = [name for item in wanted for name in groups.get(item, [item])]
    ordered: dict[str, Row] = {}
    for name in names:
        for row in _lineage(name, rows, groups):
            ordered.setdefault(row.name, row)
    return list(ordered.values())


def _lineage(
    name: str,
    rows: Mapping[str, Row],
    groups: Iterable[str],
    students: tuple[str, ...] = (),
) -> list[Row]:
    """A row behind its teachers, and theirs."""
    if name not in rows:
        raise UserError(
            f"There is no row {name!r}. Rows: {', '.join(rows)}. Groups: {', '.join(groups)}. "
            "Rows of your own are described in a file: --rows_file."
        )
    if name in students:
        raise UserError(f"Row {students[0]!r}: its teachers teach each other in a circle.")
    behind = [
        row
        for teacher in rows[name].teachers
        for row in _lineage(teacher, rows, groups, (*students, name))
    ]
    return [*behind, rows[name]]


def sweep(rows: Sequence[Row], modalities: Sequence[str]) -> list[Row]:
    """Repeat every row of the student for each single modality."""
    shared = [row for row in rows if row.role == "teacher"]
    repeated = [row for row in rows if row.role != "teacher"]
    own = {row.name for row in repeated}
    return shared + [
        replace(
            row,
            name=_swept_name(row.name, modality),
            label=f"{row.label}, {modality}",
            teacher=_swept(row.teacher, modality, own),
            more_teachers=tuple(_swept(name, modality, own) or "" for name in row.more_teachers),
            options=row.options | {"student_modalities": [modality]},
        )
        for modality in modalities
        for row in repeated
    ]


def _swept(teacher: str | None, modality: str, own: Container[str]) -> str | None:
    """Name of a teacher in a sweep."""
    return teacher if teacher is None or teacher not in own else _swept_name(teacher, modality)


def _swept_name(row: str, modality: str) -> str:
    name = f"{row}-{modality.lower()}"
    if not is_name(name):
        raise UserError(
            f"The row {row} of the modality {modality} would be called {name}, which is too long "
            f"for a folder: expected at most {LONGEST} bytes. Give the modality a shorter name in "
            "the data set's description."
        )
    return name


def _segmenter(backbone: str, arguments: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    """The network that segments beside a synthesis is the one that all rows share."""
    if data.slices is not None:
        arguments = in_two_dimensions(backbone, arguments)
    return {"segmenter": backbone, "segmenter_arguments": arguments}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = read_yaml(path) or {}
    except UnreadableError as error:
        raise UserError(f"{path}: the rows cannot be read: {error}") from error
    if not isinstance(content, dict) or set(content) - {"rows", "groups"}:
        raise UserError(f"{path}: expected the keys rows and groups.")
    parts = {key: content.get(key) or {} for key in ("rows", "groups")}
    wrong = [key for key, value in parts.items() if not isinstance(value, dict)]
    if wrong:
        raise UserError(f"{path}: {wrong[0]} must hold names and what they stand for.")
    no_lists = [name for name, rows in parts["groups"].items() if not isinstance(rows, list)]
    if no_lists:
        raise UserError(f"{path}: group {no_lists[0]!r} must be a list of names of rows.")
    return parts


def _row(path: Path, name: str, values: Any) -> Row:
    allowed = [item.name for item in fields(Row) if item.name != "name"]
    if not isinstance(values, dict) or set(values) - set(allowed):
        raise UserError(f"{path}: row {name!r} may have the keys {', '.join(allowed)}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Row)
    try:
        found = parser.parse_object({"label": str(name), **values, "name": str(name)})
    except ArgumentError as error:
        raise UserError(f"{path}: row {name!r}: {error}.") from error
    row = Row(**found.as_dict())
    taught = row.recipe in {"distilled", "shared"}
    unknown = sorted(set(row.options) - set(ROW_OPTIONS))
    problems = {
        f"its name must match {_NAME.pattern}": not _NAME.fullmatch(row.name),
        "its name is that of a folder that all rows share": row.name in _SHARED_FOLDERS,
        f"recipe must be one of {', '.join(RECIPES)}": row.recipe not in RECIPES,
        f"it has no options {', '.join(unknown)}; there are {', '.join(ROW_OPTIONS)}": bool(
            unknown
        ),
        "backbone_arguments must be names and values": not isinstance(
            row.options.get("backbone_arguments", {}), dict
        ),
        "distilled and shared need a teacher": taught and row.teacher is None,
        f"the recipe {row.recipe} takes no teacher; distilled does": not taught
        and row.teacher is not None,
        "more_teachers needs a teacher, and the recipe distilled": bool(row.more_teachers)
        and (row.teacher is None or row.recipe != "distilled"),
    }
    for problem, found in problems.items():
        if found:
            raise UserError(f"{path}: row {name!r}: {problem}.")
    return row
