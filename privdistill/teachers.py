"""What can teach: one frozen network, several, an average of the student, or one that learns."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from privdistill.dry_run import set_mode
from privdistill.exceptions import LifecycleError, ObjectiveError, ShapeMismatchError
from privdistill.losses.schedules import is_number
from privdistill.taps.names import uncompiled

# Where a held teacher keeps its claim; a copy of one keeps None there.
CLAIM = "_privdistill_claim"


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
        weights = self.weights or [1.0] * len(self.networks)
        return tuple(weight / sum(weights) for weight in weights)


@dataclass(frozen=True)
class MovingAverage:
    """A teacher that is the exponential moving average of the student.

    Both must see the same modalities. The average follows at the start of every training step, as
    it was after the optimizer's last one; buffers are copied. Its state is in the wrapper's
    `state_dict()`.

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

    It runs in the wrapper's mode and with gradients. Terms never send gradients into a teacher, so
    the objective needs one that supervises it: `GroundTruth(of="teacher")`. Its parameters are
    `kd.teacher_parameters()`, its state is in the wrapper's `state_dict()`.

    Args:
        network: The teacher.
    """

    network: nn.Module


Teacher = nn.Module | Sequence[nn.Module] | Ensemble | MovingAverage | JointTeacher


class _Claim:
    """What a teacher was like before it was frozen, and how many wrappers hold it."""

    def __init__(self, teacher: nn.Module) -> None:
        self.holders = 0
        self.training = {module: module.training for module in teacher.modules()}
        # Those of a network made under inference_mode() have no gradients to stop.
        self.gradients = {p: p.requires_grad for p in teacher.parameters() if not p.is_inference()}

    def restore(self) -> None:
        for module, mode in self.training.items():
            module.training = mode
        for parameter, needed in self.gradients.items():
            parameter.requires_grad_(needed)

    # A copy of a teacher is held by no wrapper, so the claim does not travel with it.
    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class Holder:
    """Hold a teacher outside the wrapper's own modules.

    It is no `nn.Module` on purpose: so the teacher is in neither `parameters()` nor
    `state_dict()`, and `train()` cannot reach it.

    Args:
        module: The teacher.
        moves: Whether `.to()` and its kin reach the teacher; a copied wrapper shares the teacher
            and must not move it under the original.
    """

    # Whether the network belongs to this wrapper alone, is copied with it and is in its state.
    owned = False
    learns = False

    def __init__(self, module: nn.Module, *, moves: bool = True) -> None:
        self.module = module
        self.moves = moves
        self.holding = True

    def follow(self, student: nn.Module, steps: Tensor) -> None:
        """Learn from the student before a training step; most teachers do not.

        Args:
            student: The student.
            steps: Number of steps taken, a scalar.
        """

    def __call__(self, image: Tensor) -> Any:
        """Run the teacher.

        Args:
            image: The teacher's view, `(B, C, *spatial)`.

        Returns:
            Whatever the network returns.

        Raises:
            LifecycleError: If the image is on another device than the teacher.
        """
        parameter = next(self.module.parameters(), None)
        # An offloaded teacher, whose weights are meta, moves its input itself.
        if parameter is not None and parameter.device not in (image.device, torch.device("meta")):
            raise LifecycleError(
                f"The teacher is on {parameter.device}, its view of the input on {image.device}. "
                "Move the input there; a copied wrapper shares the teacher and never moves it, so "
                "move the original, or build a second wrapper with a teacher of its own."
            )
        return self.module(image)

    def train(self, mode: bool) -> None:
        """Take the wrapper's mode; frozen teachers stay in eval mode.

        Args:
            mode: Train mode, or eval mode.
        """

    def apply(self, function: Callable[[Tensor], Tensor], *, recurse: bool = True) -> None:
        """Apply what `nn.Module.to()` and its kin apply to every tensor, while it is held.

        Args:
            function: Maps a tensor to the moved or cast one.
            recurse: As in `nn.Module._apply`.
        """
        if self.moves and self.holding:
            self.module._apply(function, recurse)  # type: ignore[no-untyped-call]  # noqa: SLF001

    def release(self) -> None:
        """Hold the teacher no more."""
        self.holding = False


class FrozenTeacher(Holder):
    """Hold a teacher in eval mode without gradients.

    The claim is kept on the teacher itself, so that the last of several wrappers restores it and
    no global state is needed.

    Args:
        module: The teacher.
        moves: As in `Holder`.
    """

    def __init__(self, module: nn.Module, *, moves: bool = True) -> None:
        super().__init__(module, moves=moves)
        # Compiled or not, it is one network with one claim.
        inner = uncompiled(module)
        claim = inner.__dict__.get(CLAIM) or _Claim(module)
        claim.holders += 1
        # Kept in the instance dictionary: as a module attribute it would enter named_modules().
        inner.__dict__[CLAIM] = claim
        self._parts = list(module.modules())
        set_mode(module, training=False)
        for parameter in claim.gradients:
            parameter.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Any:
        """Run the teacher without gradients."""
        if any(part.training for part in self._parts):
            # Someone who shares the teacher called train() on it; batch statistics must not move.
            set_mode(self.module, training=False)
        return super().__call__(image)

    def release(self) -> None:
        """Give up the claim; the last one to do so restores modes and gradient flags."""
        inner = uncompiled(self.module)
        claim = inner.__dict__.get(CLAIM)
        if not self.holding or claim is None:
            return
        self.holding = False
        claim.holders -= 1
        if claim.holders == 0:
            del inner.__dict__[CLAIM]
            claim.restore()


class AveragedTeacher(FrozenTeacher):
    """Hold the moving average of the student.

    Args:
        module: A copy of the student.
        decay: See `MovingAverage`.
    """

    owned = True

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module)
        self.decay = decay

    @torch.no_grad()
    def follow(self, student: nn.Module, steps: Tensor) -> None:
        """Move the average towards the student."""
        share = 1 - (1 - 1 / (steps.double() + 1)).clamp(max=self.decay)
        source = uncompiled(student)
        for mean, value in zip(self.module.parameters(), source.parameters(), strict=True):
            if mean.dtype in (torch.float16, torch.bfloat16):
                raise LifecycleError(
                    f"A MovingAverage in {mean.dtype} stops moving, as its small changes round to "
                    "nothing. Keep the weights in float32 and use torch.autocast."
                )
            mean.lerp_(_whole(value), share.to(mean.dtype))
        for kept, buffer in zip(self.module.buffers(), source.buffers(), strict=True):
            kept.copy_(_whole(buffer))


def _whole(value: Tensor) -> Tensor:
    """All of a tensor of which FSDP keeps a part in each process; the average is not sharded."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


class LearningTeacher(Holder):
    """Hold a teacher that is trained with the student.

    Args:
        module: The teacher.
    """

    owned = True
    learns = True

    def train(self, mode: bool) -> None:
        """Take the wrapper's mode."""
        self.module.train(mode)


def members(teacher: Teacher | None, student: nn.Module) -> list[nn.Module]:
    """Return the networks that a teacher consists of.

    Args:
        teacher: What the user declared.
        student: The student, of which an average is a copy.

    Returns:
        Networks; none where there is no teacher.

    Raises:
        LifecycleError: If it is anything else than networks or a declaration, or a teacher that
            learns would not be synchronised between processes.
    """
    if teacher is None:
        return []
    if isinstance(teacher, MovingAverage):
        return [copy.deepcopy(uncompiled(student))]
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
    if isinstance(teacher, JointTeacher) and several_processes():
        raise LifecycleError(
            "A JointTeacher lies outside of what DistributedDataParallel synchronises, so each "
            "process would train another one. Train it in one process, or pass it frozen."
        )
    return found


def hold(teacher: Teacher | None, module: nn.Module) -> Holder:
    """Take hold of one network of a teacher.

    Args:
        teacher: What the user declared.
        module: One of its `members`.

    Returns:
        The holder.
    """
    if isinstance(teacher, MovingAverage):
        return AveragedTeacher(module, teacher.decay)
    return LearningTeacher(module) if isinstance(teacher, JointTeacher) else FrozenTeacher(module)


def several_processes() -> bool:
    """Whether this is one of several processes that train together."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def shares(teacher: Teacher | None, count: int) -> tuple[float, ...]:
    """Return the weight of each network of a teacher, summing to one.

    Args:
        teacher: What the user declared.
        count: Number of its members.

    Returns:
        One weight each.
    """
    return teacher.shares if isinstance(teacher, Ensemble) else (1 / max(count, 1),) * count


def teacher_shares(
    given: Tensor | None, shares: Sequence[float], image: Tensor, *, check: bool
) -> Sequence[float | Tensor]:
    """Return what each teacher counts in this step.

    Args:
        given: Weights of this step's samples, `(B, teachers)`, or None.
        shares: Weights of all other steps.
        image: Any tensor of the batch, on the device of the step.
        check: Whether to look at the values, for which a GPU waits.

    Returns:
        One number for each teacher, or one for each sample, `(B,)`.

    Raises:
        ShapeMismatchError: If there is not one weight per sample and teacher.
        ObjectiveError: If a weight is negative or not finite, or a sample has no teacher left.
    """
    if given is None:
        return shares
    expected = (len(image), len(shares))
    if tuple(given.shape) != expected or not shares:
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
