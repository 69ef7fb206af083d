"""The training loop, the same for teacher, baseline and student."""

import time
from collections.abc import Sequence
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from kdnet.config import TrainingConfig
from kdnet.data.loading import Batch, start_epoch
from kdnet.data.targets import predict_classes, to_target
from kdnet.evaluation.inference import predict_volume
from kdnet.stopping import StoppedError, deferring
from kdnet.training.checkpoint import (
    Loader,
    Means,
    ModelMetadata,
    Task,
    Training,
    pause,
    resume,
    save_epoch,
)
from kdnet.training.history import Journal
from kdnet.training.runtime import check_image, check_step, gathered, torch_format
from privdistill import DistillationWrapper, Output


def fit(
    fabric: Fabric, kd: DistillationWrapper, train: Loader, validation: Loader | None, task: Task
) -> None:
    """Train the student of a wrapper, from the start or from where it was interrupted."""
    # The same way from the start and after an interruption: what goes on is put back first.
    training = set_up(fabric, kd, train, validation, task)
    resume(training)
    journal = Journal(task, epoch=training.epoch, steps=training.steps, rank=fabric.global_rank)
    with journal.open(), deferring() as training.interruption:
        while training.epoch < task.settings.epochs:
            train_epoch(training, journal)
            row = close_epoch(training)
            journal.epoch(row)
            save_epoch(training, row.get("validation_loss", float("inf")))
            # A signal during the last batch of the validation must not be lost with the last epoch.
            stop_if_asked(training)
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


def train_epoch(training: Training, journal: Journal) -> None:
    """Take the steps of an epoch that are still to be taken."""
    started = time.perf_counter() - training.seconds
    # Order and flips follow from the epoch, so that those that were seen can be left out.
    start_epoch(training.train, training.epoch, done=training.batch)
    training.model.train()
    for batch in training.train:
        out, loss = take_step(training, batch)
        training.step += 1
        training.batch += 1
        add_terms(training.means, training.kd, out, batch.get("labelled"))
        journal.step(loss)
        training.seconds = time.perf_counter() - started
        stop_if_asked(training)


def take_step(training: Training, batch: Batch) -> tuple[Output, float]:
    """Change the weights by one batch; return what the wrapper gave, and the loss."""
    fabric, task = training.fabric, training.task
    where = f"{task.metadata.role}, epoch {training.epoch + 1}, step {training.step + 1}"
    check_image(batch, training.kd, where)
    image, target = prepare(batch, task)
    out: Output = training.model(
        image,
        target,
        labelled=batch.get("labelled"),
        teacher_weights=task.teacher_weights(batch["name"]),
        key=batch.get("key"),
    )
    fabric.backward(out.loss)
    norm = fabric.clip_gradients(
        training.model,
        training.optimizer,
        # Without a limit nothing is clipped; the norm is looked at all the same.
        max_norm=task.settings.gradient_clip or float("inf"),
        error_if_nonfinite=False,
    )
    loss = check_step(fabric, batch, out, norm, where)
    training.stepping.step()
    training.stepping.zero_grad()
    if isinstance(training.scheduler, OneCycleLR):
        training.scheduler.step()
    return out, loss


def prepare(batch: Batch, task: Task) -> tuple[Tensor, Tensor]:
    """Bring a batch into the form that the wrapper takes."""
    image = batch["image"]
    image = image.to(memory_format=torch_format(task.settings.memory_format, image.ndim - 2))
    metadata = task.metadata
    return image, to_target(batch["label"], metadata.description, metadata.activation)


def add_terms(means: Means, kd: DistillationWrapper, out: Output, labelled: Tensor | None) -> None:
    """Add loss and terms of a step to their means."""
    # Of several heads the first one is the logits.
    count = len(out.student if isinstance(out.student, Tensor) else out.student[0])
    means.add({"loss": out.loss}, count)
    for name, value in out.terms.items():
        reads = labelled is not None and kd.objective.named_terms[name][1].needs_target
        means.add({name: value}, labelled.sum() if reads and labelled is not None else count)


def close_epoch(training: Training) -> dict[str, float]:
    """Validate after the last step of an epoch, and return its row of the history."""
    started = time.perf_counter()
    measured = validate(training)
    row = {
        "epoch": training.epoch + 1,
        "step": training.step,
        "learning_rate": training.optimizer.param_groups[0]["lr"],
        "seconds": training.seconds + time.perf_counter() - started,
        **training.means.reduce(training.fabric, "train_"),
        **measured,
    }
    if isinstance(training.scheduler, ReduceLROnPlateau):
        training.scheduler.step(row["validation_loss"])
    training.epoch += 1
    training.batch, training.seconds, training.means = 0, 0.0, Means()
    return row


@torch.no_grad()
def validate(training: Training) -> dict[str, float]:
    """Compute loss and Dice on the validation subjects, if there are any."""
    if training.validation is None:
        return {}
    training.kd.eval()
    with gathered(training.kd):
        row = validate_batches(training)
        if training.task.volumes is None:
            return row
        return row | validate_volumes(training)


def validate_batches(training: Training) -> dict[str, float]:
    """Compute loss and terms on batches, and Dice where they are whole subjects."""
    fabric, kd, task = training.fabric, training.kd, training.task
    # Named beforehand: a process whose share is empty must add up the same columns.
    names = ("loss", *(("dice",) if task.volumes is None else ()), *kd.objective.named_terms)
    means = Means(dict.fromkeys(names, torch.zeros(2, dtype=torch.float64, device=fabric.device)))
    for batch in cast("Loader", training.validation):
        stop_if_alone(training)
        image, target = prepare(batch, task)
        with fabric.autocast():
            out = kd(image, target, key=batch.get("key"))
        ground_truth = task.settings.validation_loss == "ground_truth"
        # What a student imitates says little of how well it segments.
        loss = out.terms.get("ground_truth", out.loss) if ground_truth else out.loss
        values = {"loss": loss} | out.terms
        if task.volumes is None:
            values["dice"] = mean_dice(out.student, batch["label"], task.metadata)
        means.add(values, len(image))
    return means.reduce(fabric, "validation_")


def validate_volumes(training: Training) -> dict[str, float]:
    """Compute Dice of whole validation subjects, predicted window by window or slice by slice."""
    fabric, kd, task = training.fabric, training.kd, training.task
    metadata, volumes = task.metadata, task.volumes or ()

    def predict(part: Tensor) -> Tensor:
        layout = torch_format(task.settings.memory_format, part.ndim - 2)
        with fabric.autocast():
            return kd.predict(part.to(fabric.device, memory_format=layout)).float().cpu()

    means = Means({"dice": torch.zeros(2, dtype=torch.float64, device=fabric.device)})
    for index in range(fabric.global_rank, len(volumes), fabric.world_size):
        stop_if_alone(training)
        sample = volumes[index]
        logits = predict_volume(
            predict, sample["image"][None], patch=metadata.patch, slices=metadata.slices
        )
        dice = mean_dice(logits, sample["label"][None].long(), metadata)
        means.add({"dice": dice.to(fabric.device)}, 1)
    return means.reduce(fabric, "validation_")


def mean_dice(logits: Tensor | Sequence[Tensor], label: Tensor, metadata: ModelMetadata) -> Tensor:
    """Compute Dice of the predicted regions, averaged over regions and subjects."""
    description = metadata.description
    classes = predict_classes(cast("Tensor", logits), description, metadata.activation)[:, None]
    predicted = to_target(classes, description, "sigmoid").flatten(2)
    reference = to_target(label, description, "sigmoid").flatten(2)
    size = predicted.sum(-1) + reference.sum(-1)
    overlap = 2 * (predicted * reference).sum(-1)
    return torch.where(size > 0, overlap / size.clamp(min=1), 1.0).mean()


def stop_if_alone(training: Training) -> None:
    """Leave a validation after a signal; several processes could not agree within one."""
    # Each has another number of batches.
    if training.fabric.world_size == 1:
        stop_if_asked(training)


def stop_if_asked(training: Training) -> None:
    """Keep everything and leave the training after a signal to this or any other process."""
    received = training.interruption.agreed(training.fabric)
    if received is None:
        return
    task = training.task
    inside = ""
    if training.batch:
        pause(training)
        inside = f" and {training.batch} of {training.steps} steps of the next"
    kept, epochs = training.epoch, task.settings.epochs
    raise StoppedError(
        received,
        f"Stopped in epoch {min(kept + 1, epochs)} of the {task.metadata.role}; {kept} of {epochs} "
        f"epochs{inside} are kept in {task.folder.root}. Give the same command to go on.",
    )
