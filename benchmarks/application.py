"""The reference application under the stopwatch: its own training, and its own prediction."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from contest import Report, silent

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "brats_kdnet"))

import predict
from kdnet.config import Config, parse_config
from kdnet.data.description import load_description
from kdnet.rows import Row
from kdnet.runs.networks import build, describe_network
from kdnet.runs.plan import fold_of, make_plan
from kdnet.runs.preparation import prepare, rehearse_rows
from kdnet.runs.subjects import find_data
from kdnet.runs.unit import launch, opened, train
from kdnet.training.checkpoint import save_model

QUIET = Console(quiet=True)
NATIVE = (240, 240, 155)
Batch = dict[str, Any]


@dataclass
class Clock:
    """Seconds of a training, by epoch.

    Attributes:
        epochs: From the first batch asked for to the end of the last step.
        steps: Those of each step, what the application does with one batch.
        after: Called after each step, outside of both.
        rivals: What that took.
        report: Is told the share that is done.
        expected: Number of steps.
    """

    after: Callable[[Batch], float] | None = None
    report: Report = silent
    expected: int = 1
    epochs: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    rivals: list[list[float]] = field(default_factory=list)


class TimedLoader(DataLoader):
    """The application's loader; what it does with a batch lies between two batches.

    Args:
        loader: What the application built.
        clock: Where times go.
    """

    def __init__(self, loader: DataLoader, clock: Clock) -> None:
        super().__init__(loader.dataset, batch_size=loader.batch_size, sampler=loader.sampler)
        self.clock = clock

    def __iter__(self) -> Iterator[Batch]:
        clock = self.clock
        clock.steps.append([])
        clock.rivals.append([])
        begin = time.perf_counter()
        for batch in super().__iter__():
            handed_over = time.perf_counter()
            yield batch
            clock.steps[-1].append(time.perf_counter() - handed_over)
            if clock.after is not None:
                again = time.perf_counter()
                clock.after(batch)
                clock.rivals[-1].append(time.perf_counter() - again)
            clock.report(min(1.0, sum(map(len, clock.steps)) / clock.expected))
        clock.epochs.append(time.perf_counter() - begin - sum(clock.rivals[-1]))


def training(
    folder: Path, options: Sequence[str], clock: Clock, *, against_plain: bool = False
) -> int:
    """Train a student with the application's own functions and an untrained teacher.

    Args:
        folder: Of the run.
        options: As on the command line.
        clock: Where times go.
        against_plain: Whether each batch is also given to `plain_step`.

    Returns:
        Number of training subjects.
    """
    # Without flips every sample is cached after one epoch, instead of after some dozens.
    config = parse_config([*options, "--out", str(folder), "--flips", "false"])
    data = find_data(config, QUIET)
    rows = (Row("teacher", role="teacher"), Row("student", recipe="distilled", teacher="teacher"))
    fold = fold_of(data.foldable, config)
    plan = make_plan("train", "A student under the stopwatch", config, rows, [fold], data)
    plan = rehearse_rows(plan, plan.units(), QUIET)
    fabric = launch(config)
    plan = prepare(plan, plan.units(), QUIET)
    teacher, student = plan.units()
    with opened(plan, teacher, fabric, QUIET) as experiment:
        # A student's description names what its teacher has seen.
        metadata = experiment.metadata()
        save_model(experiment.folder.model, build(metadata), metadata)
    with opened(plan, student, fabric, QUIET) as experiment:
        if against_plain:
            seen = experiment.metadata()
            column = experiment.modalities.index(*seen.modalities)
            clock.after = plain_step(config, build(metadata), build(seen), column)
        usual = experiment.loader

        def loader(part: str, **options: Any) -> DataLoader:
            batches = usual(part, **options)
            return TimedLoader(batches, clock) if part == "train" else batches

        experiment.loader = loader
        train(experiment)
        return len(experiment.split.train)


def plain_step(
    config: Config, teacher: nn.Module, student: nn.Module, column: int
) -> Callable[[Batch], float]:
    """The same step as one writes it in a script: float32, contiguous, the teacher in each step.

    Args:
        config: Of the application.
        teacher: Sees every modality.
        student: Sees one of them.
        column: Which one.

    Returns:
        The step, from a batch to its loss.
    """
    options = config.objective
    networks = [network.to(memory_format=torch.contiguous_format) for network in (teacher, student)]
    teacher.eval().requires_grad_(False)
    features: list[Tensor] = []
    for network in networks:
        network.bottleneck.register_forward_hook(lambda _m, _i, out: features.append(out))
    optimizer = torch.optim.Adam(student.parameters(), config.training.learning_rate)

    def step(batch: Batch) -> float:
        image = batch["image"]
        with torch.no_grad():
            teacher_logits = teacher(image)
        logits = student(image[:, column : column + 1])
        target = F.one_hot(batch["label"][:, 0], logits.shape[1]).movedim(-1, 1).float()
        latent = tuple(features)
        features.clear()
        loss = plain_objective(logits, teacher_logits, target, latent, options)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), config.training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def plain_objective(
    student: Tensor, teacher: Tensor, target: Tensor, latent: tuple[Tensor, Tensor], options: Any
) -> Tensor:
    """Equation (5) of the paper under softmax.

    Args:
        student: Logits.
        teacher: Logits.
        target: One-hot.
        latent: Bottlenecks of teacher and student.
        options: Weights and temperature.

    Returns:
        The loss.
    """
    probability = student.softmax(1)
    soft = (teacher / options.temperature).softmax(1)
    hard = F.one_hot(teacher.argmax(1), teacher.shape[1]).movedim(-1, 1).float()

    def dice(reference: Tensor) -> Tensor:
        space = tuple(range(2, student.ndim))
        overlap = 2 * (probability * reference).sum(space) + options.smoothing
        size = probability.sum(space) + reference.sum(space) + options.smoothing
        return 1 - (overlap / size).mean()

    logs = [z.flatten(1).log_softmax(1) for z in reversed(latent)]
    divergence = F.kl_div(*logs, reduction="batchmean", log_target=True)
    imitation = dice(soft) + F.binary_cross_entropy(probability, hard)
    supervised = dice(target) + F.binary_cross_entropy(probability, target)
    share = options.imitation
    return share * imitation + (1 - share) * supervised + options.latent_weight * divergence


def write_case(folder: Path) -> dict[str, Path]:
    """Write one subject of BraTS's size with noise in an ellipsoid.

    Args:
        folder: Where to.

    Returns:
        Files by modality.
    """
    description = load_description("brats2021")
    generator = np.random.default_rng(0)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in NATIVE), indexing="ij")
    inside = sum(axis**2 for axis in axes) < 0.6
    files = {}
    for name in description.modalities:
        values = np.where(inside, generator.integers(1, 2000, NATIVE), 0).astype(np.int16)
        files[name] = folder / f"case_{name}.nii.gz"
        nib.save(nib.Nifti1Image(values, np.eye(4)), files[name])
    return files


def write_model(role: str, folder: Path) -> Path:
    """Write an untrained network of the preset "cpu", as a training would.

    Args:
        role: "teacher" or "student".
        folder: Where to.

    Returns:
        Its file.
    """
    config = parse_config(["--preset", "cpu"])
    metadata = describe_network(role, config, load_description("brats2021"))
    path = folder / f"{role}.safetensors"
    # BraTS is stored with axes that run to the right, anterior and superior here.
    save_model(path, build(metadata), replace(metadata, orientation="RAS"))
    return path


def segment(model: Path, images: Sequence[str], out: Path) -> None:
    """Do what predict.py does for one case: read, run, bring back to the original grid, write."""
    arguments = ["--model", str(model), "--input", *images, "--out", str(out), "--device", "cpu"]
    predict.predict(predict.parser().parse_args(arguments), QUIET)
