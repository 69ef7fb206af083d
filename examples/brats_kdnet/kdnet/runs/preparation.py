"""A plan brought to where its units can be trained: rehearsed, checked, its folder prepared."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from kdnet.data.splits import Split
from kdnet.data.subjects import States, file_states
from kdnet.errors import UserError
from kdnet.rows import read_rows
from kdnet.runs.folder import locked, plain_options
from kdnet.runs.networks import (
    check_unseen,
    describe_network,
    describe_teacher,
    is_given,
    rehearse,
    stacked,
)
from kdnet.runs.plan import Plan, Unit, folds_text
from kdnet.runs.subjects import check_files, make_phantoms, prepare_parts, record_skipped
from kdnet.training.checkpoint import ModelMetadata
from kdnet.files import remove_abandoned, write_text
from privdistill import PrivDistillError


def rehearse_rows(plan: Plan, units: Sequence[Unit], console: Console) -> Plan:
    """Put the networks of every row together once, and compare with what the folder holds."""
    plan.files.check_config(plan.config)
    plan = replace(plan, experiments=_rehearsed(plan, units, console))
    for unit in units:
        plan.folder(unit).check_experiment(experiment_of(plan, unit))
    return plan


def prepare(plan: Plan, units: Sequence[Unit], console: Console) -> Plan:
    """Begin the folder of a plan or check that it goes on unchanged, and fill its cache."""
    with locked(plan.root / ".lock", "the folder is being prepared", console):
        plan.files.check_config(plan.config)
        remove_abandoned(plan.root, *plan.root.glob("units/*/*/"))
        plan = _begin_or_go_on(plan, console)
        _fill_cache(plan, units, console)
        write_text(plan.files.plan, json.dumps(_summary(plan), indent=2) + "\n")
    return plan


def experiment_of(plan: Plan, unit: Unit) -> dict[str, Any]:
    """Return all that decides the numbers of a unit, as its folder records it."""
    options = plain_options(plan.configure(unit))
    return {"config": options, **plan.experiments[unit.row.name]}


def _rehearsed(plan: Plan, units: Sequence[Unit], console: Console) -> dict[str, dict[str, Any]]:
    """Put the networks of every row together once."""
    needed = {unit.row.name: unit for unit in units}
    found = {}
    for name, unit in needed.items():
        row, config = unit.row, plan.configure(unit)
        if len(needed) > 1:
            console.print(f"Trying {name}", highlight=False)
        try:
            found[name] = rehearse(row, config, plan.data.description, _teacher_of(plan, unit))
        except (UserError, PrivDistillError) as error:
            raise UserError(f"Row {name!r}: {error}") from error
    return found


def _teacher_of(plan: Plan, unit: Unit) -> ModelMetadata | None:
    """Describe the teacher of a unit, which may be given; a given one must not know any test."""
    description = plan.data.description
    for teacher in plan.teachers_of(unit)[:1]:
        config = plan.configure(teacher)
        path = config.network.teacher_model
        if path is None or not is_given(teacher.row, config):
            return describe_network(teacher.row.role, config, description)
        metadata = describe_teacher(path, config, description)
        folds = {one.number: plan.split(replace(unit, fold=one)) for one in plan.folds}
        check_unseen(path, metadata, folds)
        return metadata
    return None


def _begin_or_go_on(plan: Plan, console: Console) -> Plan:
    """Check the files and record them, or make sure that they are those that were recorded."""
    files, data, folds = plan.files, plan.data, folds_text(plan.folds)
    splits = [plan.split(unit) for unit in plan.units()]
    if not files.folds.is_file():
        if plan.config.data.data_root is not None:
            check_files(plan.config, data, splits, console)
        files.begin(plan.config, data.description)
    plan = replace(plan, data=make_phantoms(plan.config, data, plan.cache, console))
    states = _states(plan, splits)
    if files.folds.is_file():
        files.check_unchanged(data.description, folds, states)
        return plan
    record_skipped(files, data)
    files.write_states(states)
    # Last, since it says that the others are there.
    write_text(files.folds, folds)
    return plan


def _states(plan: Plan, splits: Sequence[Split]) -> States:
    """The files of all folds; of phantoms none, as those are made again if they are removed."""
    if plan.config.data.data_root is None:
        return {}
    return file_states(plan.data.named(name for split in splits for name in _names(split)))


def _names(split: Split) -> tuple[str, ...]:
    return (*split.train, *split.validation, *split.test, *split.unlabelled)


def _fill_cache(plan: Plan, units: Sequence[Unit], console: Console) -> None:
    """Preprocess what units need, once for each set of modalities that they stack."""
    needed: dict[tuple[str, ...], tuple[Unit, dict[str, None]]] = {}
    for unit in units:
        if plan.is_done(unit):
            continue
        stack = stacked(plan.configure(unit).data, plan.data.description)
        names = needed.setdefault(stack, (unit, {}))[1]
        split = plan.split(unit)
        names |= dict.fromkeys((*split.train, *split.validation))
    for unit, names in needed.values():
        everyone = Split(tuple(names), (), ())
        prepare_parts(plan.configure(unit), plan.data, everyone, plan.cache, console)


def _summary(plan: Plan) -> dict[str, Any]:
    """What a page of the results says, with the rows and seeds of earlier starts."""
    before, description = plan.files.read_plan(), plan.data.description
    rows = {row["name"]: row for row in before.get("rows", [])}
    kinds = plan.facts.get("kinds", {})
    # Teachers of a study that were trained without a part of the subjects only teach.
    shown = [row for row in plan.rows if not kinds or row.name in kinds]
    rows |= {row.name: asdict(row) | {"kind": kinds.get(row.name, row.name)} for row in shown}
    now = {seed for seeds in plan.seeds.values() for seed in seeds}
    seeds = sorted({*before.get("seeds", []), *now})
    grades = Counter(subject.grade or "not stated" for subject in plan.data.subjects.values())
    return {
        "kind": plan.kind,
        "title": plan.title,
        "rows": list(rows.values()),
        "folds": [fold.number for fold in plan.folds],
        "seeds": seeds,
        "dataset": description.name,
        "phantom": description.phantom,
        "protocol": _protocol(plan, seeds),
        "grades": dict(grades),
        "folds_sha256": hashlib.sha256(plan.files.folds.read_bytes()).hexdigest(),
        **{name: value for name, value in plan.facts.items() if name != "kinds"},
    }


def _protocol(plan: Plan, seeds: Sequence[int]) -> str:
    """In one line what decides the numbers."""
    config, description = plan.config, plan.data.description
    options, training = config.objective, config.training
    network = describe_network("student", config, description)
    repeats = len({fold.repeat for fold in plan.folds})
    cases = {name for fold in plan.folds for name in _names(fold.split)}
    constants = (
        f"lambda {options.imitation:g}, T {options.temperature}, alpha {options.latent_weight:g}"
    )
    parts = [
        f"{description.name}{' (phantoms, not patients)' * description.phantom}",
        _counted(len(cases), "case"),
        _counted(len(plan.folds), "fold") + f" in {repeats} repeats" * (repeats > 1),
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
        f"student sees {'+'.join(network.modalities)}",
        network.geometry,
        f"{network.backbone} ({network.activation})",
        constants if options.objective == "kdnet" else options.objective,
        _counted(training.epochs, "epoch"),
        f"{training.precision}, {training.memory_format}" + ", compiled" * bool(training.compile),
    ]
    built_in = read_rows()[0] if plan.kind == "crossval" else {}
    own = [row.name for row in plan.rows if built_in.get(row.name, row) != row]
    changed = f"; rows that are not the built-in ones: {', '.join(own)}" if own else ""
    return ", ".join(parts) + changed


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
