"""How much of the teacher's decision a softened target keeps."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from privdistill.losses.functional import Activation, binarise, check_logits, probabilities
from privdistill.losses.options import POSITIVE, check


def target_agreement(
    teacher: Tensor, temperature: float, *, activation: Activation = "softmax"
) -> Tensor:
    """Soft Dice of a perfect copy of the teacher against its target at T, over that at T = 1.

    The copy gives the teacher's decision as probabilities: one-hot argmax, or logit > 0. A small
    value says that Dice against the soft target does not reward what the teacher would predict.

    Args:
        teacher: Logits, `(B, C, *spatial)`.
        temperature: T, dimensionless, > 0.
        activation: "softmax" or "sigmoid".

    Returns:
        One number per class, `(C,)`, 1 at T = 1; NaN for a class that the teacher never predicts.

    Raises:
        ObjectiveError: If an option has no meaning, or the softmax runs over one channel.
        ShapeMismatchError: If the logits are no map.

    Example:
        >>> logits = torch.tensor([[[4.0, -4.0, -4.0, -4.0]]])
        >>> target_agreement(logits, 5.0, activation="sigmoid")
        tensor([0.5460], dtype=torch.float64)

    Source:
        Ours. The target is that of Hu et al. 2020, arXiv:2106.09564, eq. (1); Dice is pooled over
        samples, so that a class need not occur in each.
    """
    check("target_agreement", POSITIVE, temperature=temperature)
    check_logits(teacher, activation, "target_agreement")
    dice = copy_dice(decision_overlap(teacher, (1.0, temperature), activation))
    return dice[1] / dice[0]


def decision_overlap(
    teacher: Tensor, temperatures: Sequence[float], activation: Activation
) -> Tensor:
    """Sums, `(3, K, C)`, of what the decision and its targets at K temperatures share."""
    # Shared mass, the targets' mass, the decision's mass: sums, so that batches add up.
    logits = teacher.detach()
    decision = binarise(logits, "argmax" if activation == "softmax" else "positive")
    # Pooled over samples, as no class need occur in each of them.
    axes = (0, *range(2, logits.ndim))
    size = decision.sum(axes)
    sums = []
    for temperature in temperatures:
        soft = probabilities(logits, activation, temperature=temperature)
        sums.append(torch.stack([(soft * decision).sum(axes), soft.sum(axes), size]))
    # On the CPU, as some accelerators have no float64.
    return torch.stack(sums, dim=1).cpu().double()


def copy_dice(overlap: Tensor) -> Tensor:
    """Soft Dice of a copy of the decision against each target, `(K, C)`; NaN where it is empty."""
    shared, target, decision = overlap
    return torch.where(decision > 0, 2 * shared / (target + decision), torch.nan)


def warn_of_softening(
    teacher: Tensor, temperature: float, activation: Activation, *, term: str
) -> bool:
    """Warn, and say so, where a softened target keeps less than half of the decision."""
    # Tensors on the meta device have shapes and no values.
    if teacher.is_meta:
        return False
    kept = target_agreement(teacher, temperature, activation=activation).tolist()
    # NaN, of a class that is never predicted, is not below anything.
    lost = [f"{share:.2f} of class {index}" for index, share in enumerate(kept) if share < 0.5]
    if lost:
        warnings.warn(
            f"{term}: at temperature {temperature:g} a perfect copy of this teacher would score, "
            f"of its soft Dice at temperature 1, only {', '.join(lost)}. Pass "
            "temperature=fit_temperature(teacher, batches).",
            stacklevel=2,
        )
    return bool(lost)
