"""Dice plus binary cross-entropy: against the reference, and against the teacher."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from privdistill.exceptions import ObjectiveError
from privdistill.losses.base import Term, check_choice, check_positive
from privdistill.losses.functional import (
    Activation,
    binarise,
    binary_cross_entropy,
    probabilities,
    soft_dice,
)
from privdistill.losses.reading import resolve, teacher_logits
from privdistill.losses.targets import as_channels, check_activation
from privdistill.output import Step


@dataclass(frozen=True)
class DiceBCE:
    """`(1 - Dice) + BCE` with every choice the paper leaves open as an option.

    Args:
        activation: "softmax" or "sigmoid"; None takes the wrapper's.
        include_background: Whether channel 0 counts, for softmax outputs.
        squared_denominator: Dice with squares in the denominator.
        batch_dice: Dice over the batch instead of per sample; under DDP, over each process's own.
        smoothing: Added to Dice's numerator and denominator, in voxels.

    Raises:
        ObjectiveError: If an option has no meaning.
    """

    activation: Activation | None = None
    include_background: bool = True
    squared_denominator: bool = False
    batch_dice: bool = False
    smoothing: float = 1e-5

    def __post_init__(self) -> None:
        if self.activation is not None:
            check_choice("DiceBCE", "activation", self.activation, ("softmax", "sigmoid"))
        check_positive("DiceBCE", "smoothing", self.smoothing)

    def __call__(
        self, logits: Tensor, dice_target: Tensor, bce_target: Tensor, activation: Activation
    ) -> Tensor:
        """Compute the loss.

        Args:
            logits: Student logits, `(B, C, *spatial)`.
            dice_target: Target of the Dice part, same shape, in [0, 1].
            bce_target: Target of the cross-entropy part, same shape, in [0, 1].
            activation: Which one to use.

        Returns:
            A scalar in float32, >= 0.
        """
        first = 0 if self.include_background or activation == "sigmoid" else 1
        dice = soft_dice(
            probabilities(logits, activation)[:, first:],
            dice_target[:, first:],
            squared_denominator=self.squared_denominator,
            batch_dice=self.batch_dice,
            smoothing=self.smoothing,
        )
        bce = binary_cross_entropy(logits, bce_target, activation)[:, first:]
        return (1 - dice).mean() + bce.mean()

    def changed(self) -> str:
        """Options that differ from the default, as they would be typed."""
        usual = type(self)()
        return ", ".join(
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if value != getattr(usual, name)
        )


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
    ) -> None:
        super().__init__()
        check_choice("GroundTruth", "of", of, ("student", "teacher"))
        self.of = of
        self.needs_teacher = of == "teacher"
        self.dice_bce = DiceBCE(
            activation, include_background, squared_denominator, batch_dice, smoothing
        )

    def forward(self, step: Step) -> Tensor:
        """Compute the term from one network's logits and the target."""
        if step.target is None:
            raise ObjectiveError(
                f"{self.name}: the step has no target. Call the wrapper as kd(image, target)."
            )
        activation = resolve(self.dice_bce.activation, step)
        logits = step.student if self.of == "student" else self._of_teacher(step)
        target = as_channels(
            step.target, logits, activation, term=self.name, validate=step.validate
        )
        return self.dice_bce(logits, target, target, activation)

    def _of_teacher(self, step: Step) -> Tensor:
        if step.teacher is None or not (step.teacher.requires_grad or not torch.is_grad_enabled()):
            raise ObjectiveError(
                f"{self.name}: of='teacher' supervises a teacher that learns, and this one is "
                "frozen. Declare it: DistillationWrapper(JointTeacher(network), student, ...)."
            )
        return step.teacher

    def extra_repr(self) -> str:
        """Show the options that were chosen."""
        own = f"of={self.of!r}" * (self.of != "student")
        return ", ".join(filter(None, (own, self.dice_bce.changed())))


class SoftTargetDiceBCE(Term):
    """Dice against the teacher's soft targets, cross-entropy against its binary prediction.

    `L_KD = (1 - Dice(s, sigma(l_s))) + BCE(b, sigma(l_s))` with `s = sigma(l_t / T)` and b the
    one-hot argmax (softmax) or `l_t > 0` (sigmoid). Only the teacher is tempered, and there is no
    factor T^2: at T > 1 perfect imitation does not bring the term to zero.

    Args:
        temperature: T, dimensionless, > 0.
        activation: "softmax" or "sigmoid"; None takes the wrapper's.
        include_background: Whether channel 0 counts, for softmax outputs.
        squared_denominator: Dice with squares in the denominator.
        batch_dice: Dice over the batch instead of per sample; under DDP, over each process's own.
        smoothing: Added to Dice's numerator and denominator, in voxels.

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

    Source:
        Hu et al. 2020, arXiv:2106.09564, eqs. (1) and (2), averaged over the batch where the paper
        sums; T = 5 is its section 3.2.
    """

    needs_teacher = True

    def __init__(
        self,
        *,
        temperature: float = 5.0,
        activation: Activation | None = None,
        include_background: bool = True,
        squared_denominator: bool = False,
        batch_dice: bool = False,
        smoothing: float = 1e-5,
    ) -> None:
        super().__init__()
        self.temperature = check_positive("SoftTargetDiceBCE", "temperature", temperature)
        self.dice_bce = DiceBCE(
            activation, include_background, squared_denominator, batch_dice, smoothing
        )

    def forward(self, step: Step) -> Tensor:
        """Compute the term from both networks' logits."""
        activation = resolve(self.dice_bce.activation, step)
        teacher = teacher_logits(step, activation, term=self.name)
        check_activation(teacher, activation, term=self.name)
        tempered = teacher_logits(step, activation, term=self.name, temperature=self.temperature)
        soft = probabilities(tempered, activation, temperature=self.temperature)
        return self.dice_bce(step.student, soft, binarise(teacher, activation), activation)

    def extra_repr(self) -> str:
        """Show the temperature and the options that were chosen."""
        return ", ".join(filter(None, (f"temperature={self.temperature}", self.dice_bce.changed())))
