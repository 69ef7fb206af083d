"""What a study adds to its plan: which recipe every row is, and how the command was given."""

import json
from collections.abc import Sequence

from kdnet.errors import UserError
from kdnet.runs.plan import Plan
from kdnet.studies.design import BASELINE, TEACHER, Design
from kdnet.writing import write_text


def describe_study(plan: Plan, design: Design, commands: Sequence[str]) -> None:
    """Add recipes, their labels and the chosen one to plan.json."""
    content, kinds = plan.files.read_plan(), design.kinds()
    labels = {TEACHER: "teacher", BASELINE: "baseline"}
    labels |= {name: recipe.label for name, recipe in design.recipes.items()}
    content |= {"name": design.name, "labels": labels, "chosen": design.chosen}
    content["commands"] = [*commands]
    # Teachers that were trained without a part of the subjects only teach.
    content["rows"] = [
        row | {"kind": kinds[row["name"]]} if row["name"] in kinds else row
        for row in content["rows"]
    ]
    write_text(plan.files.plan, json.dumps(content, indent=2) + "\n")


def check_distinct(plan: Plan, design: Design) -> None:
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
