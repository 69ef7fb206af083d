"""From a configuration to an experiment that is ready for training."""

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric
from rich.console import Console

from kdnet.configuration.config import Config
from kdnet.data.checks import Problem
from kdnet.data.description import Description
from kdnet.data.files import file_states
from kdnet.data.layouts import Subject
from kdnet.data.sampling import plane_remark
from kdnet.data.splits import Split
from kdnet.runs.devices import launch
from kdnet.runs.experiment import Experiment
from kdnet.runs.folders import out_folder
from kdnet.runs.preparation import prepare_parts
from kdnet.runs.soundness import check, check_unchanged, record_skipped, usable
from kdnet.runs.splits import split_of, without_references
from kdnet.runs.subjects import orientation_of, read_subjects, used
from kdnet.runs.trial import Performance, refuse_wrong_gradients, settle
from kdnet.runs.views import stacked
from kdnet.errors import UserError
from kdnet.files import FolderLock
from kdnet.runs.run_folder import RunFolder
from kdnet.training.runtime import Stopwatch
from kdnet.files import remove_abandoned


def open_experiment(config: Config, console: Console) -> Experiment:
    """Find, check and prepare the subjects, and choose device and settings."""
    run = RunFolder(out_folder(config))
    run.holds(config)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    refuse_wrong_gradients(config)
    fabric = launch(config, "32-true")
    console = console if fabric.is_global_zero else Console(quiet=True)
    lock = lock_for_all(run.root, fabric)
    try:
        return _open_locked(config, run, fabric, console, lock)
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def lock_for_all(root: Path, fabric: Fabric) -> FolderLock | None:
    """Let the first process hold the folder of a run, and all of them leave if it cannot."""
    lock, refusal = None, None
    if fabric.is_global_zero:
        try:
            lock = FolderLock(root)
        except UserError as error:
            refusal = str(error)
    refusal = fabric.broadcast(refusal)
    if refusal is not None:
        raise UserError(refusal)
    return lock


@dataclass(frozen=True)
class _Found:
    """The subjects of a run before they are prepared.

    Attributes:
        description: The data set.
        subjects: All that may be used, further unlabelled ones among them.
        split: Of them.
        fresh: Subjects whose files are not known to be sound yet.
        problems: Why others were left out.
    """

    description: Description
    subjects: list[Subject]
    split: Split
    fresh: list[Subject]
    problems: list[Problem]


def _open_locked(
    config: Config, run: RunFolder, fabric: Fabric, console: Console, lock: FolderLock | None
) -> Experiment:
    """Prepare an experiment in a folder that no other run uses."""
    held = run.holds(config)
    if lock is not None:
        remove_abandoned(run.root, *run.root.glob("*/"), *run.root.glob("predictions/*/"))
    earlier = run.read_summary() if held else {}
    watch = Stopwatch(earlier.get("seconds"))
    with watch.phase("data"), fabric.rank_zero_first():
        found = _find(config, run, console)
        description, subjects, split = found.description, found.subjects, found.split
        _begin_or_go_on(config, run, found, console, first=fabric.is_global_zero)
        datasets = prepare_parts(config, description, subjects, split, console)
    performance = settle(config, fabric=fabric)
    announce(console, description, split, performance, held=held)
    if remark := plane_remark(config.data, orientation_of(subjects, split)):
        console.print(remark, highlight=False, soft_wrap=True)
    return Experiment(
        config=config,
        run=run,
        # Processes and their group are those of the first one, which did not know the precision.
        fabric=launch(config, performance.precision),
        console=console,
        watch=watch,
        description=description,
        modalities=stacked(config.data, description),
        split=split,
        subjects={subject.name: subject for subject in subjects},
        datasets=datasets,
        performance=performance,
        cache_counts=earlier.get("teacher_cache", {}),
        lock=lock,
    )


def _find(config: Config, run: RunFolder, console: Console) -> _Found:
    description, subjects = read_subjects(config, run, console)
    subjects, problems = usable(config, run, description, subjects, console)
    split = split_of(config, subjects)
    checked = {subject.name for subject in subjects} if config.data.skip_invalid else set()
    subjects, split = without_references(config.data, description, subjects, split)
    fresh = [subject for subject in subjects if subject.name not in checked]
    return _Found(description, subjects, split, fresh, problems)


def _begin_or_go_on(
    config: Config, run: RunFolder, found: _Found, console: Console, *, first: bool
) -> None:
    """Check the files and record them, or make sure that they are those that were recorded."""
    description, split = found.description, found.split
    # Phantoms that were removed are made again, the same ones at another time.
    states = {} if config.data.data_root is None else file_states(used(found.subjects, split))
    if run.cases.is_file():
        check_unchanged(run, description, split)
        run.check_files(states)
    elif first:
        check(config.data, description, found.fresh, split, console)
        run.begin(config)
        record_skipped(config, run, found.problems)
        run.write_description(description)
        run.write_files(states)
        split.save(run.cases)


def announce(
    console: Console,
    description: Description,
    split: Split,
    performance: Performance,
    *,
    held: bool,
) -> None:
    """Say what will be done."""
    phantom = " (phantom subjects, not patients)" if description.phantom else ""
    console.print(
        f"{description.name}{phantom}: {len(split.train)} training, "
        + f"{len(split.unlabelled)} unlabelled, " * bool(split.unlabelled)
        + f"{len(split.validation)} validation, {len(split.test)} held-out subjects; {performance}",
        highlight=False,
        soft_wrap=True,
    )
    if held:
        console.print(
            "This run folder holds this run already: it goes on.", highlight=False, soft_wrap=True
        )
