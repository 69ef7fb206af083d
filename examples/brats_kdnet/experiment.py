"""What the three trainings share: subjects, split, cache, device and settings."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from rich.console import Console
from torch.utils.data import ConcatDataset

from config import Config, DataConfig
from data.checks import (
    Problem,
    check_subjects,
    keep_usable,
    problem_table,
    problems_as_rows,
    raise_for_problems,
)
from data.description import Description, load_description
from data.files import file_states
from data.layouts import Subject, find_subjects
from data.loading import build_loader, prepare
from data.sampling import (
    moves,
    plane_remark,
    readable,
    samples_per_subject,
    training_samples,
    validation_samples,
    whole_volumes,
)
from data.splits import Split, share_labels, split_subjects
from data.targets import number_of_outputs
from data.volumes import read_geometry
from errors import UserError, printable
from locking import FolderLock, lock_for_all
from models import build_network, check_axes, in_two_dimensions
from phantoms import generate_phantoms, phantom_names
from privdistill import TeacherCache
from recipes.lesson import Setting
from recipes.rows import Row
from recipes.synthesis import privileged_modalities
from run_folder import RunFolder
from training.checkpoint import ModelMetadata
from training.performance import (
    Performance,
    Stopwatch,
    candidates,
    check_precision,
    choose,
    device_type,
    may_compile,
    peak_memory,
    performance_of,
    steps_of,
    torch_format,
)
from training.sharding import shard
from writing import remove_abandoned

Role = Literal["teacher", "baseline", "student"]


@dataclass
class Experiment:
    """One fold of one data set, ready for training.

    Attributes:
        config: The resolved configuration.
        run: The run folder.
        fabric: Launched.
        console: Where progress is shown.
        watch: Time per phase.
        description: The data set.
        modalities: What the subjects' images stack, in channel order.
        split: Names of training, validation, test and unlabelled subjects.
        subjects: Files by name.
        datasets: Preprocessed training, validation and unlabelled subjects.
        performance: How training steps are taken.
        samples: What networks are trained and validated on, by part; filled when first asked for,
            as slices are found by looking through all subjects.
        cache_counts: Hits, misses, entries not stored and bytes of the teacher cache, of the first
            process.
        teacher_files: Model files of the teachers, where those lie in other run folders.
        lock: Keeps other runs out of the folder; of the first process of train.py.
    """

    config: Config
    run: RunFolder
    fabric: Fabric
    console: Console
    watch: Stopwatch
    description: Description
    modalities: tuple[str, ...]
    split: Split
    subjects: dict[str, Subject]
    datasets: dict[str, Any]
    performance: Performance
    samples: dict[str, Any] = field(default_factory=dict)
    cache_counts: dict[str, int] = field(default_factory=dict)
    teacher_files: tuple[Path, ...] = ()
    lock: FolderLock | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Also after an interruption, so that the continuation adds to these times.
        try:
            if self.fabric.is_global_zero:
                self.write_summary()
        finally:
            if self.lock is not None:
                self.lock.release()

    def write_summary(self) -> dict[str, Any]:
        """Write time per phase and peak memory to summary.json.

        Returns:
            What was written.
        """
        seconds = {name: round(value, 2) for name, value in self.watch.seconds.items()}
        summary = {
            "seconds": seconds,
            "total_seconds": round(sum(seconds.values()), 2),
            "peak_mib": peak_memory(),
        }
        if self.cache_counts:
            summary["teacher_cache"] = self.cache_counts
        self.run.write_summary(summary)
        return summary

    @contextmanager
    def counting(self, cache: TeacherCache | None) -> Iterator[None]:
        """Add what a cache did in the block to the counts, also if an exception leaves it."""
        try:
            yield
        finally:
            if cache is not None:
                now, before = cache.statistics, self.cache_counts
                self.cache_counts = {
                    "hits": before.get("hits", 0) + now.hits,
                    "misses": before.get("misses", 0) + now.misses,
                    "skipped": before.get("skipped", 0) + now.skipped,
                    "bytes": now.bytes,
                }

    def view(self, role: str) -> tuple[str, ...]:
        """Return the modalities that a network sees."""
        return view_of(role, self.config.data, self.description)

    def metadata(self, role: str, name: str = "") -> ModelMetadata:
        """Return the description of a network: its role's modalities and backbone, its own name."""
        return replace(
            describe_network(role, self.config, self.description, name),
            orientation=orientation_of(self.subjects.values(), self.split),
            seen_cases=(*self.split.train, *self.split.validation),
        )

    def build_network(self, role: str, name: str = "") -> torch.nn.Module:
        """Build the untrained network of a role.

        Baseline and student begin with the same weights, whatever was trained before.
        """
        self.fabric.seed_everything(self.config.training.seed, verbose=False)
        metadata = self.metadata(role, name)
        layout = torch_format(self.performance.memory_format, len(metadata.input_size))
        return build(metadata).to(memory_format=layout)

    def setting(
        self, role: str, network: torch.nn.Module, teachers: Sequence[torch.nn.Module] = ()
    ) -> Setting:
        """Return what a recipe is given for a network of a role."""
        return Setting(
            network=network,
            teachers=tuple(teachers),
            options=self.config.objective,
            modalities=self.modalities,
            view=self.view(role),
            teacher_view=self.view("teacher"),
        )

    def example(self) -> torch.Tensor:
        """Return an empty sample with every modality, (1, M, *spatial)."""
        metadata = describe_network("student", self.config, self.description)
        return torch.zeros(1, len(self.modalities), *metadata.input_size)

    def loader(
        self, part: Literal["train", "validation"], *, unlabelled: bool = False
    ) -> Any | None:
        """Return batches of a part of the training folds.

        Args:
            part: Which.
            unlabelled: Whether those without a reference are among them.

        Returns:
            A loader, or None if there are no such subjects.
        """
        data, training = self.config.data, self.config.training
        on_cpu = self.fabric.device.type == "cpu"
        mixed = unlabelled and bool(self.split.unlabelled)
        if not getattr(self.split, part):
            return None
        samples = self._samples(part)
        if mixed:
            samples = ConcatDataset([samples, self._samples("unlabelled")])
        return build_loader(
            samples,
            training.batch_size,
            shuffle=part == "train",
            seed=training.seed,
            flips=data.flips and part == "train",
            moves=part == "train" and moves(data),
            per_epoch=training.samples_per_epoch,
            mixed=mixed,
            # On a CPU the processors are better spent on the training itself.
            workers=0 if on_cpu else min(4, workers(data)),
            replicas=self.fabric.world_size,
            rank=self.fabric.global_rank,
        )

    def of_row(self, row: Row, console: Console) -> Self:
        """Return the experiment as a row sees it, which may do without a part of the subjects.

        Args:
            row: Whose options count.
            console: Where progress is shown.

        Raises:
            UserError: If an option of the row makes no sense.
        """
        if "leave_out" not in row.options:
            return self
        config = row.configure(self.config)
        data = replace(config.data, labelled=None, unlabelled=None)
        split = replace(shared_out(data, self.split), unlabelled=())
        subjects = list(self.subjects.values())
        datasets = prepare_parts(config, self.description, subjects, split, console)
        return replace(self, config=config, split=split, datasets=datasets, samples={})

    def _samples(self, part: str) -> Any:
        if part not in self.samples:
            samples_of = validation_samples if part == "validation" else training_samples
            data, seed = self.config.data, self.config.training.seed
            self.samples[part] = samples_of(self.datasets[part], data, seed)
        return self.samples[part]

    def volumes(self) -> Any | None:
        """Return whole validation subjects, where samples are parts of them."""
        return whole_volumes(self.datasets["validation"], self.config.data)


def open_experiment(config: Config, console: Console) -> Experiment:
    """Find, check and prepare the subjects, and choose device and settings.

    Nothing is written before the configuration and the subjects' layout are known to be usable.

    Args:
        config: The resolved configuration.
        console: Where progress is shown.

    Returns:
        All that the trainings share.

    Raises:
        UserError: If the configuration, the folder or any subject cannot be used.
    """
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
        description, subjects = read_subjects(config, run, console)
        subjects, problems = usable(config, run, description, subjects, console)
        split = split_of(config, subjects)
        checked = {subject.name for subject in subjects} if config.data.skip_invalid else set()
        subjects, split = without_references(config.data, description, subjects, split)
        # Phantoms that were removed are made again, the same ones at another time.
        states = {} if config.data.data_root is None else file_states(used(subjects, split))
        if run.cases.is_file():
            check_unchanged(run, description, split)
            run.check_files(states)
        elif fabric.is_global_zero:
            fresh = [subject for subject in subjects if subject.name not in checked]
            check(config.data, description, fresh, split, console)
            run.begin(config)
            record_skipped(config, run, problems)
            run.write_description(description)
            run.write_files(states)
            split.save(run.cases)
        datasets = prepare_parts(config, description, subjects, split, console)
    performance = settle(config, description, split, fabric=fabric, console=console)
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


def find_description(config: Config) -> Description:
    """Describe the data set without reading or writing any image.

    Args:
        config: Names it.

    Returns:
        The description.

    Raises:
        UserError: If there is no data set, or it lacks the modalities that the networks see.
    """
    data = config.data
    if data.data_root is None:
        description = load_description(Path("phantom"))
    else:
        description, _ = find_subjects(data.data_root, own_description(data))
    for role in ("teacher", "student"):
        check_view(role, data, description)
    return description


def find_split(config: Config) -> Split:
    """Say which subjects will train, validate and test, without reading or writing any image.

    Args:
        config: Names the data set and the fold.

    Returns:
        The split.

    Raises:
        UserError: If nothing is found, or the split does not fit.
    """
    data = config.data
    if data.data_root is None:
        # Phantoms may not be there yet; they have no grade.
        description = load_description(Path("phantom"))
        subjects = [Subject(name, {}) for name in phantom_names(data.phantoms)]
    else:
        description, subjects = find_subjects(data.data_root, own_description(data))
    return without_references(data, description, subjects, split_of(config, subjects))[1]


def refuse_wrong_gradients(config: Config) -> None:
    """Refuse a precision whose gradients would be wrong, before anything is started or written.

    Args:
        config: Device, precision, network and data set.

    Raises:
        UserError: If bf16 is asked for where its gradients would be wrong.
    """
    training, description = config.training, find_description(config)
    for role in ("teacher", "student"):
        metadata = describe_network(role, config, description)
        check_precision(
            training.precision,
            device_type(training.accelerator),
            build(metadata),
            (1, metadata.in_channels, *metadata.input_size),
        )


def own_description(data: DataConfig) -> Description | None:
    """Return the description that the user names, None if the layout is to be recognised."""
    return None if data.description is None else load_description(Path(data.description))


def launch(config: Config, precision: str) -> Fabric:
    """Start Fabric, and its processes if there are several.

    Args:
        config: Accelerator, devices, nodes, strategy, threads.
        precision: Resolved.

    Returns:
        Fabric, launched.

    Raises:
        UserError: If there is no such accelerator or strategy.
    """
    training = config.training
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)
    # It would announce the precision once more.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    unfit = training.compile is True or training.precision == "16-mixed"
    if training.strategy == "fsdp" and unfit:
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
            precision=precision,  # type: ignore[arg-type]
        )
        fabric.launch()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"Lightning Fabric cannot start: {error}") from error
    return fabric


def out_folder(config: Config) -> Path:
    """Return the run folder of a resolved configuration."""
    return config.run.out or Path("runs") / config.run.preset


def cache_folder(config: Config) -> Path:
    """Return where preprocessed subjects and phantoms are kept."""
    return config.data.cache_dir or out_folder(config) / "cache"


def workers(data: DataConfig) -> int:
    """Return how many processes read and preprocess."""
    return data.workers or os.cpu_count() or 1


def read_subjects(
    config: Config, run: RunFolder, console: Console
) -> tuple[Description, list[Subject]]:
    """Find the subjects, or generate phantoms.

    Args:
        config: Where they are; phantoms are generated if it names no folder.
        run: Begun before phantoms are written into it.
        console: Where progress is shown.

    Returns:
        The data set and its subjects, sorted by name.

    Raises:
        UserError: If nothing is found.
    """
    data = config.data
    if data.data_root is None:
        if not run.config.is_file():
            run.begin(config)
        size, seed = data.phantom_size, config.training.seed
        root = cache_folder(config) / f"phantoms-{data.phantoms}-{size}-seed{seed}"
        generate_phantoms(
            root, subjects=data.phantoms, seed=seed, size=size, progress=console.is_terminal
        )
        description, subjects = find_subjects(root)
    else:
        description, subjects = find_subjects(data.data_root, own_description(data))
    return description, subjects


def check_unchanged(run: RunFolder, description: Description, split: Split) -> None:
    """Refuse to go on with other subjects or labels than the run began with.

    A network that is finished has seen the subjects of the old split; scored on those of a new one,
    it might be tested on what it was trained on.

    Args:
        run: Holds what the run began with.
        description: The data set as it is now.
        split: The split as it would be now.

    Raises:
        UserError: If either differs.
    """
    before = Split.read(run.cases)
    for part in ("train", "validation", "test", "unlabelled"):
        changed = set(getattr(before, part)) ^ set(getattr(split, part))
        if changed:
            raise UserError(
                f"{run.cases}: the {part} subjects of this run are not those found now; they "
                f"differ in {', '.join(sorted(changed)[:5])}. Restore the data set or the split "
                "file, or choose another --out."
            )
    if not run.has_description(description):
        raise UserError(
            f"{run.root}: the description of the data set has changed since this run began. "
            "Restore it, or choose another --out."
        )


def check_view(role: str, data: DataConfig, description: Description) -> None:
    """Make sure that a network's modalities exist.

    Args:
        role: Whose.
        data: Names them.
        description: Knows them.

    Raises:
        UserError: If the data set has no such modality.
    """
    unknown = [
        name for name in view_of(role, data, description) if name not in description.modalities
    ]
    if unknown:
        raise UserError(
            f"{description.name} has no modality {', '.join(unknown)}; it has "
            f"{', '.join(description.modalities)}. Set --student_modalities and "
            "--teacher_modalities."
        )


def view_of(role: str, data: DataConfig, description: Description) -> tuple[str, ...]:
    """Return the modalities that a network sees, in channel order."""
    every = tuple(description.modalities)
    return (data.teacher_modalities or every) if role == "teacher" else data.student_modalities


def stacked(data: DataConfig, description: Description) -> tuple[str, ...]:
    """Return the modalities that any network sees, in the order of the description."""
    used = {name for role in ("teacher", "student") for name in view_of(role, data, description)}
    return tuple(name for name in description.modalities if name in used)


def orientation_of(subjects: Iterable[Subject], split: Split) -> str:
    """Return the axis codes of the first training subject, such as "LPS"."""
    first = next(subject for subject in subjects if subject.name == split.train[0])
    return read_geometry(next(iter(first.images.values()))).orientation


def describe_network(
    role: str, config: Config, description: Description, name: str = ""
) -> ModelMetadata:
    """Describe the network of a role.

    Args:
        role: "teacher", "baseline" or "student"; decides what it sees.
        config: Backbone, activation, preprocessing.
        description: The data set.
        name: What its model file calls it; the role if empty.

    Returns:
        What its model file will say.
    """
    data, network = config.data, config.network
    view = view_of(role, data, description)
    backbone, arguments = network.of(role)
    if backbone == "synthesis":
        arguments = _synthesised(view, view_of("teacher", data, description)) | arguments
    if data.slices is not None:
        arguments = in_two_dimensions(backbone, arguments)
    return ModelMetadata(
        role=name or role,
        backbone=backbone,
        backbone_arguments=arguments,
        in_channels=len(view),
        out_channels=number_of_outputs(description, network.activation),
        modalities=view,
        activation=network.activation,
        description=description,
        # Patches are cut from whole volumes, unless a crop is asked for.
        crop=data.crop or (description.crop if data.patch is None else None),
        grid=None if data.patch is not None else data.grid or description.grid,
        patch=data.patch,
        slices=data.slices,
        normalise=data.normalise,
        resample=data.resample,
        phantom=description.phantom,
    )


def _synthesised(view: tuple[str, ...], teacher_view: tuple[str, ...]) -> dict[str, int]:
    """How many modalities a synthesis makes; where there are none, the recipe says so."""
    more = {*teacher_view} - {*view}
    return {"synthesised": len(privileged_modalities(view, teacher_view))} if more else {}


def build(metadata: ModelMetadata) -> torch.nn.Module:
    """Build the untrained network that metadata describe.

    Args:
        metadata: Backbone, its arguments and channels.

    Returns:
        The network.

    Raises:
        UserError: If it cannot be built, or not for inputs of so many axes.
    """
    network = build_network(
        metadata.backbone,
        metadata.backbone_arguments,
        in_channels=metadata.in_channels,
        out_channels=metadata.out_channels,
    )
    check_axes(metadata.backbone, network, len(metadata.input_size))
    return network


def split_of(config: Config, subjects: list[Subject]) -> Split:
    """Return the split of a file, or the fold that the configuration names.

    Args:
        config: Names either.
        subjects: All subjects.

    Returns:
        Names of training, validation and test subjects.

    Raises:
        UserError: If a part would be empty, or the file does not fit.
    """
    data = config.data
    if data.split_file is not None:
        split = Split.load(data.split_file, subjects)
        empty = [part for part in ("train", "validation", "test") if not getattr(split, part)]
        if empty:
            raise UserError(f"{data.split_file}: {' and '.join(empty)} must not be empty.")
        return split
    return split_subjects(
        subjects,
        folds=data.folds,
        fold=data.fold,
        validation_fraction=data.validation_fraction,
        seed=config.training.seed,
    )


def shared_out(data: DataConfig, split: Split) -> Split:
    """Return the split in which as many subjects have a reference as the configuration says.

    Args:
        data: Numbers of subjects.
        split: In which all have one.

    Raises:
        UserError: If there are too few.
    """
    return share_labels(
        split, labelled=data.labelled, unlabelled=data.unlabelled, leave_out=data.leave_out
    )


def without_references(
    data: DataConfig, description: Description, subjects: Sequence[Subject], split: Split
) -> tuple[list[Subject], Split]:
    """Take the reference from the subjects that shall have none, and add the further ones.

    Args:
        data: How many keep it, and the folder of the further ones.
        description: The data set, whose form the further ones have.
        subjects: All subjects.
        split: Of them.

    Returns:
        The subjects, label maps of unlabelled ones left out, and the split with unlabelled ones.

    Raises:
        UserError: If there are too few, or a further one has the name of a subject.
    """
    split = shared_out(data, split)
    more: list[Subject] = []
    if data.unlabelled_root is not None:
        _, more = find_subjects(data.unlabelled_root, description)
        known = sorted({subject.name for subject in subjects} & {other.name for other in more})
        if known:
            raise UserError(
                f"--unlabelled_root: {data.unlabelled_root} holds {len(known)} subjects of the "
                f"data set, such as {known[0]}, which may be among those that test. Remove them "
                "there, or give them other names if they are other patients."
            )
    names = (*split.unlabelled, *(subject.name for subject in more))
    hidden = {*names}
    every = [
        replace(subject, segmentation=None) if subject.name in hidden else subject
        for subject in (*subjects, *more)
    ]
    return every, replace(split, unlabelled=names)


def usable(
    config: Config,
    run: RunFolder,
    description: Description,
    subjects: list[Subject],
    console: Console,
) -> tuple[list[Subject], list[Problem]]:
    """Leave out the subjects whose files are not sound, if that is asked for.

    A run that goes on leaves out those that it began without, whatever has become of their files,
    so that its folds stay what they were.

    Args:
        config: Says whether it is asked for.
        run: Knows who was left out when it began.
        description: The data set.
        subjects: All subjects.
        console: Where those who are left out are listed.

    Returns:
        The subjects to use, and why the others are not among them; empty if the run goes on.

    Raises:
        UserError: If no subject is left.
    """
    if not config.data.skip_invalid:
        return subjects, []
    before = run.read_skipped()
    if before is not None:
        return [subject for subject in subjects if subject.name not in before], []
    problems = check_subjects(
        description,
        subjects,
        workers=workers(config.data),
        progress=console.is_terminal,
        modalities=stacked(config.data, description),
    )
    kept, left_out = keep_usable(subjects, problems)
    if problems:
        console.print(problem_table(problems))
        names = printable(", ".join(left_out[:10])) + ", ..." * (len(left_out) > 10)
        console.print(f"Left out: {len(left_out)} of {len(subjects)} subjects: {names}")
    return kept, problems


def used(subjects: Iterable[Subject], split: Split) -> list[Subject]:
    """Return the subjects that any part of a split names."""
    names = {*split.train, *split.validation, *split.test, *split.unlabelled}
    return [subject for subject in subjects if subject.name in names]


def record_skipped(config: Config, run: RunFolder, problems: Sequence[Problem]) -> None:
    """Note whom a run does without, as soon as its folder is there.

    Args:
        config: Says whether anybody may be left out.
        run: Its folder.
        problems: Why; an earlier note stays.
    """
    if config.data.skip_invalid and run.read_skipped() is None:
        names = dict.fromkeys(problem.subject for problem in problems)
        run.write_skipped(list(names), problems_as_rows(problems))


def check(
    data: DataConfig,
    description: Description,
    subjects: list[Subject],
    split: Split,
    console: Console,
) -> None:
    """Read every file of the subjects that are used and report all problems together.

    Args:
        data: Names the modalities.
        description: The data set.
        subjects: All subjects.
        split: Those that are used.
        console: Where progress is shown.

    Raises:
        UserError: If there is any problem.
    """
    labelled = {*split.train, *split.validation, *split.test}
    problems = [
        problem
        for names, need in ((labelled, True), ({*split.unlabelled}, False))
        for problem in check_subjects(
            description,
            [subject for subject in subjects if subject.name in names],
            workers=workers(data),
            progress=console.is_terminal,
            need_segmentation=need,
            modalities=stacked(data, description),
        )
    ]
    raise_for_problems(problems)


def prepare_parts(
    config: Config,
    description: Description,
    subjects: list[Subject],
    split: Split,
    console: Console,
) -> dict[str, Any]:
    """Preprocess the subjects that train or validate into the cache.

    Args:
        config: Preprocessing and cache folder.
        description: The data set.
        subjects: All subjects.
        split: Which of them are in which part.
        console: Where progress is shown.

    Returns:
        Data sets under "train", "validation" and "unlabelled".
    """
    data = config.data
    preprocessing = replace(
        describe_network("teacher", config, description), modalities=stacked(data, description)
    ).preprocessing()
    parts = {name: getattr(split, name) for name in ("train", "validation", "unlabelled")}
    return {
        part: readable(
            prepare(
                [subject for subject in subjects if subject.name in names],
                preprocessing,
                cache_folder(config),
                workers(data),
                progress=console.is_terminal,
            ),
            data,
        )
        for part, names in parts.items()
    }


def settle(
    config: Config, description: Description, split: Split, *, fabric: Fabric, console: Console
) -> Performance:
    """Choose how steps are taken, unless an earlier part of the run has; record it in the run.

    Args:
        config: Settings.
        description: Gives the size of the input.
        split: Gives the length of the training.
        fabric: Tells the device; the first process chooses for all.
        console: Where the trial is shown.

    Returns:
        The choice.
    """
    run = RunFolder(out_folder(config))
    resolved = run.resolved()
    if not resolved and fabric.is_global_zero:
        network = describe_network("student", config, description)
        samples = len(split.train) * samples_per_subject(config.data, network.grid)
        steps = -(-samples // (config.training.batch_size * fabric.world_size))
        choice, seconds = try_out(config, network, fabric.device.type, steps)
        show_trial(console, choice, seconds)
        resolved = asdict(choice) | {"trial_seconds": seconds}
    resolved = fabric.broadcast(resolved)
    resolved |= {"device": str(fabric.device), "world_size": fabric.world_size}
    performance = performance_of(resolved, run.environment)
    if fabric.is_global_zero:
        run.write_environment(seed=config.training.seed, resolved=resolved)
    return performance


def try_out(
    config: Config, metadata: ModelMetadata, device: str, steps: int
) -> tuple[Performance, dict[str, float]]:
    """Compare ways to take a step of a network.

    Args:
        config: What is left open.
        metadata: The network.
        device: Where it runs.
        steps: Steps of an epoch.

    Returns:
        The choice, and the seconds of all that were measured.
    """
    training, network = config.training, build(metadata)
    shape = (training.batch_size, metadata.in_channels, *metadata.input_size)
    options = candidates(training, device, network, shape)
    with steps_of(network, shape, device) as measure:
        choice, seconds = choose(
            options,
            measure,
            steps=training.epochs * steps,
            compilable=may_compile(training, device),
        )
    return (replace(choice, compile=True) if training.compile is True else choice), seconds


def show_trial(console: Console, choice: Performance, seconds: dict[str, float]) -> None:
    """Print what a trial measured, the fastest first; nothing if there was none."""
    for name, value in sorted(seconds.items(), key=lambda item: item[1]):
        mark = "  <- taken" if name == str(choice) else ""
        console.print(f"Trial step: {value:8.4f} s  {name}{mark}", highlight=False, soft_wrap=True)


def announce(
    console: Console,
    description: Description,
    split: Split,
    performance: Performance,
    *,
    held: bool,
) -> None:
    """Say what will be done.

    Args:
        console: Where to.
        description: The data set.
        split: The subjects.
        performance: How steps are taken.
        held: Whether an earlier run goes on.
    """
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
