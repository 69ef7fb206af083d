"""From finished units to the rows that a study keeps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdnet.errors import UserError
from kdnet.results.collected import complete_scores
from kdnet.runs.networks import describe_network
from kdnet.runs.plan import Plan, Unit
from kdnet.studies.design import BASELINE, TEACHER, Design
from kdnet.studies.facts import FACTS, Facts, write_facts
from kdnet.studies.rows import ROWS, StudyRow, write_rows
from kdnet.training.checkpoint import read_metadata
from kdnet.training.history import read_history


def collect(plan: Plan, design: Design, commands: Sequence[str]) -> Path:
    """Write rows.csv and study.json of all finished units."""
    kinds = design.kinds()
    rows = [
        row
        for unit in plan.units()
        # Teachers that were trained without a part of the subjects only teach.
        if plan.is_done(unit) and unit.row.name in kinds
        for row in rows_of(plan, unit, study=design.name, kind=kinds[unit.row.name])
    ]
    path = plan.root / ROWS
    write_rows(path, rows)
    write_facts(plan.root / FACTS, facts_of(plan, design, commands))
    return path


def rows_of(plan: Plan, unit: Unit, *, study: str, kind: str) -> list[StudyRow]:
    """Return what one unit reached in every held-out case."""
    folder, split = plan.folder(unit), plan.split(unit)
    taught = kind not in {TEACHER, BASELINE}
    seen = {*read_metadata(folder.model).seen_cases}
    unlabelled = len(seen - {*split.train, *split.validation}) if taught else 0
    steps = int(read_history(folder.history)[-1]["step"])
    return [
        StudyRow(
            study=study,
            row=unit.row.name,
            kind=kind,
            labelled=len(split.train),
            unlabelled=unlabelled,
            fold=unit.fold.number,
            seed=unit.seed,
            case=score.case,
            region=score.region,
            space=score.space,
            dice=score.dice,
            steps=steps,
        )
        for score in complete_scores(folder, unit.fold)
        if score.postprocessing == "off"
    ]


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


def facts_of(plan: Plan, design: Design, commands: Sequence[str]) -> Facts:
    """Return what the study is about."""
    summary = plan.files.read_plan()
    labels = {TEACHER: "teacher", BASELINE: "baseline"}
    labels |= {name: recipe.label for name, recipe in design.recipes.items()}
    return Facts(
        name=design.name,
        dataset=summary["dataset"],
        protocol=f"{design.title}: {protocol(plan, summary)}",
        labels=labels,
        chosen=design.chosen,
        phantom=summary["phantom"],
        commands=list(commands),
    )


def protocol(plan: Plan, summary: Mapping[str, Any]) -> str:
    """Return in one line how all units are trained, without what recipes change."""
    config = plan.config
    seen = "+".join(config.data.student_modalities)
    training = config.training
    steps = f"{training.epochs} epochs"
    if training.samples_per_epoch:
        steps += f" of {training.samples_per_epoch} samples"
    network = describe_network("student", config, plan.data.description)
    parts = [
        summary["dataset"],
        f"{len(plan.folds)} folds",
        f"student sees {seen}",
        network.geometry,
        f"{network.backbone} ({network.activation})",
        f"{steps}, Adam {training.learning_rate:g} ({training.schedule})",
        f"batch {training.batch_size}",
    ]
    return ", ".join(parts)
