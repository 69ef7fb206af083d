"""Rows of a results table: which network is trained how, with which teacher."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from kdnet.config import (
    Arguments,
    Config,
    NetworkConfig,
    ObjectiveConfig,
    TrainingConfig,
    changed,
    parsed,
)
from kdnet.errors import UserError
from kdnet.files import LONGEST, is_name, read_mapping

_BUILT_IN = Path(__file__).with_name("rows.yaml")
_SMALL_PRESETS = ("demo", "cpu")
_SHARED_FOLDERS = ("predictions", "curves")
# Names become folders.
_NAME = re.compile(r"[a-z0-9][a-z0-9_+-]*")
_GROUPS = (NetworkConfig, ObjectiveConfig, TrainingConfig)
#: What of them is the run's: the network of a row's teacher is that teacher's own row.
_OF_THE_RUN = {
    *("teacher_backbone", "teacher_backbone_arguments", "teacher_model", "trust_backbone"),
    *("recipe", "seed"),
}
#: Options that a row may have. Others would make it another experiment: test subjects, grid, seed.
ROW_OPTIONS = [x.name for kind in _GROUPS for x in fields(kind) if x.name not in _OF_THE_RUN]
ROW_OPTIONS += ["student_modalities", "leave_out"]


@dataclass(frozen=True)
class Row:
    """One network of a table.

    Attributes:
        name: Its name in folders, files and tables; nothing else follows from it.
        recipe: How it is trained.
        role: Whose modalities and backbone it has.
        teacher: Row whose trained network is frozen and imitated; None without one.
        more_teachers: Further rows that teach it; each subject is then taught by those of its
            teachers that were not trained on it.
        against: Row that its gain is measured against, where both are trained; None without one.
        labelled: Training subjects whose reference it may use; the run's if None.
        unlabelled: Further training subjects, without a reference; the run's if None.
        label: How tables call it.
        kind: Recipe of a study that it is; rows of one kind differ in their numbers of subjects.
        options: Options of the configuration that differ from those of the run.
        small: Arguments of its backbone under the presets demo and cpu, whose networks are small.
    """

    name: str
    recipe: Literal["supervised", "distilled", "missing_modality", "synthesised", "shared"] = (
        "supervised"
    )
    role: Literal["student", "teacher"] = "student"
    teacher: str | None = None
    more_teachers: tuple[str, ...] = ()
    against: str | None = None
    labelled: int | None = None
    unlabelled: int | None = None
    label: str = ""
    kind: str = ""
    options: Arguments = field(default_factory=dict)
    small: Arguments = field(default_factory=dict)

    def __post_init__(self) -> None:
        # From a file, or made of a row's and a modality's.
        if not is_name(self.name):
            raise UserError(
                f"A row cannot be called {self.name!r}: expected what can name a folder, and at "
                f"most {LONGEST} bytes."
            )

    @property
    def teachers(self) -> tuple[str, ...]:
        """All rows that teach it."""
        return () if self.teacher is None else (self.teacher, *self.more_teachers)

    def configure(self, config: Config) -> Config:
        """Return the configuration that this row is trained with."""
        counts = {"labelled": self.labelled, "unlabelled": self.unlabelled}
        chosen: dict[str, Any] = {name: n for name, n in counts.items() if n is not None}
        chosen |= self.options
        shared, own = config.network.of(self.role)
        arguments = chosen.get("backbone_arguments", {})
        if config.run.preset in _SMALL_PRESETS:
            arguments = self.small | arguments
        if chosen.get("backbone", shared) == shared:
            arguments = own | arguments
        if self.recipe == "synthesised":
            # The network that segments beside a synthesis is the one that all rows share.
            arguments = {"segmenter": shared, "segmenter_arguments": own} | arguments
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
        content = parsed(_File, read_mapping(file), str(file))
        rows |= {str(name): _row(file, str(name), row) for name, row in content.rows.items()}
        groups |= content.groups
    return rows, groups


def select_rows(
    wanted: Sequence[str], rows: Mapping[str, Row], groups: Mapping[str, Sequence[str]]
) -> list[Row]:
    """Choose rows by their names or those of groups, teachers first."""
    names = [name for item in wanted for name in groups.get(item, [item])]
    chosen = [row for name in names for row in _lineage(name, rows, groups)]
    for row in chosen:
        _check_known(row.against or row.name, rows, groups)
    return list({row.name: row for row in chosen}.values())


def _check_known(name: str, rows: Iterable[str], groups: Iterable[str]) -> None:
    if name not in rows:
        raise UserError(
            f"There is no row {name!r}. Rows: {', '.join(rows)}. Groups: {', '.join(groups)}. "
            "Rows of your own are described in a file: --rows-file."
        )


def _lineage(
    name: str, rows: Mapping[str, Row], groups: Iterable[str], students: tuple[str, ...] = ()
) -> list[Row]:
    """A row behind its teachers, and theirs."""
    _check_known(name, rows, groups)
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
    found = []
    for modality in modalities:
        names = {row.name: f"{row.name}-{modality.lower()}" for row in repeated}
        found += [
            replace(
                row,
                name=names[row.name],
                label=f"{row.label}, {modality}",
                teacher=row.teacher and names.get(row.teacher, row.teacher),
                more_teachers=tuple(names.get(name, name) for name in row.more_teachers),
                against=row.against and names.get(row.against, row.against),
                options=row.options | {"student_modalities": [modality]},
            )
            for row in repeated
        ]
    return shared + found


def with_part_teachers(rows: Sequence[Row], config: Config) -> tuple[Row, ...]:
    """Give the rows that ask for it several teachers, each trained without a part of the subjects.

    Each subject is then taught by those that were not trained on it: on its own training subjects
    a teacher repeats what their reference says.
    """
    # Source: out-of-fold prediction, Wolpert 1992, Stacked Generalization, Neural Networks 5,
    # section 2, there for combining models; here for the targets of distillation.
    by_name = {row.name: row for row in rows}
    found: dict[str, Row] = {}
    for row in rows:
        distilled = row.recipe == "distilled"
        parts = row.configure(config).objective.out_of_fold if distilled else 0
        if row.teacher is not None and parts > 1:
            teachers = part_teachers(by_name[row.teacher], parts)
            names = [teacher.name for teacher in teachers]
            found |= dict(zip(names, teachers, strict=True))
            found[row.name] = replace(row, teacher=names[0], more_teachers=tuple(names[1:]))
        else:
            found[row.name] = row
    return tuple(found.values())


def part_teachers(teacher: Row, parts: int) -> list[Row]:
    """Return a teacher's row once for each part of the labelled subjects that it does without."""
    return [
        replace(
            teacher,
            name=f"{teacher.name}-without-{part}-of-{parts}",
            label=f"{teacher.label or teacher.name}, without part {part + 1} of {parts}",
            kind="",
            options=teacher.options | {"leave_out": [part, parts]},
        )
        for part in range(parts)
    ]


@dataclass(frozen=True)
class _File:
    rows: Arguments = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)


def _row(path: Path, name: str, values: Any) -> Row:
    place = f"{path}: row {name!r}"
    defaults = {"label": name, "against": "baseline"}
    given = defaults | values if isinstance(values, dict) else values
    row = parsed(Row, given, place, name=name, kind="")
    imitates = row.recipe in {"distilled", "shared"}
    unknown = sorted({*row.options} - {*ROW_OPTIONS})
    problems = {
        f"its name must match {_NAME.pattern}": not _NAME.fullmatch(name),
        "its name is that of a folder that all rows share": name in _SHARED_FOLDERS,
        f"it has no options {', '.join(unknown)}; there are {', '.join(ROW_OPTIONS)}": bool(
            unknown
        ),
        "backbone_arguments must be names and values": not isinstance(
            row.options.get("backbone_arguments", {}), dict
        ),
        "distilled and shared need a teacher": imitates and row.teacher is None,
        f"the recipe {row.recipe} takes no teacher; distilled does": not imitates
        and row.teacher is not None,
        "more_teachers needs a teacher, and the recipe distilled": bool(row.more_teachers)
        and (row.teacher is None or row.recipe != "distilled"),
    }
    for problem, found in problems.items():
        if found:
            raise UserError(f"{place}: {problem}.")
    # A row that others are measured against is measured against none.
    return replace(row, against=None) if row.against == name else row
