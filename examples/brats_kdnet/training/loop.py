"""The training loop, the same for teacher, baseline and student."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from config import TrainingConfig
from data.description import Description
from data.loading import Batch, start_epoch
from data.preprocessing import Sample
from data.targets import predict_classes, to_target
from errors import UserError
from evaluation.inference import predict_volume
from privdistill import DistillationWrapper, Output
from training.checkpoint import (
    ModelMetadata,
    load_state,
    random_state,
    restore_random_state,
    save_state,
    save_weights,
)
from training.history import History
from training.interruption import Interruption, TrainingStoppedError
from training.performance import MemoryFormat, torch_format
from training.progress import TrainingProgress
from training.sharding import gathered, load_optimizer, load_weights, whole

Loader = Any  # a DataLoader, or Fabric's wrapper around one


class NonFiniteError(UserError):
    """A loss or gradient is infinite or not a number; the weights were not touched."""


@dataclass(frozen=True)
class Task:
    """What is trained and where its files go.

    Attributes:
        metadata: Describes the network; its role names the training.
        settings: Optimizer, schedule, selection.
        folder: Folder of this network's files.
        scalars: Folder of its TensorBoard events.
        memory_format: Layout of images and weights.
        console: Where progress is shown.
        volumes: Whole validation subjects, where a sample is a part of one: their Dice is that of
            whole volumes.
    """

    metadata: ModelMetadata
    settings: TrainingConfig
    folder: Path
    scalars: Path
    memory_format: MemoryFormat
    console: Console
    volumes: Sequence[Sample] | None = None

    @property
    def role(self) -> str:
        """The network's role."""
        return self.metadata.role

    @property
    def model_file(self) -> Path:
        """The selected weights."""
        return self.folder / "model.safetensors"

    @property
    def state_file(self) -> Path:
        """What continues the training; written last, so that it vouches for the other files."""
        return self.folder / "state.pt"


@dataclass
class Position:
    """How far a training is.

    Attributes:
        epoch: Finished epochs.
        step: Steps taken.
        best: Lowest validation loss so far.
    """

    epoch: int = 0
    step: int = 0
    best: float = float("inf")


@dataclass
class Means:
    """Running means over cases.

    Attributes:
        sums: Sums by name, on the device; reading them is the only synchronisation.
        cases: Number of cases by name.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    cases: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor], cases: int | Tensor) -> None:
        """Add the means over some cases; their number may lie on the device."""
        for name, value in values.items():
            count = torch.as_tensor(cases, dtype=torch.float64, device=value.device)
            weighted = value.detach().double() * count
            self.sums[name] = self.sums[name] + weighted if name in self.sums else weighted
            self.cases[name] = self.cases[name] + count if name in self.cases else count

    def reduce(self, fabric: Fabric, prefix: str) -> dict[str, float]:
        """Return the means over the cases of all processes, names prefixed."""
        device = fabric.device
        counts = [self.cases.get(name, torch.zeros(())).double().to(device) for name in self.sums]
        packed = torch.stack([torch.stack([*self.sums.values()]).to(device), torch.stack(counts)])
        sums, cases = torch.as_tensor(fabric.all_reduce(packed, reduce_op="sum"))
        means = (sums / cases).tolist()
        return {f"{prefix}{name}": mean for name, mean in zip(self.sums, means, strict=True)}


def is_finished(folder: Path) -> bool:
    """Say whether a network's training has come to its end.

    Args:
        folder: Folder of its files.

    Raises:
        UserError: If its state is damaged.
    """
    state = load_state(folder / "state.pt")
    return state is not None and bool(state["finished"])


def fit(
    fabric: Fabric, kd: DistillationWrapper, train: Loader, validation: Loader | None, task: Task
) -> None:
    """Train the student of a wrapper, from the start or from its last checkpoint.

    Args:
        fabric: Launched.
        kd: Student, teacher if any, and objective. The memory format is the caller's.
        train: Shuffled batches, from `build_loader`.
        validation: Batches in fixed order; None if there are no validation subjects.
        task: Settings and files.

    Raises:
        NonFiniteError: If a loss or gradient is not finite.
        TrainingStoppedError: After SIGTERM, SIGUSR1 or Ctrl-C.
        UserError: If the last checkpoint is damaged.
    """
    settings = task.settings
    model = fabric.setup_module(kd)
    # Only now: a sharded network has other parameters.
    optimizer = torch.optim.Adam(
        kd.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    scheduler = build_scheduler(optimizer, settings, steps=len(train))
    fabric_optimizer = cast("torch.optim.Optimizer", fabric.setup_optimizers(optimizer))
    train = fabric.setup_dataloaders(train, use_distributed_sampler=False)
    if validation is not None:
        validation = fabric.setup_dataloaders(validation, use_distributed_sampler=False)
    checkpoint = Checkpoint(fabric, kd, optimizer, scheduler, task)
    position = checkpoint.resume()

    with tools(fabric, task, position, len(train)) as (history, progress, interruption):
        for epoch in range(position.epoch, settings.epochs):
            started = time.perf_counter()
            means = Means()
            start_epoch(train, epoch)
            model.train()
            for batch in train:
                image, target = prepare(batch, task)
                labelled = batch.get("labelled")
                out = model(image, target, labelled=labelled, key=batch.get("key"))
                fabric.backward(out.loss)
                norm = fabric.clip_gradients(
                    model,
                    optimizer,
                    max_norm=settings.gradient_clip or float("inf"),
                    error_if_nonfinite=False,
                )
                stop_if_not_finite(
                    fabric,
                    out,
                    whole(norm),
                    batch["name"],
                    where=f"{task.role}, epoch {epoch + 1}, step {position.step + 1}",
                )
                fabric_optimizer.step()
                fabric_optimizer.zero_grad()
                if isinstance(scheduler, OneCycleLR):
                    scheduler.step()
                position.step += 1
                add_terms(means, kd, out, labelled)
                progress.step(float(out.loss.detach()))
                stop_if_asked(fabric, interruption, task, position)

            position.epoch = epoch + 1
            row = {
                "epoch": position.epoch,
                "step": position.step,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": time.perf_counter() - started,
                **means.reduce(fabric, "train_"),
                **({} if validation is None else validate(fabric, kd, validation, task)),
            }
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(row["validation_loss"])
            if fabric.is_global_zero:
                history.add(row)
            progress.epoch(position.epoch, row)
            checkpoint.save(position, row.get("validation_loss", float("inf")))
            # A signal during the validation must not be lost with the last epoch.
            stop_if_asked(fabric, interruption, task, position)
    fabric.barrier()


def build_scheduler(
    optimizer: torch.optim.Optimizer, settings: TrainingConfig, *, steps: int
) -> LRScheduler:
    """Build the learning-rate schedule.

    Args:
        optimizer: Its learning rate is driven.
        settings: Names the schedule.
        steps: Steps of an epoch.

    Returns:
        The scheduler; "onecycle" steps after every batch, "plateau" after every epoch.
    """
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
    """Bring a batch into the form that the wrapper takes.

    Args:
        batch: From `build_loader`, on the device.
        task: Description, activation and memory format.

    Returns:
        Image (B, M, *spatial) and target (B, C, *spatial).
    """
    image = batch["image"]
    image = image.to(memory_format=torch_format(task.memory_format, image.ndim - 2))
    metadata = task.metadata
    return image, to_target(batch["label"], metadata.description, metadata.activation)


def add_terms(means: Means, kd: DistillationWrapper, out: Output, labelled: Tensor | None) -> None:
    """Add loss and terms of a step to their means.

    Args:
        means: Of the epoch.
        kd: Knows which terms read the reference; their means are over the samples that have one.
        out: What the step gave.
        labelled: Which samples have a reference, (B,); None where all have.
    """
    count = len(first_head(out.student))
    means.add({"loss": out.loss}, count)
    for name, value in out.terms.items():
        reads = labelled is not None and kd.objective.named_terms[name][1].needs_target
        means.add({name: value}, labelled.sum() if reads and labelled is not None else count)


def first_head(logits: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the logits, those of the first head where there are several."""
    return logits if isinstance(logits, Tensor) else logits[0]


def stop_if_not_finite(
    fabric: Fabric, out: Output, norm: Tensor | None, cases: Sequence[str], *, where: str
) -> None:
    """Stop before the optimizer spoils the weights.

    Args:
        fabric: Knows whether losses are scaled.
        out: What the wrapper returned.
        norm: Norm of the gradient.
        cases: Names of the subjects in the batch.
        where: Role, epoch and step, for the message.

    Raises:
        NonFiniteError: If loss or gradient are infinite or not a number.
    """
    # Under fp16 an infinite gradient is how the loss scaler finds its scale: it skips the step.
    scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
    checked = out.loss if scaled or norm is None else out.loss + norm
    if bool(torch.isfinite(checked)):
        return
    terms = ", ".join(f"{name} {float(value):.4g}" for name, value in out.terms.items())
    gradient = "unknown" if norm is None else f"{float(norm):.4g}"
    raise NonFiniteError(
        f"Training stopped ({where}): expected finite numbers, found loss "
        f"{float(out.loss.detach()):.4g} and gradient norm {gradient}.\n"
        f"Cases: {', '.join(cases)}. Terms: {terms}.\n"
        "The weights of the last finished epoch are kept. Look at these cases, lower "
        "--learning_rate, set --gradient_clip, or use --precision 32-true; then choose a new --out."
    )


def stop_if_asked(
    fabric: Fabric, interruption: Interruption, task: Task, position: Position
) -> None:
    """Leave the training after a signal to this or any other process.

    Args:
        fabric: Asks the other processes.
        interruption: Has seen the signal, or not.
        task: Names the network.
        position: Where it is.

    Raises:
        TrainingStoppedError: If there was a signal.
    """
    received = interruption.agreed(fabric)
    if received is None:
        return
    kept, epochs = position.epoch, task.settings.epochs
    raise TrainingStoppedError(
        received,
        f"Stopped in epoch {min(kept + 1, epochs)} of the {task.role}; {kept} of {epochs} epochs "
        f"are kept in {task.folder}. Give the same command to go on.",
    )


@torch.no_grad()
def validate(
    fabric: Fabric, kd: DistillationWrapper, loader: Loader, task: Task
) -> dict[str, float]:
    """Compute loss and Dice on the validation subjects.

    Args:
        fabric: Sums over processes.
        kd: The wrapper itself: processes may have different numbers of subjects here, which DDP's
            own forward would not survive; sharded weights are gathered for the whole of it.
        loader: Batches in fixed order.
        task: Says which loss counts.

    Returns:
        validation_loss, every term, and validation_dice: the mean over regions and subjects, at
        the grid; of whole volumes where samples are parts of them.
    """
    kd.eval()
    with gathered(kd):
        row = validate_batches(fabric, kd, loader, task)
        if task.volumes is None:
            return row
        return row | validate_volumes(fabric, kd, task.volumes, task)


def validate_batches(
    fabric: Fabric, kd: DistillationWrapper, loader: Loader, task: Task
) -> dict[str, float]:
    """Compute loss and terms on batches, and Dice where they are whole subjects.

    Args:
        fabric: Sums over processes.
        kd: The wrapper, in eval mode.
        loader: Batches in fixed order.
        task: Says which loss counts.

    Returns:
        validation_loss, every term, and validation_dice unless subjects are seen in parts.
    """
    zero = torch.zeros((), dtype=torch.float64, device=fabric.device)
    # Named beforehand: a process whose share is empty must add up the same columns.
    names = ("loss", *(("dice",) if task.volumes is None else ()), *kd.objective.named_terms)
    means = Means(dict.fromkeys(names, zero))
    for batch in loader:
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
    fabric: Fabric, kd: DistillationWrapper, volumes: Sequence[Sample], task: Task
) -> dict[str, float]:
    """Compute Dice of whole validation subjects, predicted window by window or slice by slice.

    Args:
        fabric: Shares the subjects among the processes.
        kd: The wrapper.
        volumes: Preprocessed subjects; they need not have one size.
        task: Says what the network sees of a subject.

    Returns:
        validation_dice: the mean over regions and subjects.
    """

    def predict(part: Tensor) -> Tensor:
        layout = torch_format(task.memory_format, part.ndim - 2)
        with fabric.autocast():
            return kd.predict(part.to(fabric.device, memory_format=layout)).float().cpu()

    metadata = task.metadata
    means = Means({"dice": torch.zeros((), dtype=torch.float64, device=fabric.device)})
    for index in range(fabric.global_rank, len(volumes), fabric.world_size):
        sample = volumes[index]
        logits = predict_volume(
            predict, sample["image"][None], patch=metadata.patch, slices=metadata.slices
        )
        dice = mean_dice(logits, sample["label"][None].long(), metadata)
        means.add({"dice": dice.to(fabric.device)}, 1)
    return means.reduce(fabric, "validation_")


def mean_dice(logits: Tensor, label: Tensor, metadata: ModelMetadata) -> Tensor:
    """Compute Dice of the predicted regions, averaged over regions and subjects.

    Args:
        logits: (B, C, *grid).
        label: Class indices, (B, 1, *grid).
        metadata: Regions and activation.

    Returns:
        A scalar; a region that both lack counts as 1.
    """
    description: Description = metadata.description
    classes = predict_classes(logits, description, metadata.activation)[:, None]
    predicted = to_target(classes, description, "sigmoid").flatten(2)
    reference = to_target(label, description, "sigmoid").flatten(2)
    size = predicted.sum(-1) + reference.sum(-1)
    overlap = 2 * (predicted * reference).sum(-1)
    return torch.where(size > 0, overlap / size.clamp(min=1), 1.0).mean()


@contextmanager
def tools(
    fabric: Fabric, task: Task, position: Position, steps: int
) -> Iterator[tuple[History, TrainingProgress, Interruption]]:
    """Open what accompanies a training; processes other than the first write and show nothing.

    Args:
        fabric: Knows the process.
        task: Files and console.
        position: Where the training begins.
        steps: Steps of an epoch.

    Yields:
        History, progress and interruption.
    """
    console = task.console if fabric.is_global_zero else Console(quiet=True)
    epochs = task.settings.epochs
    with (
        History(task.folder / "history.csv", task.scalars, epoch=position.epoch) as history,
        TrainingProgress(
            console, task.role, epochs=epochs, steps=steps, done=position.epoch
        ) as progress,
        Interruption() as interruption,
    ):
        yield history, progress, interruption


class Checkpoint:
    """Files of a training after each epoch.

    Args:
        fabric: Launched; the first process writes.
        kd: The wrapper.
        optimizer: Its state is kept.
        scheduler: Its state is kept.
        task: Files, selection, metadata.
    """

    def __init__(
        self,
        fabric: Fabric,
        kd: DistillationWrapper,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        task: Task,
    ) -> None:
        self.fabric = fabric
        self.kd = kd
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.task = task

    def resume(self) -> Position:
        """Put everything back to the end of the last finished epoch, if there is one."""
        state = load_state(self.task.state_file)
        if state is None:
            return Position()
        load_weights(self.kd, state["weights"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        restore_random_state(state["random"])
        self.fabric.print(f"{self.task.role}: continues after epoch {state['epoch']}")
        return Position(epoch=state["epoch"], step=state["step"], best=state["best"])

    def save(self, position: Position, validation_loss: float) -> None:
        """Write last weights, selected weights, and then the state that vouches for both.

        Args:
            position: Where the training is; its best value is brought up to date.
            validation_loss: Of this epoch.
        """
        task = self.task
        better = validation_loss < position.best
        position.best = min(position.best, validation_loss)
        network = getattr(self.kd.student, "_orig_mod", self.kd.student)
        # Gathered from all processes where the network is sharded.
        weights, state = whole(network.state_dict()), self._state(position)
        if not self.fabric.is_global_zero:
            return
        metadata = replace(task.metadata, epoch=position.epoch)
        save_weights(task.folder / "last.safetensors", weights, metadata)
        if better or task.settings.selection == "last" or not task.model_file.is_file():
            save_weights(task.model_file, weights, metadata)
        save_state(task.state_file, state)

    def _state(self, position: Position) -> dict[str, Any]:
        if position.epoch == self.task.settings.epochs:
            return {"finished": True, "epoch": position.epoch}
        return {
            "finished": False,
            "epoch": position.epoch,
            "step": position.step,
            "best": position.best,
            "weights": whole(self.kd.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "scheduler": self.scheduler.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "random": random_state(),
        }
