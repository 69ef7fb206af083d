"""A temperature that fits the teacher."""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from privdistill.exceptions import ObjectiveError
from privdistill.inputs import InputViews
from privdistill.integrations.batch import step_arguments
from privdistill.losses.agreement import copy_dice, decision_overlap
from privdistill.losses.functional import Activation
from privdistill.step import find_heads

# Interpolated between, so that a few passes over the logits give two digits.
_VALUES = 17


def fit_temperature(
    teacher: nn.Module,
    batches: Iterable[Any],
    at_most: float = 5.0,
    agreement: float = 0.9,
    activation: Activation = "softmax",
    *,
    inputs: InputViews | None = None,
    names: Mapping[str, str] | None = None,
) -> float:
    """The largest temperature at which soft targets still say what this teacher would predict.

    How much a temperature softens depends on how saturated the teacher is. A student that copied
    its decision exactly should still score `agreement` times the soft Dice against
    `sigma(l_t / T)` that it scores at T = 1, for every class that the teacher predicts. A hard
    teacher allows much; one of moderate logits and a small class little. (One that is flat already
    is not changed by T and allows all of it: look at `diagnose`, which shows its Dice.)

    Args:
        teacher: The trained network; it runs in eval mode without gradients, and its modes are
            restored.
        batches: An iterable of images, of (image, target) pairs or of mappings with an entry
            "image", on any device; all of it is read, once. Targets are not.
        at_most: Largest temperature to return, >= 1; the paper's T = 5.
        agreement: Share of the soft Dice to be kept, in (0, 1].
        activation: "softmax" or "sigmoid".
        inputs: Takes the teacher's view from an image; unless given, the image is that view.
        names: Entry of a mapping that holds the image, as `{"image": "scan"}`.

    Returns:
        A temperature from 1 to `at_most`, by linear interpolation between 17 values: the first at
        which the agreement falls below what is asked. Sums are pooled over all batches.

    Raises:
        ObjectiveError: If an option has no meaning, there is no batch, the teacher predicts no
            class at all, or its logits are not finite.

    Example:
        >>> teacher = nn.Conv2d(1, 2, 1).requires_grad_(False)
        >>> teacher.weight.copy_(torch.tensor([500.0, -500.0]).reshape(2, 1, 1, 1))
        Parameter containing:
        ...
        >>> fit_temperature(teacher, [torch.randn(2, 1, 16, 16)])
        5.0

    Source:
        Ours; T = 5 is section 3.2 of Hu et al. 2020, arXiv:2106.09564.
    """
    if not (1 <= at_most < math.inf and 0 < agreement <= 1):
        raise ObjectiveError(
            f"fit_temperature: `at_most` is {at_most} and `agreement` is {agreement}; expected a "
            "temperature of at least 1 and a share in (0, 1]."
        )
    overlaps = []
    for batch in batches:
        image = step_arguments(batch, names or {})["image"]
        logits = _logits(teacher, image if inputs is None else inputs.for_teacher(image))
        overlaps.append(decision_overlap(logits, temperatures(at_most), activation))
    if not overlaps:
        raise ObjectiveError("fit_temperature: there is no batch. Pass a loader, or a list.")
    return fitted(torch.stack(overlaps).sum(0), at_most, agreement)


@torch.no_grad()
def _logits(teacher: nn.Module, view: Tensor) -> Tensor:
    """The teacher's finest logits in eval mode."""
    modes = {module: module.training for module in teacher.modules()}
    weight = next(teacher.parameters(), view)
    try:
        return find_heads(teacher.eval()(view.to(weight.device)), view.ndim - 2)[0]
    finally:
        for module, mode in modes.items():
            module.training = mode


def temperatures(at_most: float) -> list[float]:
    """Return the temperatures that `fitted` compares.

    Args:
        at_most: The largest of them.

    Returns:
        Values from 1 on, in equal ratios.
    """
    return [math.pow(at_most, step / (_VALUES - 1)) for step in range(_VALUES)]


def fitted(overlap: Tensor, at_most: float, agreement: float) -> float:
    """Return the temperature at which the worst class falls below an agreement.

    Args:
        overlap: Sums of `decision_overlap` at `temperatures(at_most)`, `(3, K, C)`.
        at_most: The largest temperature.
        agreement: Share of the soft Dice at T = 1 to be kept.

    Returns:
        From 1 to `at_most`.

    Raises:
        ObjectiveError: If the teacher predicts no class.
    """
    dice = copy_dice(overlap)
    occurs = ~dice[0].isnan()
    if not occurs.any():
        raise ObjectiveError(
            "The teacher predicts no class on these batches, so that no temperature fits. Pass "
            "batches with foreground, and logits without NaN."
        )
    kept: list[float] = (dice[:, occurs] / dice[0, occurs]).amin(1).tolist()
    points = list(zip(temperatures(at_most), kept, strict=True))
    for (low, before), (high, after) in pairwise(points):
        if after < agreement:
            return low + (high - low) * (before - agreement) / (before - after)
    return float(at_most)
