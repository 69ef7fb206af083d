"""What can teach: one frozen network, several, an average of the student, or one that learns."""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import getattr_static
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from privdistill import parallel
from privdistill.exceptions import LifecycleError, ModalityError, ObjectiveError, ShapeMismatchError
from privdistill.inputs import InputViews, PrivilegedInput
from privdistill.losses.objective import Objective
from privdistill.losses.options import DECAY, POSITIVE, check, listed, one_of
from privdistill.sides.frozen import Frozen, Resting
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

    #: Weights that sum to one.
    shares: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given: Any = self.networks
        # A network may be iterable, too: its layers are no teachers.
        one = isinstance(given, nn.Module) and not isinstance(given, nn.ModuleList)
        networks = [] if one or not isinstance(given, Iterable) else list(given)
        count = len(networks)
        if not count:
            raise ObjectiveError(
                f"Ensemble: there is no teacher in {given!r}; pass a list of them."
            )
        weights = [1.0] * count if self.weights is None else listed(self.weights)
        numbers = all(map(POSITIVE.holds, weights))
        if len(weights) != count or not numbers or sum(weights) == float("inf"):
            raise ObjectiveError(
                f"Ensemble: the weights are {weights} for {count} teachers. Pass one "
                "positive finite number each."
            )

        shares = tuple(float(weight / sum(weights)) for weight in weights)
        # The only way to set a field of a frozen data class.
        object.__setattr__(self, "networks", networks)
        object.__setattr__(self, "shares", shares)


@dataclass(frozen=True)
class MovingAverage:
    """A teacher that is the exponential moving average of the student.

    Both must see the same modalities. The average follows at the start of a training step, after
    each step of the optimizer; buffers are copied. It is the wrapper's submodule `teacher`, in eval
    mode and without gradients. With `decay=0` it is the student as it is now: one network that
    learns from what it says itself when it sees more, with `PrivilegedInput(..., dropout=0.5)`.

    Args:
        decay: Share of the average that is kept in each step, in [0, 1).

    Raises:
        ObjectiveError: If the decay is outside of [0, 1).

    Example:
        >>> from privdistill import DistillationWrapper, ProbabilityMSE
        >>> student = nn.Conv2d(1, 2, 1)
        >>> kd = DistillationWrapper(MovingAverage(0.99), student, objective=ProbabilityMSE())
        >>> [name for name, _ in kd.named_children()]
        ['objective', 'student', 'adapters', 'teacher']

    Source:
        Tarvainen & Valpola 2017, arXiv:1703.01780; while few steps have been taken the decay is
        `1 - 1 / (step + 1)`, a plain mean, as in the authors' code.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        check("MovingAverage", DECAY, decay=self.decay)


@dataclass(frozen=True)
class JointTeacher:
    """A teacher that is trained together with the student.

    It is the wrapper's submodule `teacher`: in its `parameters()` and `state_dict()`, in its mode.
    Terms never send gradients into a teacher, so the objective needs one that supervises it:
    `GroundTruth(of="teacher")`.

    Args:
        network: The teacher.

    Example:
        >>> from privdistill import GroundTruth, HintonKL
        >>> teacher = JointTeacher(nn.Conv2d(2, 2, 1))
        >>> objective = GroundTruth() + HintonKL() + GroundTruth(of="teacher").named("teacher")
    """

    network: nn.Module


Teacher = nn.Module | Sequence[nn.Module] | Ensemble | MovingAverage | JointTeacher


def networks_of(teacher: Teacher | None, student: nn.Module) -> list[nn.Module]:
    """Return the networks that a teacher consists of; an average is a copy of the student."""
    if teacher is None:
        return []
    if isinstance(teacher, MovingAverage):
        # A compiled student would drag its compiler into the copy, whose graphs are another's.
        average = copy.deepcopy(uncompiled(student)).requires_grad_(requires_grad=False)
        # Each tensor with memory of its own, also where the student's is expanded.
        return [average._apply(torch.clone)]  # type: ignore[no-untyped-call]  # noqa: SLF001
    if isinstance(teacher, JointTeacher):
        found: list[Any] = [teacher.network]
    elif isinstance(teacher, Ensemble):
        found = list(teacher.networks)
    else:
        found = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
    wrong = [network for network in found if not isinstance(network, nn.Module)]
    if wrong or not found:
        raise LifecycleError(
            f"The teacher is {_short(wrong[0] if wrong else teacher)}; expected a network, a list "
            "of them, Ensemble(...), MovingAverage(...), JointTeacher(...) or None."
        )
    return found


def _short(given: object) -> str:
    """What came instead of a network; of a state_dict not its numbers, but where they belong."""
    if not isinstance(given, Mapping):
        return repr(given)
    return f"{type(given).__name__}, weights that network.load_state_dict(...) takes"


def roles_of(teachers: Sequence[nn.Module]) -> list[str]:
    """Return what messages call each teacher: by number, from 1, where there are several."""
    several = len(teachers) > 1
    return [f"teacher {i + 1}" if several else "teacher" for i in range(len(teachers))]


def held(teacher: Teacher | None, network: nn.Module) -> nn.Module | Resting:
    """Return what runs one network of a teacher: frozen, at rest, or as it is if it is trained."""
    if isinstance(teacher, JointTeacher):
        # It may come from another training, in which it was left in eval mode.
        return network.train()
    return Resting(network) if isinstance(teacher, MovingAverage) else Frozen(network)


def shares_of(teacher: Teacher | None, count: int) -> Sequence[float]:
    """Return what each of several teachers counts for."""
    return teacher.shares if isinstance(teacher, Ensemble) else (1 / max(count, 1),) * count


def check_networks(student: nn.Module, teachers: Sequence[nn.Module], learns: bool) -> None:
    """Refuse networks that cannot be wrapped together, or that cannot learn."""
    if not isinstance(student, nn.Module):
        raise LifecycleError(
            f"The student is {_short(student)}; expected a network, an instance of torch.nn.Module."
        )
    for role, network in zip(["student", *roles_of(teachers)], [student, *teachers], strict=True):
        # A part that is replicated hides its taps as well as a whole does.
        if any(isinstance(module, nn.DataParallel) for module in network.modules()):
            raise LifecycleError(
                f"The {role}, or a part of it, is wrapped in DataParallel, whose copies no hook "
                "survives. Pass the network itself and use DistributedDataParallel, one process "
                "per device."
            )
        if any(map(is_lazy, network.parameters())):
            raise LifecycleError(
                f"The {role} has lazy layers without weights. Run it once on a batch of its own "
                "before the wrapper is built."
            )
        if (network is student or learns) and any(p.is_inference() for p in network.parameters()):
            raise LifecycleError(
                f"The {role}, made in inference mode, cannot learn. Pass copy.deepcopy(network)."
            )
        empty = any(p.is_meta for p in network.parameters()) and not is_offloaded(network)
        # Where the student is empty, too, both may be filled later.
        if empty and not any(p.is_meta for p in student.parameters()):
            raise LifecycleError(
                f"The {role} has parameters on the meta device, which hold no values. Load them "
                "before the wrapper is built: network.load_state_dict(state, assign=True)."
            )
    # Before anything runs: FSDP gathers weights in a forward pass.
    parallel.check_not_sharded(student)
    # By identity: one layer of two networks could not be frozen in one and trained in the other.
    own = {id(part) for part in _parts(student)}
    of_teachers = [part for teacher in teachers for part in _parts(teacher)]
    both = dict.fromkeys(type(part).__name__ for part in of_teachers if id(part) in own)
    if both:
        raise LifecycleError(
            f"Teacher and student share parameters or layers ({', '.join(both)}), which cannot be "
            "frozen in eval mode and be trained at once. Give each network its own; "
            "copy.deepcopy(network) makes a second one."
        )


def check_declared(
    teacher: Teacher | None, inputs: InputViews, objective: Objective, start: str
) -> None:
    """Refuse a teacher that cannot teach what it is to teach, or that has nothing to start from."""
    check("DistillationWrapper", one_of("scratch", "teacher"), start=start)
    average = isinstance(teacher, MovingAverage)
    if average and isinstance(inputs, PrivilegedInput) and inputs.teacher != inputs.student:
        raise ModalityError(
            f"A MovingAverage of the student sees what the student sees, but the views differ: "
            f"{inputs}. Pass teacher={inputs.student} to PrivilegedInput, or a trained teacher."
        )
    # What weighs nothing reads nothing.
    terms = objective.named_terms.items()
    needy = [n for n, (weight, t) in terms if weight.factor and (t.needs_teacher or t.taps)]
    if teacher is None and needy:
        raise ObjectiveError(
            f"The objective's {', '.join(needy)} read the teacher, but teacher=None. Pass a "
            "trained teacher, or an objective of GroundTruth() alone."
        )
    # Terms of the library send no gradient into a teacher; one of the user's own may.
    readers = [t for _, (weight, t) in terms if weight.factor and t.needs_teacher]
    trains = any(hasattr(t, "of") or "privdistill." not in type(t).__module__ for t in readers)
    if isinstance(teacher, JointTeacher) and not trains:
        advice = "Add GroundTruth(of='teacher'), or train it by a loss of your own."
        warnings.warn(f"No term of {objective} trains the JointTeacher. {advice}", stacklevel=3)
    if start == "teacher" and (teacher is None or average):
        raise ObjectiveError(
            f"DistillationWrapper: start='teacher', but teacher={teacher}, which has no weights of "
            "its own to start from. Pass a trained network as teacher, or leave `start` out; "
            "inherit(student, network, inputs) takes the weights of any other network."
        )


def is_offloaded(network: nn.Module) -> bool:
    """Whether accelerate keeps weights elsewhere: on meta, until their layer runs."""
    return any(hasattr(module, "_hf_hook") for module in network.modules())


def _parts(network: nn.Module) -> list[object]:
    return [*network.parameters(), *(part for part in network.modules() if _has_state(part))]


def _has_state(module: nn.Module) -> bool:
    """Whether a module has parameters, buffers or a mode: a ReLU may serve two networks."""
    # Whether its forward reads the mode is written in its code; a compiled one is not asked.
    forward = getattr(getattr_static(module, "forward"), "__code__", None)
    reads_mode = forward is None or "training" in forward.co_names
    return reads_mode or any(True for _ in chain(module.parameters(), module.buffers()))


@torch.no_grad()
def follow(average: nn.Module, student: nn.Module, decay: float, steps: Tensor) -> None:
    """Move an average towards the student, after as many steps of the optimizer.

    Its share grows from a plain mean to `decay`; half precision would stop it.
    """
    # On the device, since a number would make a GPU wait and a graph be made anew.
    share = 1 - (1 - 1 / (steps.double() + 1)).clamp(max=decay)
    source = uncompiled(student)
    for mean, value in zip(average.parameters(), source.parameters(), strict=True):
        if mean.dtype in (torch.float16, torch.bfloat16):
            raise LifecycleError(
                f"A MovingAverage in {mean.dtype} stops moving, as its small changes round to "
                "nothing. Keep the weights in float32 and use torch.autocast."
            )
        mean.lerp_(parallel.like(value, mean), share.to(mean.dtype))
    # Statistics are copied, not averaged: those of the student belong to weights close by.
    for kept, buffer in zip(average.buffers(), source.buffers(), strict=True):
        kept.copy_(parallel.like(buffer, kept))


def teacher_shares(given: Tensor, count: int, image: Tensor, *, check: bool) -> Sequence[Tensor]:
    """Return what each teacher counts for each sample: for each of them `(B,)`.

    `given` is `(B, teachers)`; its values are looked at, for which a GPU waits, on `check` alone.
    """
    expected = (len(image), count)
    if tuple(given.shape) != expected or not count:
        raise ShapeMismatchError(
            f"`teacher_weights` is {tuple(given.shape)}; expected {expected}: one weight for each "
            "sample of the batch and each teacher of the wrapper."
        )
    # Half precision would not sum to one.
    weights = given.to(image.device, torch.float32)
    total = weights.sum(dim=1, keepdim=True)
    if check and not bool((weights.isfinite() & (weights >= 0) & (total > 0)).all()):
        raise ObjectiveError(
            f"`teacher_weights` is {weights.tolist()}; weights must be finite and not negative, "
            "and each sample needs a teacher with a positive one."
        )
    return list((weights / total).unbind(dim=1))
