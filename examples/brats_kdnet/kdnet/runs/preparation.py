"""A plan brought to where its units can be trained: rehearsed, checked, its folder prepared."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from kdnet.config import Config, in_words
from kdnet.data.splits import Split, seen_before
from kdnet.data.subjects import file_states
from kdnet.errors import UserError
from kdnet.files import file_digest, remove_abandoned, write_json
from kdnet.models import chosen_arguments
from kdnet.rows import read_rows
from kdnet.runs import networks
from kdnet.runs.folder import Facts, locked, plain_options
from kdnet.runs.plan import Plan, Unit, folds_content
from kdnet.runs.subjects import check_files, make_phantoms, prepare_parts, record_skipped
from kdnet.training.checkpoint import ModelMetadata
from privdistill import PrivDistillError


def rehearse_rows(plan: Plan, units: Sequence[Unit], console: Console) -> Plan:
    """Put the networks of every row together once, and compare with what the folder holds."""
    plan.files.check_config(plan.config)
    # Folds and seeds change no shape: one unit of each row is enough.
    needed = {unit.row.name: unit for unit in units}
    experiments = {}
    for name, unit in needed.items():
        if len(needed) > 1:
            console.print(f"Trying {name}")
        try:
            for one in units:
                if one.row == unit.row:
                    _check_teachers(plan, one)
            teacher = _teacher_of(plan, unit)
            experiments[name] = networks.rehearse(
                unit.row, plan.configure(unit), plan.data.description, teacher
            )
        except (UserError, PrivDistillError) as error:
            raise UserError(f"Row {name!r}: {error}") from error
    plan = replace(plan, experiments=experiments)
    for unit in units:
        plan.folder(unit).check_experiment(experiment_of(plan, unit))
    return plan


def prepare(plan: Plan, units: Sequence[Unit], console: Console) -> Plan:
    """Begin the folder of a plan or check that it goes on unchanged, and fill its cache."""
    with locked(plan.root / ".lock", "the folder is being prepared", console):
        plan.files.check_config(plan.config)
        # Nobody else removes what a kill left half written.
        remove_abandoned(plan.root, *plan.root.glob("units/*/*/"))
        plan = _begin_or_go_on(plan, console)
        _fill_cache(plan, units, console)
        write_json(plan.files.plan, asdict(_summary(plan)))
    return plan


def experiment_of(plan: Plan, unit: Unit) -> dict[str, Any]:
    """Return all that decides the numbers of a unit, as its folder records it."""
    config = plan.configure(unit).to_dict()
    return {"config": plain_options(config), **plan.experiments[unit.row.name]}


def _teacher_of(plan: Plan, unit: Unit) -> ModelMetadata | None:
    """Describe the teacher of a unit, which may be given; a given one must not know any test."""
    description = plan.data.description
    for teacher in plan.teachers_of(unit)[:1]:
        config = plan.configure(teacher)
        path = config.network.teacher_model
        if path is None or not networks.is_given(teacher.row, config):
            return networks.describe_network(teacher.row.role, config, description)
        metadata = networks.describe_teacher(path, config, description)
        # Every fold, as the same network would teach them all.
        folds = {one.number: plan.split(replace(unit, fold=one)) for one in plan.folds}
        networks.check_unseen(path, metadata, folds)
        for split in folds.values():
            # A file does not say which of them it knows by their reference.
            seen = seen_before(split.unlabelled, metadata.seen_cases, metadata.description)
            networks.check_references(str(path), seen)
        return metadata
    return None


def _check_teachers(plan: Plan, unit: Unit) -> None:
    """Make sure that no reference that a unit shall do without reaches it by those who teach it."""
    hidden = {*plan.split(unit).unlabelled}
    for teacher in plan.with_teachers(plan.teachers_of(unit)):
        if not networks.is_given(teacher.row, plan.configure(teacher)):
            known = sorted(hidden.intersection(plan.split(teacher).train))
            networks.check_references(teacher.row.name, known)


def _begin_or_go_on(plan: Plan, console: Console) -> Plan:
    """Check the files and record them, or make sure that they are those that were recorded."""
    files, data, folds = plan.files, plan.data, folds_content(plan.folds)
    splits = [plan.split(unit) for unit in plan.units()]
    real, begun = plan.config.data.data_root is not None, files.folds.is_file()
    if not begun:
        if real:
            check_files(plan.config, data, splits, console)
        files.begin(plan.config, data.description)
    plan = replace(plan, data=make_phantoms(plan.config, data, plan.cache, console))
    # Of phantoms none, as those are made again if they are removed.
    names = {name for split in splits for name in split.names} if real else ()
    states = file_states(plan.data.named(names))
    if begun:
        files.check_unchanged(data.description, folds, states)
        return plan
    record_skipped(files, data)
    write_json(files.states, states)
    # Last, since it says that the others are there.
    write_json(files.folds, folds)
    return plan


def _fill_cache(plan: Plan, units: Sequence[Unit], console: Console) -> None:
    """Preprocess what units need, once for each set of modalities that they stack."""
    needed: dict[tuple[str, ...], dict[str, Unit]] = {}
    for unit in (unit for unit in units if not plan.is_done(unit)):
        split = plan.split(unit)
        stack = networks.stacked(plan.configure(unit).data, plan.data.description)
        needed.setdefault(stack, {}).update(dict.fromkeys((*split.train, *split.validation), unit))
    for names in needed.values():
        config = plan.configure(next(iter(names.values())))
        prepare_parts(config, plan.data, Split(tuple(names), (), ()), plan.cache, console)


def _summary(plan: Plan) -> Facts:
    """What a page of the results says, with the rows and seeds of earlier starts."""
    before = plan.files.read_plan() or Facts(plan.kind, plan.title, rows=())
    description = plan.data.description
    # Teachers of a study that were trained without a part of the subjects only teach.
    now = [row for row in plan.rows if row.kind or plan.kind != "study"]
    # Rows of earlier starts stay in the tables.
    rows = {row.name: row for row in (*before.rows, *now)}
    seeds = sorted({*before.seeds}.union(*plan.seeds.values()))
    grades = Counter(subject.grade or "not stated" for subject in plan.data.subjects.values())
    return Facts(
        kind=plan.kind,
        title=plan.title,
        rows=tuple(rows.values()),
        folds=tuple(fold.number for fold in plan.folds),
        seeds=tuple(seeds),
        dataset=description.name,
        phantom=description.phantom,
        protocol=_protocol(plan, seeds),
        grades=dict(grades),
        folds_sha256=file_digest(plan.files.folds),
        **plan.facts,
    )


def _protocol(plan: Plan, seeds: Sequence[int]) -> str:
    """In one line what decides the numbers."""
    config, description = plan.config, plan.data.description
    options, training = config.objective, config.training
    network = networks.describe_network("student", config, description)
    student, teacher = (_named(config, role) for role in ("student", "teacher"))
    repeats = len({fold.repeat for fold in plan.folds})
    cases = {name for fold in plan.folds for name in fold.split.names}
    labelled = config.data.labelled
    few = "" if labelled is None else f" ({labelled} of those in training labelled)"
    # That of a cross-validation has a name and a label of its own.
    longer = [
        f"{row.name} {row.options['epochs']}"
        for row in plan.rows
        if plan.kind == "train" and "epochs" in row.options
    ]
    temperature = str(options.temperature).removesuffix(".0")
    constants = f"lambda {options.imitation:g}, T {temperature}, alpha {options.latent_weight:g}"
    parts = [
        f"{description.name}{' (phantoms, not patients)' * description.phantom}",
        _counted(len(cases), "case") + few,
        _counted(len(plan.folds), "fold") + f" in {repeats} repeats" * (repeats > 1),
        str(plan.facts.get("case_lists", "")),
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
        f"student sees {'+'.join(network.modalities)}",
        network.geometry,
        student,
        f"teacher {teacher}" * (teacher != student),
        constants if options.objective == "kdnet" else options.objective,
        "student starts from the teacher" * (config.network.start == "teacher"),
        "augmented" * config.data.augment,
        _counted(training.epochs, "epoch") + f" ({', '.join(longer)})" * bool(longer),
        f"{training.precision}, {training.memory_format}" + ", compiled" * bool(training.compile),
    ]
    # A protocol is compared by its words, so that a changed row must show in them.
    built_in = read_rows()[0] if plan.kind == "crossval" else {}
    own = [row.name for row in plan.rows if built_in.get(row.name, row) != row]
    changed = f"; rows that are not the built-in ones: {', '.join(own)}" if own else ""
    return ", ".join(filter(None, parts)) + changed


def _named(config: Config, role: str) -> str:
    """The network of a role, with what differs from its defaults."""
    backbone, arguments = config.network.of(role)
    chosen = {
        name: "-".join(map(str, value)) if isinstance(value, list) else value
        for name, value in chosen_arguments(backbone, arguments).items()
    }
    return f"{backbone} ({config.network.activation}{', ' * bool(chosen)}{in_words(chosen)})"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
