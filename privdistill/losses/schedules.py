"""Weights that change while the student learns: functions of the number of steps taken."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from privdistill.exceptions import ObjectiveError
from privdistill.losses.options import Rule, check, is_number, one_of

#: Maps the number of training steps taken, a scalar tensor, to the factor of a term's weight.
Schedule = Callable[[Tensor], Tensor | float]

_MOST = torch.finfo(torch.float64).max
#: Half of float32's, so that the way from one end of a ramp to the other has a length.
_LARGEST = torch.finfo(torch.float32).max / 2
_LENGTH = Rule(lambda v: is_number(v) and 1 <= v < _LARGEST, "at least 1, in training steps")
_COUNT = Rule(lambda v: is_number(v) and 0 <= v < _LARGEST, ">= 0, in training steps")
_NUMBER = Rule(lambda v: is_number(v) and abs(v) <= _LARGEST, "a finite number of float32")
_CURVE = one_of("linear", "cosine", "exponential")


@dataclass(frozen=True)
class Ramp:
    """A weight that goes from one value to another and stays there.

    Args:
        start: Weight at the beginning.
        end: Weight from step `begin + steps` on.
        steps: Length in training steps, >= 1.
        begin: Step at which it leaves `start`.
        curve: "linear"; "cosine", flat at both ends; or "exponential", `exp(-5 (1 - x)^2)`, steep
            at the end.

    Raises:
        ObjectiveError: If an option has no meaning.

    Example:
        >>> from privdistill import GroundTruth, LatentKL
        >>> Ramp(0, 10, steps=100)(torch.tensor(25))
        tensor(2.5000)
        >>> GroundTruth() + Ramp(0, 10, steps=100) * LatentKL()
        1 * GroundTruth() + Ramp(0, 10, steps=100) * LatentKL(tap='bottleneck')

    Source:
        Cosine: Loshchilov & Hutter 2017, arXiv:1608.03983, eq. (5). Exponential: Laine & Aila 2017,
        arXiv:1610.02242, section 2.1.
    """

    start: float
    end: float
    steps: int
    begin: int = 0
    curve: Literal["linear", "cosine", "exponential"] = "linear"

    def __post_init__(self) -> None:
        check("Ramp", _LENGTH, steps=self.steps)
        check("Ramp", _COUNT, begin=self.begin)
        check("Ramp", _NUMBER, start=self.start, end=self.end)
        check("Ramp", _CURVE, curve=self.curve)

    def __call__(self, index: Tensor) -> Tensor:
        """Return the weight at a step.

        Args:
            index: Number of training steps taken, a scalar.

        Returns:
            A scalar on the same device.
        """
        # Tensors all along: a number read off the index would make the GPU wait.
        share = ((index - float(self.begin)) / float(self.steps)).clamp(0, 1)
        if self.curve == "cosine":
            share = (1 - torch.cos(torch.pi * share)) / 2
        elif self.curve == "exponential":
            # Laine & Aila start at exp(-5); here the curve is shifted to start at zero.
            floor = torch.exp(torch.full_like(share, -5.0))
            share = (torch.exp(-5 * (1 - share).square()) - floor) / (1 - floor)
        return self.start + (self.end - self.start) * share

    def __repr__(self) -> str:
        begin = f", begin={self.begin}" * bool(self.begin)
        curve = f", curve={self.curve!r}" * (self.curve != "linear")
        return f"Ramp({self.start:g}, {self.end:g}, steps={self.steps}{begin}{curve})"


def warm_up(steps: int) -> Ramp:
    """A weight that rises linearly from 0 to 1.

    Args:
        steps: Length in training steps.

    Returns:
        A schedule.

    Raises:
        ObjectiveError: If there is not at least one step.

    Example:
        >>> warm_up(10)(torch.tensor(5))
        tensor(0.5000)
    """
    return Ramp(0, 1, steps)


@dataclass(frozen=True)
class Weight:
    """What a term is multiplied with: a finite number, and functions of the step."""

    factor: float
    schedules: tuple[Schedule, ...] = ()

    def at(self, index: Tensor) -> Tensor | float:
        """Return the weight at a step, a number or a scalar tensor."""
        value: Tensor | float = self.factor
        for schedule in self.schedules:
            value = value * schedule(index)
        return value

    def times(self, factor: "float | Schedule | Weight") -> "Weight":
        """Return the product with a number, a weight or a schedule, which is tried at step 0."""
        if isinstance(factor, Weight):
            # The number first, as the product of two finite ones may overflow.
            product = self.times(factor.factor)
            return Weight(product.factor, self.schedules + factor.schedules)
        number: Any = factor
        if is_number(number) and abs(number) <= _MOST and abs(self.factor * number) <= _MOST:
            return Weight(self.factor * float(number), self.schedules)
        if callable(factor) and not isinstance(factor, nn.Module):
            _check_scalar(factor)
            return Weight(self.factor, (*self.schedules, factor))
        raise ObjectiveError(
            f"The weight of a term must be a finite number or a function of the step such as "
            f"Ramp(0, 1, steps=1000); got {factor!r}."
        )

    def __repr__(self) -> str:
        number = [f"{self.factor:g}"] * (self.factor != 1 or not self.schedules)
        return " * ".join([*number, *map(_name, self.schedules)])


def _check_scalar(schedule: Schedule) -> None:
    """Try a schedule when the objective is made: a training step is late to learn of a typo."""
    value: Any = schedule(torch.tensor(0))
    scalar = is_number(value) or (isinstance(value, Tensor) and not value.ndim)
    if not (scalar and abs(float(value)) < float("inf")):
        raise ObjectiveError(
            f"The schedule {_name(schedule)} gave {value!r} at step 0; it must return a finite "
            "number or a scalar tensor, the weight at that step."
        )


def _name(schedule: Schedule) -> str:
    return repr(schedule) if isinstance(schedule, Ramp) else getattr(schedule, "__name__", "...")
