"""What is found out about a teacher before its student is trained: a temperature, a diagnosis."""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Literal

from lightning_fabric import Fabric
from torch import nn

from kdnet.config import PAPER_TEMPERATURE
from kdnet.data.loading import Batch
from kdnet.files import write_text
from kdnet.training.checkpoint import Task
from kdnet.training.loop import prepare
from privdistill import (
    DistillationWrapper,
    ObjectiveError,
    PrivilegedInput,
    diagnose,
    fit_temperature,
)

#: Batches that are read: more cost time before the training, fewer hold no small region.
FITTED_ON = 16
DIAGNOSED_ON = 4


def fitted_temperature(
    fabric: Fabric,
    teachers: Sequence[nn.Module],
    batches: Iterable[Batch],
    inputs: PrivilegedInput,
    activation: Literal["softmax", "sigmoid"],
) -> float | None:
    """Return the largest temperature up to the paper's at which all teachers keep their word.

    None if none of them predicts anything.
    """
    seen = [{"image": batch["image"].to(fabric.device)} for batch in islice(batches, FITTED_ON)]
    found = []
    for teacher in teachers:
        # One that predicts no class says so only here, and must not cost its own training.
        with suppress(ObjectiveError):
            found.append(
                fit_temperature(
                    teacher.to(fabric.device),
                    seen,
                    PAPER_TEMPERATURE,
                    activation=activation,
                    inputs=inputs,
                )
            )
    # Processes see different batches, and must agree.
    return fabric.broadcast(round(min(found), 3) if found else None)


def show_diagnosis(
    fabric: Fabric, kd: DistillationWrapper, batches: Iterable[Batch], task: Task
) -> None:
    """Say whether distillation is going to help, and keep it beside the network, once."""
    file = task.folder.root / "diagnosis.md"
    if file.is_file() or not fabric.is_global_zero:
        return
    kd.to(fabric.device)
    steps = [
        dict(
            zip(("image", "target"), prepare(batch, task), strict=True),
            labelled=batch.get("labelled"),
            teacher_weights=task.teacher_weights(batch["name"]),
        )
        for batch in chosen(batches)
    ]
    found = diagnose(kd, steps, limit=DIAGNOSED_ON)
    # What it starts from as well: a layer may have been left, or its statistics be others'.
    text = "\n".join(str(part) for part in (kd.inherited, found) if part is not None)
    task.console.print(text, soft_wrap=True)
    task.folder.root.mkdir(parents=True, exist_ok=True)
    write_text(task.folder.root / "diagnosis.json", json.dumps(found.to_dict(), indent=2) + "\n")
    write_text(file, f"{text}\n")


def chosen(batches: Iterable[Batch]) -> list[Batch]:
    """Take the first batches; where references are few, the first with one is the last of them."""
    rest = iter(batches)
    first = list(islice(rest, DIAGNOSED_ON))
    if not any(map(_has_reference, first)):
        # Without a reference nobody knows whether the teacher leads.
        first[-1:] = list(islice(filter(_has_reference, rest), 1)) or first[-1:]
    return first


def _has_reference(batch: Batch) -> bool:
    labelled = batch.get("labelled")
    return labelled is None or bool(labelled.any())
