"""One unit: a network is built, trained as its row says, and scored on its held-out subjects."""

import itertools
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from kdnet.config import Config, ObjectiveConfig
from kdnet.data import samples
from kdnet.data.loading import build_loader
from kdnet.data.splits import Split
from kdnet.errors import UserError, explained
from kdnet.evaluation.inference import volume_predictor
from kdnet.evaluation.postprocessing import SMALLEST_VOLUME
from kdnet.evaluation.scoring import evaluate, write_scores
from kdnet.files import file_digest
from kdnet.recipes import Recipe, recipe_of
from kdnet.runs import networks
from kdnet.runs.folder import UnitFolder, locked
from kdnet.runs.plan import Plan, Unit
from kdnet.runs.preparation import experiment_of
from kdnet.runs.subjects import DataSet, orientation_of, prepare_parts
from kdnet.training import checkpoint
from kdnet.training.diagnosis import fitted_temperature, show_diagnosis
from kdnet.training.loop import fit
from kdnet.training.runtime import peak_memory, shard, timed, torch_format
from privdistill import Ensemble, PrivilegedInput, TeacherCache


def run_unit(plan: Plan, unit: Unit, console: Console) -> None:
    """Train and score a unit, after its teachers; do nothing if that is done."""
    fabric = launch(plan.configure(unit))
    console = console if fabric.is_global_zero else Console(quiet=True)
    done = fabric.broadcast(plan.is_done(unit))
    for teacher in [] if done else plan.teachers_of(unit):
        run_unit(plan, teacher, console)
    plan.folder(unit).check_teachers({t.name: plan.folder(t).model for t in plan.teachers_of(unit)})
    if done:
        return
    with held_by_first(plan.folder(unit), unit.name, fabric, console):
        # Another process may have done it meanwhile.
        if not fabric.broadcast(plan.is_done(unit)):
            with opened(plan, unit, fabric, console) as experiment:
                train(experiment)
                if fabric.is_global_zero:
                    score(experiment, subsets=plan.subsets)


def launch(config: Config) -> Fabric:
    """Start Fabric, and its processes if there are several; once more, it finds them."""
    training = config.training
    if training.threads:
        torch.set_num_threads(training.threads)
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)
    # It would announce the precision once more.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    if training.strategy == "fsdp" and (training.compile or training.precision == "16-mixed"):
        raise UserError(
            "--strategy fsdp spreads weights over processes, for which neither --compile true nor "
            "--precision 16-mixed is built here. Use --compile false, and bf16-mixed or 32-true; "
            "or --strategy ddp."
        )
    # The others wait while the first process reads and preprocesses: hours for 100,000 subjects.
    patience = timedelta(days=1)
    strategies: dict[str, Any] = {
        "ddp": DDPStrategy(timeout=patience),
        "fsdp": ModelParallelStrategy(shard, timeout=patience),
    }
    try:
        fabric = Fabric(
            accelerator=training.accelerator,
            devices=training.devices,
            num_nodes=training.num_nodes,
            strategy=strategies.get(training.strategy, training.strategy),
            precision=training.precision,
        )
        fabric.launch()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"Lightning Fabric cannot start: {error}") from error
    return fabric


@contextmanager
def held_by_first(
    folder: UnitFolder, name: str, fabric: Fabric, console: Console
) -> Iterator[None]:
    """Let the first process hold the folder of a unit until all of them have left it."""
    lock = locked(folder.root / ".lock", f"{name} is trained", console)
    with lock if fabric.is_global_zero else nullcontext():
        fabric.barrier()
        yield
        fabric.barrier()


@dataclass
class Experiment:
    """One unit, ready for training.

    Attributes:
        plan: Its run.
        unit: Row, fold and seed.
        config: The resolved configuration.
        fabric: Launched.
        console: Where progress is shown.
        seconds: Time per phase, that of earlier starts included.
        split: Names of training, validation, test and unlabelled subjects.
        datasets: Preprocessed training, validation and unlabelled subjects.
        cache: What its teachers said; None without one.
        temperature: What was fitted to its teachers; None as long as it was not.
        objective: In words with that temperature; empty where none is fitted.
    """

    plan: Plan
    unit: Unit
    config: Config
    fabric: Fabric
    console: Console
    seconds: dict[str, float]
    split: Split
    datasets: dict[str, Any]
    cache: TeacherCache | None = None
    temperature: float | None = None
    objective: str = ""

    @property
    def data(self) -> DataSet:
        """The data set."""
        return self.plan.data

    @property
    def folder(self) -> UnitFolder:
        """Where its files go."""
        return self.plan.folder(self.unit)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the subjects' images stack, in channel order."""
        return networks.stacked(self.config.data, self.data.description)

    @property
    def teacher_files(self) -> list[Path]:
        """Model files of its teachers."""
        return [self.plan.folder(teacher).model for teacher in self.plan.teachers_of(self.unit)]

    @property
    def seen_by_teachers(self) -> list[tuple[str, ...]]:
        """Names of the subjects that each of its teachers has seen."""
        return [checkpoint.read_metadata(path).seen_cases for path in self.teacher_files]

    def record(self) -> None:
        """Write what is trained and what it has taken so far to unit.json."""
        teachers = {t.name: self.plan.folder(t).model for t in self.plan.teachers_of(self.unit)}
        content = self.folder.read_record() | {
            "experiment": experiment_of(self.plan, self.unit),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "peak_mib": peak_memory(),
            "teachers": {
                name: checkpoint.network_digest(model) for name, model in teachers.items()
            },
            "device": str(self.fabric.device),
            "processes": self.fabric.world_size,
        }
        if self.cache is not None:
            # Of this start and the first process.
            content["teacher_cache"] = asdict(self.cache.statistics)
        if self.temperature is not None:
            content["temperature"] = self.temperature
        if self.objective:
            content["objective"] = self.objective
        self.folder.write_record(content)

    def metadata(self) -> checkpoint.ModelMetadata:
        """Describe the network as its model file will, with all that it or its teachers saw."""
        row, split = self.unit.row, self.split
        seen = [*split.train, *split.validation]
        if row.teachers:
            seen += [*split.unlabelled, *itertools.chain(*self.seen_by_teachers)]
        train = self.datasets["train"]
        nonzero = dict(zip(self.modalities, train.typical("nonzero"), strict=True))
        view = networks.view_of(row.role, self.config.data, self.data.description)
        return replace(
            networks.describe_network(row.role, self.config, self.data.description, row.name),
            orientation=orientation_of(self.data, split),
            spacing=train.typical("spacing"),
            nonzero=tuple(nonzero[name] for name in view),
            seen_cases=tuple(dict.fromkeys(seen)),
            any_subset=row.recipe == "missing_modality",
        )

    def loader(
        self, part: Literal["train", "validation"], *, unlabelled: bool = False
    ) -> Any | None:
        """Return batches of a part of the training folds."""
        data, training = self.config.data, self.config.training
        if not getattr(self.split, part):
            return None
        subjects = self.datasets[part]
        mixed = unlabelled and bool(self.split.unlabelled)
        if mixed:
            # Before they are cut, as samples that move have addresses that no other data set knows.
            subjects = ConcatDataset([subjects, self.datasets["unlabelled"]])
        trains, on_cpu = part == "train", self.fabric.device.type == "cpu"
        return build_loader(
            samples.samples_of(subjects, data, training.seed, training=trains),
            training.batch_size,
            shuffle=trains,
            seed=training.seed,
            flips=trains and data.flips,
            moves=trains and samples.moves(data),
            augmented=trains and data.augment,
            per_epoch=training.samples_per_epoch,
            mixed=mixed,
            # On a CPU the processors are better spent on the training itself.
            workers=0 if on_cpu else min(4, networks.workers(data)),
            replicas=self.fabric.world_size,
            rank=self.fabric.global_rank,
        )


@contextmanager
def opened(plan: Plan, unit: Unit, fabric: Fabric, console: Console) -> Iterator[Experiment]:
    """Prepare a unit's subjects, and record what it took however it ends."""
    config, split = plan.configure(unit), plan.split(unit)
    folder = plan.folder(unit)
    folder.check_experiment(experiment_of(plan, unit))
    earlier = folder.read_record()
    seconds = dict(earlier.get("seconds", {}))
    with timed(seconds, "data"), fabric.rank_zero_first():
        datasets = prepare_parts(config, plan.data, split, plan.cache, console)
    experiment = Experiment(
        *(plan, unit, config, fabric, console, seconds, split, datasets),
        temperature=earlier.get("temperature"),
    )
    try:
        if fabric.is_global_zero:
            experiment.record()
        yield experiment
    finally:
        # Also after an interruption, so that the continuation adds to these times.
        if fabric.is_global_zero:
            experiment.record()


def train(experiment: Experiment) -> None:
    """Train the network of a unit, unless that is done."""
    unit, console, folder = experiment.unit, experiment.console, experiment.folder
    if checkpoint.is_finished(folder):
        console.print(f"{unit.name}: trained, read from {folder.model}", soft_wrap=True)
        return
    if networks.is_given(unit.row, experiment.config):
        adopt_teacher(experiment, cast("Path", experiment.config.network.teacher_model))
        return
    announce(experiment)
    # Again for every network, so that its weights do not depend on what was built before.
    experiment.fabric.seed_everything(experiment.config.training.seed, verbose=False)
    metadata, training = experiment.metadata(), experiment.config.training
    layout = torch_format(training.memory_format, len(metadata.input_size))
    network = networks.build(metadata).to(memory_format=layout)
    teachers = load_teachers(experiment)
    if training.compile:
        # What was compiled for an earlier network of this class knows nothing of this one's taps.
        torch.compiler.reset()
        parts = (cast("nn.Module", torch.compile(part)) for part in (network, *teachers))
        network, *teachers = parts
    config = replace(experiment.config, objective=options_for(experiment, teachers))
    setting = networks.setting_of(unit.row, config, experiment.data.description, network, teachers)
    with timed(experiment.seconds, "training"), explained(f"The training of {unit.name}"):
        recipe = recipe_of(unit.row, setting)
        experiment.objective = "" if experiment.temperature is None else str(recipe.objective)
        teach(experiment, recipe, metadata)
    if experiment.fabric.is_global_zero:
        # A kill in what follows must not cost these times.
        experiment.record()


def options_for(experiment: Experiment, teachers: Sequence[nn.Module]) -> ObjectiveConfig:
    """The objective's options, with a temperature that fits its teachers where that was asked."""
    config = experiment.config
    options = config.objective
    softened = options.objective == "kdnet" and (options.imitation or options.imitation_start)
    if options.temperature != "fit" or not softened or not teachers:
        return options
    # Found once: a training that goes on has the temperature that it began with.
    if experiment.temperature is None:
        inputs = PrivilegedInput(
            experiment.modalities,
            student=networks.view_of("student", config.data, experiment.data.description),
            teacher=networks.view_of("teacher", config.data, experiment.data.description),
        )
        found = fitted_temperature(
            experiment.fabric,
            teachers,
            experiment.loader("train", unlabelled=True) or (),
            inputs,
            config.network.activation,
        )
        experiment.temperature = 1.0 if found is None else found
        text = (
            "temperature 1, as its teacher predicts nothing in the first batches, to which none "
            "fits: train it longer, or with more labelled subjects"
            if found is None
            else f"temperature {found:g}, fitted to its teacher"
        )
        experiment.console.print(f"{experiment.unit.name}: {text}", soft_wrap=True)
        # At once, as another number of devices would fit another one after a kill.
        if experiment.fabric.is_global_zero:
            experiment.record()
    return replace(options, temperature=experiment.temperature)


def announce(experiment: Experiment) -> None:
    """Say what will be trained on whom."""
    data, split, training = experiment.data, experiment.split, experiment.config.training
    remarks = [
        f"{experiment.unit.name}: {data.description.name}"
        + " (phantom subjects, not patients)" * data.description.phantom
        + f", {len(split.train)} training, "
        + f"{len(split.unlabelled)} unlabelled, " * bool(split.unlabelled)
        + f"{len(split.validation)} validation, {len(split.test)} held-out subjects; "
        f"{training.precision}, {training.memory_format}" + ", compiled" * bool(training.compile),
        samples.plane_remark(experiment.config.data, orientation_of(data, split)),
    ]
    for remark in filter(None, remarks):
        experiment.console.print(remark, soft_wrap=True)


def teach(experiment: Experiment, recipe: Recipe, metadata: checkpoint.ModelMetadata) -> None:
    """Put teacher and student together, and train."""
    config, fabric = experiment.config, experiment.fabric
    experiment.cache = teacher_cache(experiment, recipe.teacher)
    in_parts = metadata.patch is not None or metadata.slices is not None
    with networks.wrapped(recipe, metadata, experiment.modalities, experiment.cache) as kd:
        task = checkpoint.Task(
            metadata=metadata,
            settings=config.training,
            folder=experiment.folder,
            console=experiment.console,
            volumes=experiment.datasets["validation"] if in_parts else None,
            seen_by_teachers=tuple(map(frozenset, experiment.seen_by_teachers)),
            options=config.to_dict(),
        )
        batches = experiment.loader("train", unlabelled=recipe.teacher is not None)
        if recipe.teacher is not None and experiment.plan.kind == "train":
            show_diagnosis(fabric, kd, batches or (), task)
        fit(fabric, kd, batches, experiment.loader("validation"), task)


def load_teachers(experiment: Experiment) -> list[nn.Module]:
    """Read the trained networks of a unit's teachers, which have not seen its held-out subjects."""
    found = []
    for path in experiment.teacher_files:
        network, metadata = checkpoint.load_model(path, trusted=experiment.plan.trusted)
        networks.check_unseen(path, metadata, {experiment.unit.fold.number: experiment.split})
        found.append(network)
    return found


def adopt_teacher(experiment: Experiment, path: Path) -> None:
    """Take a trained teacher from a file into the unit's folder."""
    config, folder = experiment.config, experiment.folder
    metadata = networks.describe_teacher(path, config, experiment.data.description)
    networks.check_unseen(path, metadata, {experiment.unit.fold.number: experiment.split})
    network, _ = checkpoint.load_model(path, trusted=config.network.vouched(own=False))
    if experiment.fabric.is_global_zero:
        # Whatever its own run called it, it is this run's teacher.
        own = replace(metadata, role=experiment.unit.row.name)
        checkpoint.save_model(folder.model, network, own)
        files = {folder.model.name: file_digest(folder.model)}
        checkpoint.save_state(
            folder.state,
            {"finished": True, "epoch": metadata.epoch, "files": files},
        )
    experiment.fabric.barrier()
    experiment.console.print(f"{experiment.unit.name}: read from {path}", soft_wrap=True)


def teacher_cache(
    experiment: Experiment, teacher: nn.Module | Ensemble | None
) -> TeacherCache | None:
    """Open the place where the teacher's outputs are kept."""
    data, training = experiment.config.data, experiment.config.training
    parts = teacher.networks if isinstance(teacher, Ensemble) else [teacher]
    place = training.teacher_cache
    if place == "auto":
        on_gpu = experiment.fabric.device.type == "cuda"
        place = "off" if on_gpu or not samples.comes_back(data) else "disk"
    if not any(True for n in parts if n is not None for _ in n.parameters()):
        return None
    if place == "off":
        return None
    if not samples.comes_back(data):
        experiment.console.print(
            "Teacher cache: off, as augmented samples, and patches at new positions in every "
            "epoch, do not come back; with --augment false and --patches-per-case N they do.",
            soft_wrap=True,
        )
        return None
    return TeacherCache(
        experiment.plan.cache / "teacher" if place == "disk" else None,
        storage=training.teacher_cache_storage,
        max_bytes=int(training.teacher_cache_gib * 2**30),
    )


def score(experiment: Experiment, *, subsets: bool) -> None:
    """Score the trained network on the held-out subjects; the scores say that the unit is done."""
    folder, row = experiment.folder, experiment.unit.row
    with timed(experiment.seconds, "evaluation"):
        network, metadata = checkpoint.load_model(folder.model, trusted=experiment.plan.trusted)
        every = seen = metadata.modalities
        if row.recipe == "missing_modality":
            seen = networks.view_of("student", experiment.config.data, experiment.data.description)
        if row.recipe == "missing_modality" and subsets:
            parts = [
                score_view(experiment, network, metadata, view)
                for size in range(1, len(every) + 1)
                for view in itertools.combinations(every, size)
            ]
            write_scores(folder.subsets, pd.concat(parts, ignore_index=True))
        scores = score_view(experiment, network, metadata, seen, keep=True)
    write_scores(folder.scores, scores)


def score_view(
    experiment: Experiment,
    network: nn.Module,
    metadata: checkpoint.ModelMetadata,
    seen: Collection[str],
    *,
    keep: bool = False,
) -> pd.DataFrame:
    """Score a network that sees some of its modalities, the others set to zero."""
    config, folder, view = experiment.config, experiment.folder, "+".join(seen)
    subjects = experiment.data.named(experiment.split.test)
    device = experiment.fabric.device
    predict = volume_predictor(
        network, device, metadata.example, patch=metadata.patch, slices=metadata.slices
    )
    unit, split = experiment.unit, experiment.split
    further = {*metadata.seen_cases} - {*split.train, *split.validation}
    place = {
        "row": unit.row.name,
        "fold": unit.fold.number,
        "seed": unit.seed,
        "labelled": len(split.train),
        "unlabelled": len(further) if unit.row.teachers else 0,
        "against": unit.row.against or "",
        "modalities": view,
    }
    console, title = experiment.console, f"Scoring {unit.row.name} with {view}"
    return evaluate(
        hiding(predict, metadata.modalities, seen),
        track(subjects, title, console=console, transient=True, disable=not console.is_terminal),
        replace(metadata, description=experiment.data.description).preprocessing(),
        metadata.activation,
        unit=place,
        # Native label maps are scored as they are, and without what is too small.
        smallest_volume=SMALLEST_VOLUME if keep else None,
        prediction_folder=folder.predictions if keep and config.run.predictions else None,
    )


def hiding(
    predict: Callable[[Tensor], Tensor], modalities: Sequence[str], seen: Collection[str]
) -> Callable[[Tensor], Tensor]:
    """Set the modalities that are not seen to zero before a network gets them."""
    kept = torch.tensor([modality in seen for modality in modalities])
    if bool(kept.all()):
        return predict

    def of_seen(image: Tensor) -> Tensor:
        mask = kept.reshape(1, -1, *[1] * (image.ndim - 2))
        return predict(torch.where(mask, image, 0.0))

    return of_seen
