"""How much of the teacher's decision a softened target keeps."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from privdistill.losses.functional import Activation, binarise, probabilities


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

    Example:
        >>> logits = torch.tensor([[[4.0, -4.0, -4.0, -4.0]]])
        >>> target_agreement(logits, 5.0, activation="sigmoid")
        tensor([0.5460], dtype=torch.float64)

    Source:
        Ours. The target is that of Hu et al. 2020, arXiv:2106.09564, eq. (1); Dice is pooled over
        samples, so that a class need not occur in each.
    """
    dice = copy_dice(decision_overlap(teacher, (1.0, temperature), activation))
    return dice[1] / dice[0]


def decision_overlap(
    teacher: Tensor, temperatures: Sequence[float], activation: Activation
) -> Tensor:
    """What the decision and its softened targets share, in sums that add up over batches.

    Args:
        teacher: Logits, `(B, C, *spatial)`.
        temperatures: K of them.
        activation: "softmax" or "sigmoid".

    Returns:
        Shared mass, mass of the targets, mass of the decision: `(3, K, C)` on the CPU.
    """
    logits = teacher.detach()
    decision = binarise(logits, "argmax" if activation == "softmax" else "positive")
    axes = (0, *range(2, logits.ndim))
    size = decision.sum(axes)
    sums = []
    for temperature in temperatures:
        soft = probabilities(logits, activation, temperature=temperature)
        sums.append(torch.stack([(soft * decision).sum(axes), soft.sum(axes), size]))
    return torch.stack(sums, dim=1).cpu().double()


def copy_dice(overlap: Tensor) -> Tensor:
    """Soft Dice of a copy of the decision against each softened target.

    Args:
        overlap: Sums of `decision_overlap`, `(3, K, C)`.

    Returns:
        `(K, C)`; NaN where the decision is empty.
    """
    shared, target, decision = overlap
    return torch.where(decision > 0, 2 * shared / (target + decision), torch.nan)


def warn_of_softening(
    teacher: Tensor, temperature: float, activation: Activation, *, term: str
) -> None:
    """Warn where a softened target keeps less than half of the teacher's decision.

    Args:
        teacher: Logits, `(B, C, *spatial)`.
        temperature: T, dimensionless, > 0.
        activation: "softmax" or "sigmoid".
        term: Name of the term, for the message.
    """
    # Tensors on the meta device have shapes and no values.
    if teacher.is_meta:
        return
    kept = target_agreement(teacher, temperature, activation=activation)
    lost = {index: f"{share:.2f}" for index, share in enumerate(kept.tolist()) if share < 0.5}
    if lost:
        shares = ", ".join(f"{share} of class {index}" for index, share in lost.items())
        warnings.warn(
            f"{term}: at temperature {temperature:g} a perfect copy of this teacher would score, "
            f"of its soft Dice at temperature 1, only {shares}. Pass "
            "temperature=fit_temperature(teacher, batches).",
            stacklevel=2,
        )
