"""The training loop, the same for teacher, baseline and student."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from kdnet.config import TrainingConfig
from kdnet.data.description import Description
from kdnet.data.loading import Batch, start_epoch
from kdnet.data.preprocessing import Sample
from kdnet.data.targets import predict_classes, to_target
from kdnet.errors import UserError
from kdnet.evaluation.inference import predict_volume
from kdnet.stopping import Interruption, StoppedError, deferring
from kdnet.training.checkpoint import ModelMetadata, file_digest, load_state
from kdnet.training.continuation import Checkpoint, Means, Position, RandomState
from kdnet.training.finite import Guard, Seen
from kdnet.training.history import History
from kdnet.training.performance import torch_format
from kdnet.training.progress import TrainingProgress
from kdnet.training.sharding import gathered, whole
from kdnet.training.task import Task
from privdistill import DistillationWrapper, Output

Loader = Any  # a DataLoader, or Fabric's wrapper around one


@dataclass(frozen=True)
class Training:
    """A network in training, and all that changes with it.

    Attributes:
        fabric: Launched.
        kd: The wrapper.
        model: The same, as Fabric runs it in training steps.
        optimizer: Drives the weights.
        stepping: The same, as Fabric steps it.
        scheduler: Drives the learning rate.
        train: Shuffled batches.
        validation: Batches in fixed order; None if there are no validation subjects.
        task: Settings and files.
    """

    fabric: Fabric
    kd: DistillationWrapper
    model: nn.Module
    optimizer: torch.optim.Optimizer
    stepping: torch.optim.Optimizer
    scheduler: LRScheduler
    train: Loader
    validation: Loader | None
    task: Task

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.train)


@dataclass(frozen=True)
class Company:
    """What accompanies a training.

    Attributes:
        history: One row per epoch.
        progress: Shown to the user.
        interruption: Knows whether the training was asked to stop.
        checkpoint: Keeps what the training goes on with.
        guard: Looks at every step's numbers.
    """

    history: History
    progress: TrainingProgress
    interruption: Interruption
    checkpoint: Checkpoint
    guard: Guard


def is_finished(folder: Path) -> bool:
    """Say whether a network's training has come to its end."""
    state = load_state(folder / "state.pt")
    if state is None or not state["finished"]:
        return False
    # Unfinished states may be older than the files beside them; states from before there were
    # digests vouch for none.
    for name, expected in state.get("files", {}).items():
        path = folder / name
        if not path.is_file() or file_digest(path) != expected:
            raise UserError(
                f"{path} is not the file with which the training was finished: it is damaged, "
                f"missing or another one. Restore it, or remove {folder} to train this network "
                "again; a network from elsewhere can be given as --teacher_model."
            )
    return True


def fit(
    fabric: Fabric, kd: DistillationWrapper, train: Loader, validation: Loader | None, task: Task
) -> None:
    """Train the student of a wrapper, from the start or from where it was interrupted."""
    training = set_up(fabric, kd, train, validation, task)
    checkpoint = Checkpoint(
        fabric, kd, training.optimizer, training.scheduler, task, steps=training.steps
    )
    position = checkpoint.resume()
    with accompanied(training, checkpoint, position) as company:
        while position.epoch < task.settings.epochs:
            started = time.perf_counter() - position.seconds
            train_epoch(training, position, company, started)
            row = close_epoch(training, position, company, started)
            checkpoint.save(position, row.get("validation_loss", float("inf")))
            # A signal during the last batch of the validation must not be lost with the last epoch.
            stop_if_asked(training, position, company)
    fabric.barrier()


def set_up(
    fabric: Fabric, kd: DistillationWrapper, train: Loader, validation: Loader | None, task: Task
) -> Training:
    """Build optimizer and schedule, and let Fabric place everything."""
    settings = task.settings
    model = fabric.setup_module(kd)
    # Only now: a sharded network has other parameters.
    optimizer = torch.optim.Adam(
        kd.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    scheduler = build_scheduler(optimizer, settings, steps=len(train))
    stepping = cast("torch.optim.Optimizer", fabric.setup_optimizers(optimizer))
    train = fabric.setup_dataloaders(train, use_distributed_sampler=False)
    if validation is not None:
        validation = fabric.setup_dataloaders(validation, use_distributed_sampler=False)
    return Training(fabric, kd, model, optimizer, stepping, scheduler, train, validation, task)


def train_epoch(training: Training, position: Position, company: Company, started: float) -> None:
    """Take the steps of an epoch that are still to be taken."""
    start_epoch(training.train, position.epoch, done=position.batch)
    training.model.train()
    for batch in training.train:
        position.put_back_random()
        out, loss = take_step(training, batch, position, company.guard)
        position.step += 1
        position.batch += 1
        add_terms(position.means, training.kd, out, batch.get("labelled"))
        company.progress.step(loss)
        position.seconds = time.perf_counter() - started
        stop_if_asked(training, position, company)
    company.guard.settle()
    # Of an epoch that was interrupted in its validation no batch is left.
    position.put_back_random()


def take_step(
    training: Training, batch: Batch, position: Position, guard: Guard
) -> tuple[Output, float | None]:
    """Change the weights by one batch."""
    fabric, task = training.fabric, training.task
    where = f"{task.role}, epoch {position.epoch + 1}, step {position.step + 1}"
    guard.look_at_image(batch, where)
    image, target = prepare(batch, task)
    labelled, key = batch.get("labelled"), batch.get("key")
    weights = task.teacher_weights(batch["name"])
    out = cast(
        "Output",
        training.model(image, target, labelled=labelled, teacher_weights=weights, key=key),
    )
    fabric.backward(out.loss)
    norm = fabric.clip_gradients(
        training.model,
        training.optimizer,
        max_norm=task.settings.gradient_clip or float("inf"),
        error_if_nonfinite=False,
    )
    loss = guard.look(Seen(batch, target, out, whole(norm), where))
    training.stepping.step()
    training.stepping.zero_grad()
    if isinstance(training.scheduler, OneCycleLR):
        training.scheduler.step()
    return out, loss


def close_epoch(
    training: Training, position: Position, company: Company, started: float
) -> dict[str, float]:
    """Validate after the last step of an epoch, and add its row to the history."""
    fabric, task = training.fabric, training.task
    # Loaders draw random numbers when they begin.
    random = RandomState.now(fabric.device)
    # Processes have different numbers of validation batches, so that they could not agree inside.
    alone = fabric.world_size == 1
    between = partial(stop_if_asked, training, position, company, random) if alone else _go_on
    measured = {}
    if training.validation is not None:
        measured = validate(fabric, training.kd, training.validation, task, between)
    row = {
        "epoch": position.epoch + 1,
        "step": position.step,
        "learning_rate": training.optimizer.param_groups[0]["lr"],
        "seconds": time.perf_counter() - started,
        **position.means.reduce(fabric, "train_"),
        **measured,
    }
    if isinstance(training.scheduler, ReduceLROnPlateau):
        training.scheduler.step(row["validation_loss"])
    position.finish_epoch()
    if fabric.is_global_zero:
        company.history.add(row)
    company.progress.epoch(position.epoch, row)
    return row


def _go_on() -> None:
    """Between batches where nobody can stop."""


def build_scheduler(
    optimizer: torch.optim.Optimizer, settings: TrainingConfig, *, steps: int
) -> LRScheduler:
    """Build the learning-rate schedule."""
    if settings.schedule == "onecycle":
        total = settings.epochs * steps
        return OneCycleLR(optimizer, max_lr=settings.learning_rate, total_steps=total)
    if settings.schedule == "plateau":
        # PyTorch counts the epochs it tolerates, the paper those after which the rate drops; and
        # any decrease counts as one.
        return ReduceLROnPlateau(
            optimizer,
            factor=settings.plateau_factor,
            patience=settings.plateau_patience - 1,
            threshold=0.0,
        )
    return ConstantLR(optimizer, factor=1.0)


def prepare(batch: Batch, task: Task) -> tuple[Tensor, Tensor]:
    """Bring a batch into the form that the wrapper takes."""
    image = batch["image"]
    image = image.to(memory_format=torch_format(task.memory_format, image.ndim - 2))
    metadata = task.metadata
    return image, to_target(batch["label"], metadata.description, metadata.activation)


def add_terms(means: Means, kd: DistillationWrapper, out: Output, labelled: Tensor | None) -> None:
    """Add loss and terms of a step to their means."""
    count = len(first_head(out.student))
    means.add({"loss": out.loss}, count)
    for name, value in out.terms.items():
        reads = labelled is not None and kd.objective.named_terms[name][1].needs_target
        means.add({name: value}, labelled.sum() if reads and labelled is not None else count)


def first_head(logits: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the logits, those of the first head where there are several."""
    return logits if isinstance(logits, Tensor) else logits[0]


def stop_if_asked(
    training: Training, position: Position, company: Company, random: RandomState | None = None
) -> None:
    """Keep everything and leave the training after a signal to this or any other process."""
    received = company.interruption.agreed(training.fabric)
    if received is None:
        return
    company.guard.settle()
    if position.batch:
        here = RandomState.now(training.fabric.device) if random is None else random
        company.checkpoint.pause(position, here)
    task, kept = training.task, position.epoch
    inside = f" and {position.batch} of {training.steps} steps of the next" * bool(position.batch)
    raise StoppedError(
        received,
        f"Stopped in epoch {min(kept + 1, task.settings.epochs)} of the {task.role}; {kept} of "
        f"{task.settings.epochs} epochs{inside} are kept in {task.folder}. Give the same command "
        "to go on.",
    )


@torch.no_grad()
def validate(
    fabric: Fabric,
    kd: DistillationWrapper,
    loader: Loader,
    task: Task,
    between: Callable[[], None],
) -> dict[str, float]:
    """Compute loss and Dice on the validation subjects."""
    kd.eval()
    with gathered(kd):
        row = validate_batches(fabric, kd, loader, task, between)
        if task.volumes is None:
            return row
        return row | validate_volumes(fabric, kd, task.volumes, task, between)


def validate_batches(
    fabric: Fabric,
    kd: DistillationWrapper,
    loader: Loader,
    task: Task,
    between: Callable[[], None],
) -> dict[str, float]:
    """Compute loss and terms on batches, and Dice where they are whole subjects."""
    zero = torch.zeros((), dtype=torch.float64, device=fabric.device)
    # Named beforehand: a process whose share is empty must add up the same columns.
    names = ("loss", *(("dice",) if task.volumes is None else ()), *kd.objective.named_terms)
    means = Means(dict.fromkeys(names, zero))
    for batch in loader:
        between()
        image, target = prepare(batch, task)
        with fabric.autocast():
            out = kd(image, target, key=batch.get("key"))
        ground_truth = task.settings.validation_loss == "ground_truth"
        loss = out.terms.get("ground_truth", out.loss) if ground_truth else out.loss
        values = {"loss": loss} | out.terms
        if task.volumes is None:
            values["dice"] = mean_dice(out.student, batch["label"], task.metadata)
        means.add(values, len(image))
    return means.reduce(fabric, "validation_")


def validate_volumes(
    fabric: Fabric,
    kd: DistillationWrapper,
    volumes: Sequence[Sample],
    task: Task,
    between: Callable[[], None],
) -> dict[str, float]:
    """Compute Dice of whole validation subjects, predicted window by window or slice by slice."""

    def predict(part: Tensor) -> Tensor:
        layout = torch_format(task.memory_format, part.ndim - 2)
        with fabric.autocast():
            return kd.predict(part.to(fabric.device, memory_format=layout)).float().cpu()

    metadata = task.metadata
    means = Means({"dice": torch.zeros((), dtype=torch.float64, device=fabric.device)})
    for index in range(fabric.global_rank, len(volumes), fabric.world_size):
        between()
        sample = volumes[index]
        logits = predict_volume(
            predict, sample["image"][None], patch=metadata.patch, slices=metadata.slices
        )
        dice = mean_dice(logits, sample["label"][None].long(), metadata)
        means.add({"dice": dice.to(fabric.device)}, 1)
    return means.reduce(fabric, "validation_")


def mean_dice(logits: Tensor, label: Tensor, metadata: ModelMetadata) -> Tensor:
    """Compute Dice of the predicted regions, averaged over regions and subjects."""
    description: Description = metadata.description
    classes = predict_classes(logits, description, metadata.activation)[:, None]
    predicted = to_target(classes, description, "sigmoid").flatten(2)
    reference = to_target(label, description, "sigmoid").flatten(2)
    size = predicted.sum(-1) + reference.sum(-1)
    overlap = 2 * (predicted * reference).sum(-1)
    return torch.where(size > 0, overlap / size.clamp(min=1), 1.0).mean()


@contextmanager
def accompanied(
    training: Training, checkpoint: Checkpoint, position: Position
) -> Iterator[Company]:
    """Open what accompanies a training; processes other than the first write and show nothing."""
    task, epoch = training.task, position.epoch
    first = training.fabric.is_global_zero
    console = task.console if first else Console(quiet=True)
    if first:
        task.folder.mkdir(parents=True, exist_ok=True)
    epochs, steps = task.settings.epochs, training.steps
    with (
        History(task.folder / "history.csv", task.scalars, epoch=epoch) as history,
        TrainingProgress(console, task.role, epochs=epochs, steps=steps, done=epoch) as progress,
        deferring() as interruption,
    ):
        guard = Guard(training.fabric, training.kd)
        yield Company(history, progress, interruption, checkpoint, guard)
