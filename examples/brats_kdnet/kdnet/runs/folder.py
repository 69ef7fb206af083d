"""The folder of a cross-validation: opened once, prepared for all units, and checked ever after."""

import hashlib
import json
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from kdnet.configuration.config import Config
from kdnet.runs.folds import Fold, deal, load_folds, save_folds
from kdnet.runs.jobs import number_of_jobs
from kdnet.runs.plan import CrossvalOptions, Plan
from kdnet.data.checks import Problem
from kdnet.data.description import Description
from kdnet.data.files import States, file_states
from kdnet.data.layouts import Subject
from kdnet.data.splits import Split
from kdnet.errors import UserError
from kdnet.runs.networks import describe_network
from kdnet.runs.preparation import prepare_parts
from kdnet.runs.soundness import check, check_unchanged, record_skipped, usable
from kdnet.runs.splits import without_references
from kdnet.runs.subjects import find_description, read_subjects
from kdnet.runs.trial import performance_asked, performance_of
from kdnet.runs.views import stacked, view_of
from kdnet.models.trust import check_trusted
from kdnet.files import is_name
from privdistill import PrivDistillError
from kdnet.files import UnreadableError
from kdnet.files import read_json as parsed_json
from kdnet.recipes.out_of_fold import with_part_teachers
from kdnet.recipes.rows import Row, read_rows, select_rows, sweep
from kdnet.runs.run_folder import RunFolder
from kdnet.runs.teaching import rehearse
from kdnet.training.checkpoint import check_compatible, read_metadata
from kdnet.files import write_text


def open_plan(
    config: Config,
    options: CrossvalOptions,
    console: Console,
    *,
    rows: tuple[Row, ...] | None = None,
    own_seeds: Mapping[str, tuple[int, ...]] | None = None,
) -> Plan:
    """Resolve a cross-validation, and begin its folder or check that it goes on unchanged."""
    root = config.run.out or Path("runs/crossval")
    # Each row says how it is taught.
    taught = replace(config.objective, recipe="options")
    config = replace(config, objective=taught, run=replace(config.run, out=root))
    _refuse(config)
    _refuse_options(config, options)
    rows = _rows(config, options) if rows is None else with_part_teachers(rows, config)
    run = RunFolder(root)
    run.holds(config)
    known = _definitions(root, rows)
    rehearse_rows(config, rows, console, known=known)
    root.mkdir(parents=True, exist_ok=True)
    with waiting_for(root / ".lock", "the folder is being prepared", console):
        run.holds(config)
        held = (root / "folds.json").is_file()
        description, subjects = read_subjects(config, run, console)
        subjects, problems = usable(config, run, description, subjects, console)
        plan = _resolve(config, options, rows, description, subjects)
        plan = replace(plan, own_seeds=own_seeds or {})
        if held:
            _check_held(plan, run, description)
            run.check_files(_states(plan, subjects))
        else:
            _begin(plan, run, description, subjects, console=console, problems=problems)
        _complete(plan, description, subjects, console)
    return plan


@contextmanager
def waiting_for(path: Path, reason: str, console: Console) -> Iterator[None]:
    """Hold a lock, and say so if another process has it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"Waiting: {reason} by another process.", highlight=False)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def rehearse_rows(
    config: Config, rows: Sequence[Row], console: Console, *, known: Container[str] = ()
) -> None:
    """Put the networks of every row together once, before anything is written or trained."""
    by_name = {row.name: row for row in rows}
    for row in (row for row in rows if row.name not in known):
        console.print(f"Trying {row.name}", highlight=False)
        own = row.configure(config)
        teacher = None
        if row.teacher is not None:
            other = by_name[row.teacher].configure(config)
            role = by_name[row.teacher].role
            teacher = describe_network(role, other, find_description(other))
        try:
            _check_scored_view(own, row)
            rehearse(own, row, teacher)
        except (UserError, PrivDistillError) as error:
            raise UserError(f"Row {row.name!r}: {error}") from error


def _check_scored_view(config: Config, row: Row) -> None:
    """Refuse a network for any subset that never sees what it will be scored with."""
    if row.recipe != "missing_modality":
        return
    description = find_description(config)
    trained, scored = (view_of(role, config.data, description) for role in (row.role, "student"))
    unseen = [modality for modality in scored if modality not in trained]
    if unseen:
        raise UserError(
            f"its network is trained with {', '.join(trained)} (--teacher_modalities) and scored "
            f"with {', '.join(scored)} (--student_modalities), so that it would never have seen "
            f"{', '.join(unseen)}. Give the teacher's modalities those of the student, too."
        )


def _refuse(config: Config) -> None:
    refused = {
        "--split_file": config.data.split_file is not None,
        "--fold": config.data.fold != 0,
        "--devices": config.training.devices not in {1, "auto"},
        "--num_nodes": config.training.num_nodes != 1,
    }
    for flag, given in refused.items():
        if given:
            raise UserError(
                f"crossval.py does not take {flag}: it trains every fold, each unit on one device. "
                "Case lists of your own: --folds_file. One unit: --unit. A single fold on several "
                "devices: train.py."
            )


def _refuse_options(config: Config, options: CrossvalOptions) -> None:
    seeds = options.seeds
    problems = {
        f"--repeats is {options.repeats}; expected 1 or more": options.repeats < 1,
        "--rows names no row": not options.rows,
        f"--seeds names a seed twice: {', '.join(map(str, seeds))}": len({*seeds}) < len(seeds),
        f"--seeds must be 0 or more, below 2^32: {seeds}": any(not 0 <= s < 2**32 for s in seeds),
    }
    number_of_jobs(options.jobs, config.training.accelerator)
    for problem, found in problems.items():
        if found:
            raise UserError(f"{problem}.")


def _rows(config: Config, options: CrossvalOptions) -> tuple[Row, ...]:
    rows = select_rows(options.rows, *read_rows(options.rows_file))
    if options.sweep == "modalities":
        data = config.data
        modalities = tuple(find_description(config).modalities)
        rows = sweep(
            rows, modalities if data.teacher_modalities is None else data.teacher_modalities
        )
    return with_part_teachers(rows, config)


def _resolve(
    config: Config,
    options: CrossvalOptions,
    rows: tuple[Row, ...],
    description: Description,
    subjects: list[Subject],
) -> Plan:
    folds = (
        load_folds(options.folds_file, subjects, validation=config.data.validation_fraction > 0)
        if options.folds_file is not None
        else deal(
            subjects,
            folds=config.data.folds,
            repeats=options.repeats,
            validation_fraction=config.data.validation_fraction,
            seed=config.training.seed,
        )
    )
    plan = Plan(
        config=config,
        rows=rows,
        folds=tuple(folds),
        seeds=options.seeds or (config.training.seed,),
        subsets=options.subsets,
    )
    _check_teacher(config, folds, description)
    return plan


def _check_teacher(config: Config, folds: Sequence[Fold], description: Description) -> None:
    """Refuse a given teacher that has seen what any fold tests."""
    path = config.network.teacher_model
    if path is None:
        return
    metadata = read_metadata(path)
    trusted = config.network.vouched(own=False)
    check_trusted(str(path), metadata.backbone, metadata.backbone_arguments, trusted)
    check_compatible(path, metadata, describe_network("teacher", config, description))
    for fold in folds:
        leaked = sorted({*metadata.seen_cases} & {*fold.split.test})
        if leaked:
            raise UserError(
                f"--teacher_model: {path} was trained on {len(leaked)} test subjects of fold "
                f"{fold.number}: {', '.join(leaked[:5])}. Its knowledge of them would reach the "
                "scores. Leave the option out: every fold then trains its own teacher."
            )


def _check_held(plan: Plan, run: RunFolder, description: Description) -> None:
    """Refuse to go on with other folds or another description than the folder began with."""
    before = read_json(run.root / "folds.json").get("folds")
    now = [{"repeat": fold.repeat, **fold.split.to_dict()} for fold in plan.folds]
    if json.loads(json.dumps(now)) != before:
        raise UserError(
            f"{run.root}: the folds have changed since this cross-validation began "
            f"({len(before or ())} then, {len(now)} now, or other cases in them). Restore the data "
            "set and the options of the folds, or choose another --out."
        )
    if not run.has_description(description):
        raise UserError(
            f"{run.root}: the description of the data set has changed since this cross-validation "
            "began. Restore it, or choose another --out."
        )


def _begin(
    plan: Plan,
    run: RunFolder,
    description: Description,
    subjects: list[Subject],
    *,
    console: Console,
    problems: Sequence[Problem],
) -> None:
    skip = plan.config.data.skip_invalid
    checked = {subject.name for subject in subjects} if skip else set()
    states = _states(plan, subjects)
    every = Split(tuple(sorted(_used(plan))), (), ())
    further = replace(plan.config.data, labelled=None, unlabelled=None)
    subjects, every = without_references(further, description, subjects, every)
    fresh = [subject for subject in subjects if subject.name not in checked]
    check(plan.config.data, description, fresh, every, console)
    run.begin(plan.config)
    record_skipped(plan.config, run, problems)
    run.write_description(description)
    run.write_files(states)
    _note_performance(plan, run, console)
    # Last, since it says that the others are there.
    save_folds(run.root / "folds.json", plan.folds)


def _states(plan: Plan, subjects: Sequence[Subject]) -> States:
    """The files of all folds; of phantoms none, as those are made again if they are removed."""
    if plan.config.data.data_root is None:
        return {}
    names = _used(plan)
    return file_states(subject for subject in subjects if subject.name in names)


def _note_performance(plan: Plan, run: RunFolder, console: Console) -> None:
    """Note how steps are taken; all rows take them so."""
    choice = performance_asked(plan.config.training)
    run.write_environment(seed=plan.config.training.seed, resolved=asdict(choice))
    console.print(f"Training steps: {choice}", highlight=False)


def _complete(
    plan: Plan, description: Description, subjects: list[Subject], console: Console
) -> None:
    """Make what new rows, folds and seeds need, and note them."""
    for unit in plan.units():
        place = RunFolder(plan.folder(unit).root)
        if place.cases.is_file():
            check_unchanged(place, description, unit.fold.split)
            continue
        place.begin(plan.configure(unit))
        place.write_description(description)
        unit.fold.split.save(place.cases)
    stacks = {}
    for row in plan.rows:
        own = replace(row.configure(plan.config), run=plan.config.run)
        own = replace(own, data=replace(own.data, cache_dir=plan.cache))
        stacks[stacked(own.data, description)] = own
    everyone = Split(tuple(sorted(_used(plan))), (), ())
    for own in stacks.values():
        prepare_parts(own, description, subjects, everyone, console)
    write_text(
        plan.root / "crossval.json", json.dumps(_summary(plan, description, subjects), indent=2)
    )


def _used(plan: Plan) -> set[str]:
    parts = ("train", "validation", "test")
    return {name for fold in plan.folds for part in parts for name in getattr(fold.split, part)}


def _definitions(root: Path, rows: Sequence[Row]) -> dict[str, Row]:
    """Rows that the folder knows; refuse one that has changed."""
    # Read as rows, so that what rows could not say then has its present default.
    known = {name: Row(**row) for name, row in read_summary(root).get("definitions", {}).items()}
    changed = [row.name for row in rows if _plain(known.get(row.name, row)) != _plain(row)]
    if changed:
        raise UserError(
            f"--out: {root} holds other rows under the names {', '.join(changed)}. Give them "
            "other names, or choose another --out."
        )
    return known


def read_summary(root: Path) -> dict[str, Any]:
    """Return crossval.json of a folder; empty if there is none."""
    path = root / "crossval.json"
    content = read_json(path) if path.is_file() else {}
    # They become folders below this one.
    names = (*content.get("rows", ()), *content.get("definitions", ()))
    if not all(map(is_name, names)):
        raise UserError(f"{path} is damaged: it has rows whose names cannot be those of folders.")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read one of the files that describe a cross-validation."""
    try:
        content = parsed_json(path)
    except UnreadableError as error:
        raise UserError(f"{path} is damaged and cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: expected keys and values.")
    return content


def _plain(row: Row) -> dict[str, Any]:
    return dict(json.loads(json.dumps(asdict(row))))


def _summary(plan: Plan, description: Description, subjects: Sequence[Subject]) -> dict[str, Any]:
    before = read_summary(plan.root)
    names = dict.fromkeys((*before.get("rows", []), *(row.name for row in plan.rows)))
    own = {seed for seeds in plan.own_seeds.values() for seed in seeds}
    seeds = sorted({*before.get("seeds", []), *(own or plan.seeds)})
    return {
        "rows": list(names),
        "labels": before.get("labels", {}) | {row.name: row.label for row in plan.rows},
        "definitions": before.get("definitions", {}) | {row.name: _plain(row) for row in plan.rows},
        "folds": len(plan.folds),
        "seeds": seeds,
        "dataset": description.name,
        "phantom": description.phantom,
        "protocol": _protocol(plan, description, seeds),
        "grades": dict(Counter(subject.grade or "not stated" for subject in subjects)),
        "folds_sha256": hashlib.sha256((plan.root / "folds.json").read_bytes()).hexdigest(),
    }


def _protocol(plan: Plan, description: Description, seeds: Sequence[int]) -> str:
    config, options = plan.config, plan.config.objective
    network = describe_network("student", config, description)
    run = RunFolder(plan.root)
    chosen = run.resolved()
    repeats = len({fold.repeat for fold in plan.folds})
    phantom = " (phantoms, not patients)" if description.phantom else ""
    constants = (
        f"lambda {options.imitation:g}, T {options.temperature:g}, alpha {options.latent_weight:g}"
    )
    parts = [
        f"{description.name}{phantom}",
        _counted(len(_used(plan)), "case"),
        _counted(len(plan.folds), "fold") + f" in {repeats} repeats" * (repeats > 1),
        f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}",
        f"student sees {'+'.join(network.modalities)}",
        network.geometry,
        f"{network.backbone} ({network.activation})",
        constants if options.objective == "kdnet" else options.objective,
        _counted(config.training.epochs, "epoch"),
        str(performance_of(chosen, run.environment)),
    ]
    changed = _redefined(plan.rows)
    return ", ".join(parts) + f"; rows that are not the built-in ones: {changed}" * bool(changed)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _redefined(rows: Sequence[Row]) -> str:
    """Rows of the user's own under a built-in name, which tables would take for the paper's."""
    built_in, _ = read_rows()
    return ", ".join(row.name for row in rows if built_in.get(row.name, row) != row)
