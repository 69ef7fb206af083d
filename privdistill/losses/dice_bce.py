"""Dice plus binary cross-entropy: against the reference, and against the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from privdistill.exceptions import ObjectiveError, ShapeMismatchError
from privdistill.losses.base import Term, check_choice, check_positive, check_resize
from privdistill.losses.functional import (
    Activation,
    Binarisation,
    at_least_float32,
)
from privdistill.losses.fused import Comparison, dice_bce_sums
from privdistill.losses.reading import resolve, teacher_logits
from privdistill.losses.targets import check_activation, enlarged, reference
from privdistill.step import Step


@dataclass(frozen=True)
class DiceBCE:
    """`(1 - Dice) + BCE` with every choice the paper leaves open as an option.

    Args:
        activation: "softmax" or "sigmoid"; None takes the wrapper's.
        include_background: Whether channel 0 counts, for softmax outputs.
        squared_denominator: Dice with squares in the denominator.
        batch_dice: Dice over the batch instead of per sample; under DDP, over each process's own.
        smoothing: Added to Dice's numerator and denominator, in voxels.
        class_weights: One number per channel that counts, scaled to a mean of one.

    Raises:
        ObjectiveError: If an option has no meaning.
    """

    activation: Activation | None = None
    include_background: bool = True
    squared_denominator: bool = False
    batch_dice: bool = False
    smoothing: float = 1e-5
    class_weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.activation is not None:
            check_choice("DiceBCE", "activation", self.activation, ("softmax", "sigmoid"))
        check_positive("DiceBCE", "smoothing", self.smoothing)
        if self.class_weights is not None:
            # Arrays and tensors could neither be shown nor compared with the default.
            try:
                weights = tuple(float(weight) for weight in self.class_weights)
            except (TypeError, ValueError) as error:
                raise ObjectiveError(
                    f"DiceBCE: `class_weights` is {self.class_weights!r}; expected one number per "
                    "class."
                ) from error
            object.__setattr__(self, "class_weights", weights)
            if not (all(0 <= weight < float("inf") for weight in weights) and any(weights)):
                raise ObjectiveError(
                    f"DiceBCE: `class_weights` is {list(weights)}; weights must be finite, not "
                    "negative and not all zero."
                )

    def __call__(
        self,
        logits: Tensor,
        comparison: Comparison,
        activation: Activation,
        *,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            logits: Student logits, `(B, C, *spatial)`.
            comparison: What they are compared with.
            activation: Which one to use.
            weights: Weight of each sample, `(B,)`; the loss is the weighted mean over samples, and
                zero where all weights are.

        Returns:
            A scalar in float32, >= 0.

        Raises:
            ShapeMismatchError: If there are not as many class weights as channels.
        """
        sums = dice_bce_sums(logits, comparison, activation, squared=self.squared_denominator)
        first = 0 if self.include_background or activation == "sigmoid" else 1
        overlap, size, bce = (values[:, first:] for values in sums)
        if self.batch_dice:
            overlap, size = (_pooled(values, weights) for values in (overlap, size))
        dice = (2 * overlap + self.smoothing) / (size + self.smoothing)
        cost = (1 - dice) + bce / _count(comparison, first)
        mask = comparison.mask
        known = None if mask is None else mask.flatten(2).amax(2).to(cost.dtype)
        shares = self._class_weights(cost)
        if known is not None:
            # Without the regions that a sample ignores altogether, and without a sample of which
            # nothing is left.
            shares = shares * known
            counts = (shares.sum(dim=1) > 0).to(cost.dtype)
            weights = counts if weights is None else counts * weights.to(cost.dtype)
        total = shares.sum(dim=-1, keepdim=True)
        # No matrix product, which autocast would round to half precision.
        costs = (cost * (shares / torch.where(total > 0, total, 1))).sum(dim=1)
        return _mean_over_samples(costs, weights)

    def _class_weights(self, cost: Tensor) -> Tensor:
        if self.class_weights is None:
            return torch.ones_like(cost[0])
        if len(self.class_weights) != cost.shape[1]:
            raise ShapeMismatchError(
                f"`class_weights` has {len(self.class_weights)} numbers, and {cost.shape[1]} "
                "channels count. Pass one per channel, without the background if it is left out."
            )
        return torch.tensor(self.class_weights, dtype=cost.dtype, device=cost.device)

    def changed(self) -> str:
        """Options that differ from the default, as they would be typed."""
        usual = type(self)()
        return ", ".join(
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if value != getattr(usual, name)
        )


def _pooled(sums: Tensor, weights: Tensor | None) -> Tensor:
    """`(B, C)` to `(C,)`."""
    if weights is not None:
        # No matrix product, which autocast would round to half precision.
        sums = sums * weights.to(sums.dtype)[:, None]
    return sums.sum(0)


def _count(comparison: Comparison, first: int) -> Tensor | int:
    """Number of voxels that count."""
    mask = comparison.mask
    if mask is None:
        return prod(comparison.source.shape[2:])
    mask = mask if mask.shape[1] == 1 else mask[:, first:]
    return mask.flatten(2).sum(dim=2).clamp(min=1)


def _mean_over_samples(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return values.mean()
    weights = weights.to(values.dtype)
    total = weights.sum()
    # Without any reference the mean is zero, with gradients that are zero.
    return (weights * values).sum() / torch.where(total > 0, total, torch.ones_like(total))


class GroundTruth(Term):
    """Dice and binary cross-entropy against the reference segmentation.

    `L_GT = (1 - Dice(y, sigma(l_s))) + BCE(y, sigma(l_s))`.

    Args:
        of: Whose prediction is compared, "student" or that of a `JointTeacher`, "teacher".
        activation: "softmax" or "sigmoid"; None takes the wrapper's.
        include_background: Whether channel 0 counts, for softmax outputs.
        squared_denominator: Dice with squares in the denominator.
        batch_dice: Dice over the batch instead of per sample; under DDP, over each process's own.
        smoothing: Added to Dice's numerator and denominator, in voxels.
        class_weights: One number per channel that counts, scaled to a mean of one.
        ignore_index: Value in the target that marks voxels to leave out; a sample, or a region of
            one, in which there is nothing else is left out of the mean.
        resize: "logits" enlarges logits that are coarser than the target; None refuses them.

    Shape:
        Logits `(B, C, *spatial)`. Target: the same, one-hot or regions, or under softmax a label
        map `(B, *spatial)` or `(B, 1, *spatial)`. Output: scalar, >= 0.

    Raises:
        ObjectiveError: If an option has no meaning, or the target's values do not fit.
        ShapeMismatchError: If the target's shape does not fit the logits.

    Example:
        >>> import torch
        >>> step = Step(student=torch.tensor([[[9.0], [-9.0]]]), target=torch.tensor([[0]]))
        >>> bool(GroundTruth()(step) < 1e-3)
        True

    Weight:
        1, or `1 - lambda` beside soft targets: 0.25 in `kdnet()`.

    Source:
        Hu et al. 2020, arXiv:2106.09564, eq. (4), averaged over the batch where the paper sums.
    """

    needs_target = True

    def __init__(
        self,
        *,
        of: Literal["student", "teacher"] = "student",
        activation: Activation | None = None,
        include_background: bool = True,
        squared_denominator: bool = False,
        batch_dice: bool = False,
        smoothing: float = 1e-5,
        class_weights: Sequence[float] | None = None,
        ignore_index: int | None = None,
        resize: Literal["logits"] | None = None,
    ) -> None:
        super().__init__()
        check_choice("GroundTruth", "of", of, ("student", "teacher"))
        self.of = of
        self.needs_teacher = of == "teacher"
        self.ignore_index = ignore_index
        self.resize = check_resize("GroundTruth", resize)
        self.dice_bce = DiceBCE(
            activation,
            include_background,
            squared_denominator,
            batch_dice,
            smoothing,
            class_weights,
        )

    def forward(self, step: Step) -> Tensor:
        """Compute the term from one network's logits and the target."""
        activation = resolve(self.dice_bce.activation, step)
        step = enlarged(step) if self.resize else step
        logits = step.student if self.of == "student" else self._of_teacher(step)
        target, mask, weights = reference(
            step, logits, activation, term=self.name, ignore_index=self.ignore_index
        )
        return self.dice_bce(logits, Comparison(target, mask=mask), activation, weights=weights)

    def _of_teacher(self, step: Step) -> Tensor:
        if step.teacher is None or not (step.teacher.requires_grad or not torch.is_grad_enabled()):
            raise ObjectiveError(
                f"{self.name}: of='teacher' supervises a teacher that learns, and this one is "
                "frozen. Declare it: DistillationWrapper(JointTeacher(network), student, ...)."
            )
        return step.teacher

    def extra_repr(self) -> str:
        """Show the options that were chosen."""
        own = [f"of={self.of!r}"] * (self.of != "student")
        own += [f"ignore_index={self.ignore_index}"] * (self.ignore_index is not None)
        own += [f"resize={self.resize!r}"] * (self.resize is not None)
        return ", ".join(filter(None, (*own, self.dice_bce.changed())))


class SoftTargetDiceBCE(Term):
    """Dice against the teacher's soft targets, cross-entropy against its binary prediction.

    `L_KD = (1 - Dice(s, sigma(l_s))) + BCE(b, sigma(l_s))` with `s = sigma(l_t / T)` and b the
    one-hot argmax (softmax) or `l_t > 0` (sigmoid). Only the teacher is tempered, and there is no
    factor T^2: at T > 1 perfect imitation does not bring the term to zero.

    Args:
        temperature: T, dimensionless, > 0.
        student_temperature: Divides the student's logits, dimensionless, > 0.
        scale_by_t2: Multiply by T^2, which keeps gradients at T = 1 size where both are tempered.
        binarisation: What the cross-entropy compares with: "argmax", "positive" (logit > 0) or
            "soft", the soft targets themselves; by default argmax for softmax outputs and positive
            for sigmoid ones.
        activation: "softmax" or "sigmoid"; None takes the wrapper's.
        include_background: Whether channel 0 counts, for softmax outputs.
        squared_denominator: Dice with squares in the denominator.
        batch_dice: Dice over the batch instead of per sample; under DDP, over each process's own.
        smoothing: Added to Dice's numerator and denominator, in voxels.
        class_weights: One number per channel that counts, scaled to a mean of one.

    Shape:
        Student and teacher logits `(B, C, *spatial)`, equal. Output: scalar, >= 0.

    Raises:
        ObjectiveError: If an option has no meaning, or the softmax runs over one channel.
        ShapeMismatchError: If the logits differ in shape.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[90.0], [-90.0]]])
        >>> term = SoftTargetDiceBCE(temperature=5.0)
        >>> term(Step(student=logits, teacher=logits)).round(decimals=4)
        tensor(0.)

    Weight:
        0.75, the paper's lambda, as in `kdnet()`.

    Source:
        Hu et al. 2020, arXiv:2106.09564, eqs. (1) and (2), averaged over the batch where the paper
        sums; T = 5 is its section 3.2.
    """

    needs_teacher = True

    def __init__(
        self,
        *,
        temperature: float = 5.0,
        student_temperature: float = 1.0,
        scale_by_t2: bool = False,
        binarisation: Binarisation | None = None,
        activation: Activation | None = None,
        include_background: bool = True,
        squared_denominator: bool = False,
        batch_dice: bool = False,
        smoothing: float = 1e-5,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        owner = "SoftTargetDiceBCE"
        self.temperature = check_positive(owner, "temperature", temperature)
        self.student_temperature = check_positive(owner, "student_temperature", student_temperature)
        if binarisation is not None:
            check_choice(owner, "binarisation", binarisation, ("argmax", "positive", "soft"))
        self.scale_by_t2 = scale_by_t2
        self.binarisation = binarisation
        self.dice_bce = DiceBCE(
            activation,
            include_background,
            squared_denominator,
            batch_dice,
            smoothing,
            class_weights,
        )

    def forward(self, step: Step) -> Tensor:
        """Compute the term from both networks' logits."""
        activation = resolve(self.dice_bce.activation, step)
        teacher = teacher_logits(step, activation, term=self.name)
        check_activation(teacher, activation, term=self.name)
        tempered = teacher_logits(step, activation, term=self.name, temperature=self.temperature)
        rule = self.binarisation or ("argmax" if activation == "softmax" else "positive")
        comparison = Comparison(tempered, self.temperature, rule, teacher if step.members else None)
        student = step.student
        if self.student_temperature != 1:
            student = at_least_float32(student) / self.student_temperature
        loss = self.dice_bce(student, comparison, activation)
        return self.temperature**2 * loss if self.scale_by_t2 else loss

    def extra_repr(self) -> str:
        """Show the temperature and the options that were chosen."""
        own = [f"temperature={self.temperature}"]
        own += [f"student_temperature={self.student_temperature}"] * (self.student_temperature != 1)
        own += ["scale_by_t2=True"] * self.scale_by_t2
        own += [f"binarisation={self.binarisation!r}"] * (self.binarisation is not None)
        return ", ".join(filter(None, (*own, self.dice_bce.changed())))
