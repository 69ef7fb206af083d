"""What can teach: one frozen network, several, an average of the student, or one that learns."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import getattr_static
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from privdistill import parallel
from privdistill.exceptions import LifecycleError, ModalityError, ObjectiveError, ShapeMismatchError
from privdistill.inputs import InputViews, PrivilegedInput
from privdistill.losses import Objective
from privdistill.losses.options import is_number
from privdistill.taps.names import uncompiled


@dataclass(frozen=True)
class Ensemble:
    """Several frozen teachers; the student learns from the mean of their softened outputs.

    Features are captured from the first, or from the one that `Layer(..., network=...)` names. In
    a step, `kd(..., teacher_weights=...)` weighs them anew for each sample, so that a case can be
    taught by those alone that were not trained on it.

    Args:
        networks: The teachers; all see the teacher's view.
        weights: One positive number each, scaled to sum to one; equal unless given.

    Raises:
        ObjectiveError: If there is no teacher, or the weights do not fit.

    Example:
        >>> from torch import nn
        >>> Ensemble([nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1)], weights=[3, 1]).shares
        (0.75, 0.25)

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2: soft targets of an ensemble, by the
        arithmetic mean of its distributions.
    """

    networks: Sequence[nn.Module]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        count = len(self.networks)
        if not count:
            raise ObjectiveError("Ensemble: there is no teacher. Pass at least one network.")
        weights = [1.0] * count if self.weights is None else self.weights
        numbers = all(is_number(weight) and 0 < weight < float("inf") for weight in weights)
        if len(weights) != count or not numbers or sum(weights) == float("inf"):
            raise ObjectiveError(
                f"Ensemble: the weights are {list(weights)} for {count} teachers. Pass one "
                "positive finite number each."
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """Weights that sum to one."""
        weights = [1.0] * len(self.networks) if self.weights is None else self.weights
        return tuple(float(weight / sum(weights)) for weight in weights)


@dataclass(frozen=True)
class MovingAverage:
    """A teacher that is the exponential moving average of the student.

    Both must see the same modalities. The average follows at the start of a training step, after
    each step of the optimizer; buffers are copied. It is the wrapper's submodule `teacher`, in eval
    mode and without gradients.

    Args:
        decay: Share of the average that is kept in each step, in [0, 1).

    Raises:
        ObjectiveError: If the decay is outside of [0, 1).

    Source:
        Tarvainen & Valpola 2017, arXiv:1703.01780; while few steps have been taken the decay is
        `1 - 1 / (step + 1)`, a plain mean, as in the authors' code.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not (is_number(self.decay) and 0 <= self.decay < 1):
            raise ObjectiveError(f"MovingAverage: `decay` must be in [0, 1); got {self.decay!r}.")


@dataclass(frozen=True)
class JointTeacher:
    """A teacher that is trained together with the student.

    It is the wrapper's submodule `teacher`: in its `parameters()` and `state_dict()`, in its mode.
    Terms never send gradients into a teacher, so the objective needs one that supervises it:
    `GroundTruth(of="teacher")`.

    Args:
        network: The teacher.
    """

    network: nn.Module


Teacher = nn.Module | Sequence[nn.Module] | Ensemble | MovingAverage | JointTeacher


def networks_of(teacher: Teacher | None, student: nn.Module) -> list[nn.Module]:
    """Return the networks that a teacher consists of; an average is a copy of the student.

    Args:
        teacher: What the user declared.
        student: The student.

    Returns:
        Networks; none where there is no teacher.

    Raises:
        LifecycleError: If it is anything else than networks or a declaration.
    """
    if teacher is None:
        return []
    if isinstance(teacher, MovingAverage):
        return [copy.deepcopy(uncompiled(student)).requires_grad_(requires_grad=False)]
    if isinstance(teacher, JointTeacher):
        found: list[Any] = [teacher.network]
    elif isinstance(teacher, Ensemble):
        found = list(teacher.networks)
    else:
        found = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
    wrong = [network for network in found if not isinstance(network, nn.Module)]
    if wrong or not found:
        raise LifecycleError(
            f"The teacher is {wrong[0] if wrong else teacher!r}; expected a network, a list of "
            "them, Ensemble(...), MovingAverage(...), JointTeacher(...) or None."
        )
    return found


def roles_of(teachers: Sequence[nn.Module]) -> list[str]:
    """Return what messages call each teacher: by number, from 1, where there are several."""
    several = len(teachers) > 1
    return [f"teacher {i + 1}" if several else "teacher" for i in range(len(teachers))]


def check_networks(student: nn.Module, teachers: Sequence[nn.Module]) -> None:
    """Refuse networks that cannot be wrapped together.

    Args:
        student: The student.
        teachers: The teachers, if any.

    Raises:
        LifecycleError: If one is in DataParallel or has lazy layers, the student is sharded, or
            teacher and student share parameters or layers.
    """
    if not isinstance(student, nn.Module):
        raise LifecycleError(
            f"The student is {student!r}; expected a network, an instance of torch.nn.Module."
        )
    for role, network in zip(["student", *roles_of(teachers)], [student, *teachers], strict=True):
        if isinstance(network, nn.DataParallel):
            raise LifecycleError(
                f"The {role} is wrapped in DataParallel, whose copies no hook survives. Pass the "
                "network itself and use DistributedDataParallel, one process per device."
            )
        if any(map(is_lazy, network.parameters())):
            raise LifecycleError(
                f"The {role} has lazy layers without weights. Run it once on a batch of its own "
                "before the wrapper is built."
            )
    parallel.check_not_sharded(student)
    own = {id(part) for part in _parts(student)}
    both = {
        type(part).__name__: None
        for teacher in teachers
        for part in _parts(teacher)
        if id(part) in own
    }
    if both:
        raise LifecycleError(
            f"Teacher and student share parameters or layers ({', '.join(both)}), which cannot be "
            "frozen in eval mode and be trained at once. Give each network its own; "
            "copy.deepcopy(network) makes a second one."
        )


def check_declared(teacher: Teacher | None, inputs: InputViews, objective: Objective) -> None:
    """Refuse a teacher that cannot teach what it is to teach.

    Args:
        teacher: What the user declared.
        inputs: How the input is divided.
        objective: Says what is read of a teacher.

    Raises:
        ModalityError: If an average of the student is to see other modalities than the student.
        ObjectiveError: If a teacher is read and there is none.
    """
    average = isinstance(teacher, MovingAverage)
    if average and isinstance(inputs, PrivilegedInput) and inputs.teacher != inputs.student:
        raise ModalityError(
            f"A MovingAverage of the student sees what the student sees, but the views differ: "
            f"{inputs}. Pass teacher={inputs.student} to PrivilegedInput, or a trained teacher."
        )
    terms = objective.named_terms.items()
    needy = [n for n, (weight, t) in terms if weight.factor and (t.needs_teacher or t.taps)]
    if teacher is None and needy:
        raise ObjectiveError(
            f"The objective's {', '.join(needy)} read the teacher, but teacher=None. Pass a "
            "trained teacher, or an objective of GroundTruth() alone."
        )


def _parts(network: nn.Module) -> list[object]:
    return [*network.parameters(), *(part for part in network.modules() if _has_state(part))]


def _has_state(module: nn.Module) -> bool:
    """Whether a module has parameters, buffers or a mode: a ReLU may serve two networks."""
    forward = getattr(getattr_static(module, "forward"), "__code__", None)
    reads_mode = forward is None or "training" in forward.co_names
    return reads_mode or any(True for _ in chain(module.parameters(), module.buffers()))


@torch.no_grad()
def follow(average: nn.Module, student: nn.Module, decay: float, steps: Tensor) -> None:
    """Move an average towards the student, after a step of the optimizer.

    Args:
        average: The average.
        student: The student.
        decay: See `MovingAverage`.
        steps: Number of steps taken, a scalar.

    Raises:
        LifecycleError: If the average is in half precision.
    """
    share = 1 - (1 - 1 / (steps.double() + 1)).clamp(max=decay)
    source = uncompiled(student)
    for mean, value in zip(average.parameters(), source.parameters(), strict=True):
        if mean.dtype in (torch.float16, torch.bfloat16):
            raise LifecycleError(
                f"A MovingAverage in {mean.dtype} stops moving, as its small changes round to "
                "nothing. Keep the weights in float32 and use torch.autocast."
            )
        mean.lerp_(parallel.like(value, mean), share.to(mean.dtype))
    for kept, buffer in zip(average.buffers(), source.buffers(), strict=True):
        kept.copy_(parallel.like(buffer, kept))


def teacher_shares(given: Tensor, count: int, image: Tensor, *, check: bool) -> Sequence[Tensor]:
    """Return what each teacher counts for each sample.

    Args:
        given: Weights of this step's samples, `(B, teachers)`.
        count: Number of teachers.
        image: Any tensor of the batch, on the device of the step.
        check: Whether to look at the values, for which a GPU waits.

    Returns:
        For each teacher `(B,)`.

    Raises:
        ShapeMismatchError: If there is not one weight per sample and teacher.
        ObjectiveError: If a weight is negative or not finite, or a sample has no teacher left.
    """
    expected = (len(image), count)
    if tuple(given.shape) != expected or not count:
        raise ShapeMismatchError(
            f"`teacher_weights` is {tuple(given.shape)}; expected {expected}: one weight for each "
            "sample of the batch and each teacher of the wrapper."
        )
    weights = given.to(image.device, torch.float32)
    total = weights.sum(dim=1, keepdim=True)
    if check and not bool((weights.isfinite() & (weights >= 0) & (total > 0)).all()):
        raise ObjectiveError(
            f"`teacher_weights` is {weights.tolist()}; weights must be finite and not negative, "
            "and each sample needs a teacher with a positive one."
        )
    return list((weights / total).unbind(dim=1))
