"""What a study consists of: a file with recipes, and with how many references each is tried."""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from kdnet.config import Arguments
from kdnet.errors import UserError
from kdnet.files import UnreadableError, read_yaml
from kdnet.rows import ROW_OPTIONS, Row

if TYPE_CHECKING:
    from kdnet.runs.plan import Plan

_FOLDER = Path(__file__).parent
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
#: Without a teacher of their own; every study has both.
TEACHER, BASELINE = "teacher", "baseline"

#: What a recipe may change; how many references it has is said by its blocks.
_OPTIONS = [name for name in ROW_OPTIONS if name not in {"labelled", "unlabelled", "leave_out"}]

_COUNTS = "how many references there are is said by the blocks"
_COMMAND = "give it on the command line"
_ELSEWHERE = dict.fromkeys(("labelled", "unlabelled", "leave_out"), _COUNTS) | dict.fromkeys(
    ("study", "search", "trials", "show", "unit", "only", "jobs", "out"), _COMMAND
)

#: A number of subjects, or "all" of those that are there.
Count = int | str


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
    labelled: tuple[Count, ...] = ("all",)
    unlabelled: tuple[Count, ...] = ("all",)
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
        random_trials: Trials before those that build on earlier ones.
        seed: Of the choice of trials.
    """

    space: dict[str, list[Any]]
    options: dict[str, Any] = field(default_factory=dict)
    labelled: Count = "all"
    folds: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    random_trials: int = 6
    seed: int = 0

    @property
    def encoded(self) -> list[tuple[str, list[str]]]:
        """The values as texts, in which lists can be told apart."""
        return [(name, [json.dumps(v) for v in values]) for name, values in self.space.items()]


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
            rows' names without that of the recipe, such as 20-labelled. Need not be given.
        searches: By name.
    """

    name: str
    title: str
    options: Arguments
    recipes: dict[str, Recipe]
    blocks: tuple[Block, ...]
    chosen: str | dict[str, str] = "chosen"
    searches: dict[str, Search] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """Return the options as they would stand on a command line."""
        # A preset's number of labels would be that of every row which means all.
        return ["--labelled", "null"] + [
            text
            for name, value in self.options.items()
            for text in (f"--{name}", value if isinstance(value, str) else yaml_text(value))
        ]

    def rows(self) -> tuple[tuple[Row, ...], dict[str, tuple[int, ...]]]:
        """Return the rows to train, teachers first, and the seeds of each."""
        seeds: dict[str, tuple[int, ...]] = {}
        first: dict[str, tuple[int, ...]] = {}
        rows: dict[str, Row] = {}
        for block in self.blocks:
            for row in self._rows_of(block):
                rows[row.name] = row
                first.setdefault(row.name, block.seeds[:1])
                seeds[row.name] = tuple(sorted({*seeds.get(row.name, ()), *block.seeds}))
        for row in list(rows.values()):
            if row.teacher is not None and row.teacher not in rows:
                rows[row.teacher] = plain_row(
                    TEACHER, "all" if row.labelled is None else row.labelled
                )
                # Of the first block that needs it, so that blocks added later change nothing.
                seeds[row.teacher] = first[row.name]
        ordered = sorted(rows.values(), key=lambda row: row.teacher is not None)
        return tuple(ordered), seeds

    def kinds(self) -> dict[str, str]:
        """Return the recipe of every row, by the row's name."""
        return {
            row.name: recipe
            for block in self.blocks
            for recipe in (*block.recipes, TEACHER)
            for row in self._rows_of(replace(block, recipes=(recipe,)))
        }

    def facts(self) -> dict[str, Any]:
        """Return what whoever reads the results has to know of it."""
        labels = {BASELINE: BASELINE, TEACHER: TEACHER}
        labels |= {name: recipe.label for name, recipe in self.recipes.items()}
        return {"name": self.name, "labels": labels, "chosen": self.chosen, "kinds": self.kinds()}

    def _rows_of(self, block: Block) -> list[Row]:
        return [
            self._row(recipe, labelled, unlabelled)
            for recipe in block.recipes
            for labelled in block.labelled
            for unlabelled in (block.unlabelled if self._is_taught(recipe) else ("all",))
        ]

    def _is_taught(self, recipe: str) -> bool:
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
        labelled=count_of(labelled),
        # What it never sees need not be prepared.
        unlabelled=None if labelled == "all" else 0,
    )


def check_distinct(plan: "Plan", design: Design) -> None:
    """Refuse numbers that mean the same before anything is trained."""
    kinds, found = design.kinds(), dict[tuple[str, int, int, int], str]()
    for unit in plan.units():
        if unit.row.name not in kinds:
            continue
        split, kind = plan.split(unit), kinds[unit.row.name]
        more = len(split.unlabelled) if kind not in {TEACHER, BASELINE} else 0
        place = (kind, len(split.train), more, unit.fold.number)
        if found.setdefault(place, unit.row.name) != unit.row.name:
            raise UserError(
                f"{found[place]} and {unit.row.name} are the same: {len(split.train)} labelled and "
                f"{more} unlabelled subjects in fold {unit.fold.number}. Leave one of them out of "
                "the study's file."
            )


def count_of(number: Count) -> int | None:
    """Return a number of subjects as rows have it: None for all."""
    return number if isinstance(number, int) else None


def row_name(recipe: str, labelled: Count, unlabelled: Count) -> str:
    """Return the name of a row, which is that of its folder."""
    others = "" if unlabelled == "all" else f"-{unlabelled}-unlabelled"
    return f"{labelled}-labelled{others}_{recipe}"


def yaml_text(value: Any) -> str:
    """Write a value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


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
    keys = ("title", "options", "recipes", "blocks")
    if not isinstance(content, dict) or {*content} - {"chosen", "searches"} != {*keys}:
        raise UserError(
            f"{path}: a study has the keys {', '.join(keys)}, and perhaps chosen and searches."
        )
    if content.get("chosen", "") is None:
        raise UserError(f"{path}: chosen has no value; name a recipe, or leave the line out.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Design, "design")
    try:
        values = parser.parse_object({"design": {"name": path.stem, **content}})
    except ArgumentError as error:
        raise UserError(f"{path}: {error}") from error
    design = cast("Design", parser.instantiate(values).design)
    # Rows can be told only when their recipes are there.
    problems = _naming(design) or [
        *_empty(design),
        *_foreign_options(design),
        *(_unknown_choices(design) if "chosen" in content else ()),
        *_missing_controls(design),
        *_senseless_searches(design.searches),
    ]
    if problems:
        raise UserError(f"{path}: " + "\n".join(problems))
    return design


def _naming(design: Design) -> list[str]:
    """What is wrong with names and counts, one sentence each."""
    named = {recipe for block in design.blocks for recipe in block.recipes}
    known = {*design.recipes, TEACHER, BASELINE}
    counts = [n for block in design.blocks for n in (*block.labelled, *block.unlabelled)]
    found = {
        f"there is no recipe {name!r}; there are {', '.join(sorted(known))}.": name not in known
        for name in sorted(named)
    }
    for name in design.recipes:
        found |= {
            f"{name!r} is always there and cannot be a recipe.": name in {TEACHER, BASELINE},
            f"the recipe {name!r} must match {_NAME.pattern}.": not _NAME.fullmatch(name),
        }
    for name, recipe in design.recipes.items():
        control = design.recipes.get(recipe.against)
        fine = recipe.against == BASELINE or (control is not None and control.supervised)
        found[
            f"{name!r} is measured against {recipe.against!r}, which has a teacher or is none."
        ] = not fine
    for count in counts:
        fine = count == "all" if isinstance(count, str) else count >= 0
        found[f"labelled and unlabelled are numbers or all, found {count!r}."] = not fine
    return [problem for problem, is_there in found.items() if is_there]


def _empty(design: Design) -> list[str]:
    """Blocks that train nothing, and options that are said elsewhere."""
    found = [] if design.blocks else ["there are no blocks, so that nothing would be trained."]
    for number, block in enumerate(design.blocks, start=1):
        lists = {"recipes": block.recipes, "labelled": block.labelled, "seeds": block.seeds}
        lists["unlabelled"] = block.unlabelled
        empty = [name for name, values in lists.items() if not values]
        found += [f"block {number} has no {name}." for name in empty]
    return found + [
        f"options may not have {name}; {where}."
        for name, where in _ELSEWHERE.items()
        if name in design.options
    ]


def _senseless_searches(searches: Mapping[str, Search]) -> list[str]:
    """Searches without a trial, or on what is not there; one sentence each."""
    found: dict[str, bool] = {}
    for name, search in searches.items():
        count = search.labelled
        fine = count == "all" if isinstance(count, str) else count >= 1
        found |= {
            f"search {name!r} has no space of options.": not search.space,
            f"search {name!r} has no seeds.": not search.seeds,
            f"search {name!r} has no folds.": not search.folds,
            f"search {name!r}: folds are numbers from 0, found {search.folds}.": any(
                fold < 0 for fold in search.folds
            ),
            f"search {name!r}: labelled is a number from 1 or all, found {count!r}.": not fine,
            f"search {name!r}: random_trials is 0 or more.": search.random_trials < 0,
        }
    return [problem for problem, is_there in found.items() if is_there]


def _foreign_options(design: Design) -> list[str]:
    """Options that would make a recipe another experiment, and searches without values."""
    places = {f"recipe {name!r}": [*item.options] for name, item in design.recipes.items()}
    for name, search in design.searches.items():
        places[f"search {name!r}"] = [*search.options, *search.space]
    found = [
        f"{place} may not have the options {', '.join(unknown)}; there are {', '.join(_OPTIONS)}."
        for place, options in places.items()
        if (unknown := [option for option in options if option not in _OPTIONS])
    ]
    return found + [
        f"search {name!r}: {option} has no values."
        for name, search in design.searches.items()
        for option, values in search.space.items()
        if not values
    ]


def _unknown_choices(design: Design) -> list[str]:
    """Recipes that are said to be chosen and are not there."""
    chosen = design.chosen
    named = {chosen} if isinstance(chosen, str) else {*chosen.values()}
    settings = {} if isinstance(chosen, str) else chosen
    known = {row.partition("_")[0] for row in design.kinds()}
    found = [
        f"chosen names the recipe {name!r}, which is not there."
        for name in sorted(named - {*design.recipes})
    ]
    return found + [
        f"chosen names {setting!r}; there are {', '.join(sorted(known))}."
        for setting in settings
        if setting not in known
    ]


def _missing_controls(design: Design) -> list[str]:
    """Rows whose gain could not be told."""
    have, needed = set[tuple[str, Count, int]](), dict[tuple[str, Count, int], str]()
    for block in design.blocks:
        for place in itertools.product(block.recipes, block.labelled, block.seeds):
            recipe, count, seed = place
            have.add(place)
            if recipe in design.recipes:
                needed[design.recipes[recipe].against, count, seed] = recipe
    return [
        f"{recipe} with {count} labelled subjects and seed {seed} has no {against} to be compared "
        "with; add that block."
        for (against, count, seed), recipe in needed.items()
        if (against, count, seed) not in have
    ]
