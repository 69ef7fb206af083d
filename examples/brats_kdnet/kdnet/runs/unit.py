"""One unit: one row trained on one fold and scored on its held-out subjects."""

from dataclasses import replace

import torch
from rich.console import Console

from kdnet.configuration.config import Config
from kdnet.runs.folder import waiting_for
from kdnet.runs.plan import Plan, Unit
from kdnet.evaluation.postprocessing import SMALLEST_VOLUME
from kdnet.evaluation.scoring import write_scores
from kdnet.runs.devices import launch
from kdnet.runs.experiment import Experiment
from kdnet.runs.networks import build, describe_network
from kdnet.runs.preparation import prepare_parts
from kdnet.runs.soundness import check_unchanged
from kdnet.runs.splits import without_references
from kdnet.runs.subjects import read_subjects
from kdnet.runs.views import stacked
from kdnet.runs.held_out import score_network, score_subsets, score_with
from kdnet.recipes.rows import Row
from kdnet.runs.run_folder import RunFolder
from kdnet.runs.teaching import load_trained, teach
from kdnet.runs.trial import Performance, performance_of
from kdnet.training.runtime import Stopwatch, device_type, unsafe_in_bf16


def run_unit(plan: Plan, unit: Unit, console: Console) -> None:
    """Train and score a unit, after its teacher; do nothing if that is done."""
    if plan.is_done(unit):
        return
    teachers = plan.teachers_of(unit)
    for teacher in teachers:
        run_unit(plan, teacher, console)
    run = plan.folder(unit)
    run.role(run.part).mkdir(parents=True, exist_ok=True)
    with waiting_for(run.role(run.part) / ".lock", f"{unit.name} is trained", console):
        if not plan.is_done(unit):
            _train_and_score(plan, unit, teachers, console)


def _train_and_score(plan: Plan, unit: Unit, teachers: list[Unit], console: Console) -> None:
    with open_unit(plan, unit, console) as experiment:
        files = [plan.folder(teacher).model(teacher.row.name) for teacher in teachers]
        experiment.teacher_files = tuple(files)
        networks = []
        for teacher, path in zip(teachers, files, strict=True):
            own = teacher.row.configure(plan.configure(teacher)).network
            networks.append(load_trained(experiment, path, own.vouched(own=True)))
        teach(experiment, unit.row, *networks)
        with experiment.watch.phase("evaluation"):
            score(experiment, unit.row, subsets=plan.subsets)


def score(experiment: Experiment, row: Row, *, subsets: bool) -> None:
    """Score the network of a row on the held-out subjects and keep the scores."""
    run = experiment.run
    flexible = row.recipe == "missing_modality"
    if flexible and subsets:
        write_scores(run.subsets, score_subsets(experiment, row.name))
    # Native label maps are scored as they are, and without what is too small to be believed.
    limit = SMALLEST_VOLUME
    scores = (
        score_with(experiment, row.name, experiment.view("student"), smallest_volume=limit)
        if flexible
        else score_network(experiment, row.name, smallest_volume=limit)
    )
    # Last, since it says that the unit is done.
    write_scores(run.part_scores, scores)


def open_unit(plan: Plan, unit: Unit, console: Console) -> Experiment:
    """Open the experiment of a unit in the folder that the plan has prepared."""
    config = unit.row.configure(plan.configure(unit))
    run = plan.folder(unit)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    performance = settled(plan, unit, config, console)
    fabric = launch(config, performance.precision)
    earlier = run.read_summary()
    watch = Stopwatch(earlier.get("seconds"))
    with watch.phase("data"):
        # Phantoms are those of the plan, whatever the seed of the unit.
        description, subjects = read_subjects(plan.config, RunFolder(plan.root), console)
        check_unchanged(run, description, unit.fold.split)
        subjects, split = without_references(config.data, description, subjects, unit.fold.split)
        datasets = prepare_parts(config, description, subjects, split, console)
    return Experiment(
        config=config,
        run=run,
        fabric=fabric,
        console=console,
        watch=watch,
        description=description,
        modalities=stacked(config.data, description),
        split=split,
        subjects={subject.name: subject for subject in subjects},
        datasets=datasets,
        performance=performance,
        cache_counts=earlier.get("teacher_cache", {}),
    )


def settled(plan: Plan, unit: Unit, config: Config, console: Console) -> Performance:
    """Return how the plan takes steps, in 32-true where bf16 would be wrong for this network."""
    shared = RunFolder(plan.root)
    choice = performance_of(shared.resolved(), shared.environment)
    if choice.precision != "bf16-mixed" or device_type(config.training.accelerator) != "cpu":
        return choice
    description, _ = read_subjects(plan.config, RunFolder(plan.root), console)
    metadata = describe_network(unit.row.role, config, description)
    if not unsafe_in_bf16(build(metadata), (1, metadata.in_channels, *metadata.input_size)):
        return choice
    console.print(f"{unit.name}: in 32-true, as bf16 gradients would be wrong", highlight=False)
    return replace(choice, precision="32-true")
