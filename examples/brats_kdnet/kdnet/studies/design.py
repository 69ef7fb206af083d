"""What a study consists of: a file with recipes, and with how many references each is tried."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from kdnet.config import Arguments, as_arguments, limited, out_of_range, parsed
from kdnet.errors import UserError
from kdnet.files import UnreadableError, read_yaml
from kdnet.rows import ROW_OPTIONS, Row

_FOLDER = Path(__file__).parent
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
#: Without a teacher of their own; every study has both.
TEACHER, BASELINE = "teacher", "baseline"

#: What a recipe may change; how many references it has is said by its blocks.
_OPTIONS = {*ROW_OPTIONS} - {"labelled", "unlabelled", "leave_out"}
#: What the options of a study may not have: the blocks and the command line say it.
_ELSEWHERE = {"labelled", "unlabelled", "leave_out", "search", "trials", "show", "unit", "only"}
_ELSEWHERE |= {"study", "jobs", "out"}

#: A number of subjects, or "all" of those that are there.
Count = int | Literal["all"]


@dataclass(frozen=True)
class Recipe:
    """One way to train the student.

    Attributes:
        label: How tables and figures call it.
        options: Options of the configuration that differ from those of the study.
        supervised: Whether it learns from the references alone, as a further control.
        against: Control that its gain is measured against: "baseline", or a recipe without teacher.
    """

    label: str
    options: Arguments = field(default_factory=dict)
    supervised: bool = False
    against: str = BASELINE


@dataclass(frozen=True)
class Block:
    """Some recipes, tried with some numbers of subjects and some seeds.

    Attributes:
        recipes: Names of recipes, "teacher" and "baseline" among them.
        labelled: Numbers of training subjects with a reference, each tried.
        unlabelled: Numbers of training subjects without one, each tried; of no meaning for teacher
            and baseline.
        seeds: Of weights and order, each tried.
    """

    recipes: tuple[str, ...]
    labelled: tuple[Count, ...] = limited(("all",), at_least=0)
    unlabelled: tuple[Count, ...] = limited(("all",), at_least=0)
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Search:
    """Options to be tried on a split of the training subjects of some folds.

    Attributes:
        space: Values of each option that are tried.
        options: Options that all trials share.
        labelled: Training subjects with a reference, or "all"; the others teach without one.
        folds: Folds of the study on whose training subjects it is tried. A recipe that is chosen on
            fold 0 is tested on new subjects in fold 0 alone: the other folds test some of these.
        seeds: Of weights and order.
    """

    space: dict[str, list[Any]]
    options: dict[str, Any] = field(default_factory=dict)
    labelled: Count = limited("all", at_least=1)
    folds: tuple[int, ...] = limited((0,), at_least=0)
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Design:
    """A study, as its file describes it.

    Attributes:
        name: Of its folder and in tables.
        title: What is studied, one line.
        options: Options of the configuration that all units share.
        recipes: By name.
        blocks: What is trained.
        chosen: Recipe that the study is about; where it depends on the number of labels, recipes by
            rows' names without that of the recipe, such as 20-labelled. Empty for none.
        searches: By name.
    """

    name: str
    title: str
    options: Arguments
    recipes: dict[str, Recipe]
    blocks: tuple[Block, ...]
    chosen: str | dict[str, str] = ""
    searches: dict[str, Search] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """Return the options as they would stand on a command line."""
        # A preset's number of labels would be that of every row which means all.
        return ["--labelled", "null", *as_arguments(self.options)]

    def rows(self) -> tuple[tuple[Row, ...], dict[str, tuple[int, ...]]]:
        """Return the rows to train, teachers first, and the seeds of each."""
        seeds: dict[str, tuple[int, ...]] = {}
        rows: dict[str, Row] = {}
        listed = [(block, row) for block in self.blocks for row in self._rows_of(block)]
        for block, row in listed:
            rows[row.name] = row
            seeds[row.name] = tuple(sorted({*seeds.get(row.name, ()), *block.seeds}))
        for block, row in listed:
            if row.teacher is not None and row.teacher not in rows:
                labelled: Count = "all" if row.labelled is None else row.labelled
                rows[row.teacher] = plain_row(TEACHER, labelled)
                # Of the first block that needs it, so that blocks added later change nothing.
                seeds[row.teacher] = block.seeds[:1]
        ordered = sorted(rows.values(), key=lambda row: row.teacher is not None)
        return tuple(ordered), seeds

    def chosen_rows(self) -> list[str]:
        """Return the names of the rows that the study is about."""
        if isinstance(self.chosen, dict):
            return [f"{setting}_{recipe}" for setting, recipe in self.chosen.items()]
        return [row.name for row in self.rows()[0] if row.kind == self.chosen]

    def facts(self) -> dict[str, Any]:
        """Return what whoever reads the results has to know of it."""
        labels = {name: recipe.label for name, recipe in self.recipes.items()}
        labels = {BASELINE: BASELINE, TEACHER: TEACHER} | labels
        return {"labels": labels, "chosen": tuple(self.chosen_rows())}

    def _rows_of(self, block: Block) -> list[Row]:
        return [
            self._row(recipe, labelled, unlabelled)
            for recipe in block.recipes
            for labelled in block.labelled
            for unlabelled in (block.unlabelled if self._has_teacher(recipe) else ("all",))
        ]

    def _has_teacher(self, recipe: str) -> bool:
        """Whether a recipe has a teacher, and a use for subjects without a reference."""
        return recipe in self.recipes and not self.recipes[recipe].supervised

    def _row(self, recipe: str, labelled: Count, unlabelled: Count) -> Row:
        if recipe in {TEACHER, BASELINE}:
            return plain_row(recipe, labelled)
        own = self.recipes[recipe]
        row = replace(
            plain_row(BASELINE, labelled),
            name=row_name(recipe, labelled, unlabelled),
            against=row_name(own.against, labelled, "all"),
            label=f"{own.label}, {labelled} labelled",
            kind=recipe,
            options=own.options,
        )
        if own.supervised:
            return row
        teacher = row_name(TEACHER, labelled, "all")
        return replace(row, recipe="distilled", teacher=teacher, unlabelled=count_of(unlabelled))


def plain_row(recipe: str, labelled: Count) -> Row:
    """Return the row of a teacher or baseline."""
    return Row(
        name=row_name(recipe, labelled, "all"),
        role="teacher" if recipe == TEACHER else "student",
        label=f"{recipe}, {labelled} labelled",
        kind=recipe,
        labelled=count_of(labelled),
        # What it never sees need not be prepared.
        unlabelled=None if labelled == "all" else 0,
    )


def count_of(number: Count) -> int | None:
    """Return a number of subjects as rows have it: None for all."""
    return number if isinstance(number, int) else None


def row_name(recipe: str, labelled: Count, unlabelled: Count) -> str:
    """Return the name of a row, which is that of its folder."""
    others = "" if unlabelled == "all" else f"-{unlabelled}-unlabelled"
    return f"{labelled}-labelled{others}_{recipe}"


def read_design(wanted: str) -> Design:
    """Read the file of a study."""
    path = _FOLDER / f"{wanted}.yaml" if _NAME.fullmatch(wanted) else Path(wanted)
    try:
        content = read_yaml(path)
    except UnreadableError as error:
        known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.yaml")))
        raise UserError(
            f"--study {wanted}: cannot be read ({error}). Give the path of a file, or one "
            f"of {known}."
        ) from error
    return _design(path, content)


def _design(path: Path, content: Any) -> Design:
    design = parsed(Design, content, str(path), name=path.stem)
    # Rows can be told only when their recipes are there.
    problems = [*_of_recipes(design), *_of_blocks(design), *_of_searches(design)]
    problems = problems or [*_of_rows(design)]
    if problems:
        raise UserError(f"{path}: " + "\n".join(problems))
    return design


def _of_recipes(design: Design) -> Iterator[str]:
    """What is wrong with names and options of recipes, and with shared options."""
    for name, recipe in design.recipes.items():
        if name in {TEACHER, BASELINE} or not _NAME.fullmatch(name):
            yield (
                f"the recipe {name!r} must match {_NAME.pattern} and be neither {TEACHER} nor "
                f"{BASELINE}, which are always there."
            )
        controls = [BASELINE, *(own for own, one in design.recipes.items() if one.supervised)]
        if recipe.against not in controls:
            found = f"the recipe {name!r} is against {recipe.against!r}"
            yield f"{found}; expected a recipe without a teacher: {', '.join(controls)}."
        yield from _foreign(f"recipe {name!r}", recipe.options)
    for name in _ELSEWHERE & {*design.options}:
        yield f"options may not have {name}: blocks or the command line say it."


def _of_blocks(design: Design) -> Iterator[str]:
    known = {*design.recipes, TEACHER, BASELINE}
    if not design.blocks:
        yield "there are no blocks, so that nothing would be trained."
    for number, block in enumerate(design.blocks, start=1):
        yield from (
            f"block {number} has no {name}." for name, own in vars(block).items() if not own
        )
        for name in {*block.recipes} - known:
            yield f"there is no recipe {name!r}; there are {', '.join(sorted(known))}."
        yield from (f"block {number}: {problem}" for problem in out_of_range(block))


def _of_searches(design: Design) -> Iterator[str]:
    """Searches without a trial, or on what is not there."""
    for name, search in design.searches.items():
        parts = {
            "space": search.space,
            "seeds": search.seeds,
            "folds": search.folds,
            **search.space,
        }
        yield from (f"search {name!r} has no {part}." for part, own in parts.items() if not own)
        yield from _foreign(f"search {name!r}", [*search.options, *search.space])
        yield from (f"search {name!r}: {problem}" for problem in out_of_range(search))


def _of_rows(design: Design) -> Iterator[str]:
    """Rows that are said to be chosen and are not there, and those whose gain could not be told."""
    rows, seeds = design.rows()
    known = {row.name for row in rows}
    for name in design.chosen_rows():
        if name not in known:
            yield f"chosen names the row {name}, which is not there."
    if design.chosen and not design.chosen_rows():
        yield f"chosen names the recipe {design.chosen!r}, which is not in any block."
    for row in rows:
        lacking = {*seeds[row.name]} - {*seeds.get(row.against or row.name, ())}
        if lacking:
            yield f"{row.name} has no baseline with seeds {sorted(lacking)}; add that block."


def _foreign(place: str, options: Iterable[str]) -> Iterator[str]:
    """Options that would make a recipe another experiment."""
    if unknown := sorted({*options} - _OPTIONS):
        there = ", ".join(sorted(_OPTIONS))
        yield f"{place} may not have the options {', '.join(unknown)}; there are {there}."
