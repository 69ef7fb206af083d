"""The mathematics of the losses, as functions of tensors.

Everything is computed in float32 (float64 where the input is float64) whatever autocast says, and
stays finite for logits of +-1e4.
"""

import math
import sys
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["softmax", "sigmoid"]
Normalisation = Literal["softmax", "softmax_channel", "softmax_spatial", "l1"]
Reduction = Literal["sum", "mean"]
Binarisation = Literal["argmax", "positive", "soft"]

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def at_least_float32(values: Tensor) -> Tensor:
    """Return half-precision and integer tensors as float32, others unchanged.

    Args:
        values: Any tensor.

    Returns:
        A tensor in float32 or float64.
    """
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def probabilities(logits: Tensor, activation: Activation, *, temperature: float = 1.0) -> Tensor:
    """Sigmoid or softmax of tempered logits.

    Args:
        logits: `(B, C, *spatial)`.
        activation: "softmax" over channels, or "sigmoid" per channel.
        temperature: Divides the logits, dimensionless, > 0.

    Returns:
        Probabilities in float32, `(B, C, *spatial)`.

    Example:
        >>> probabilities(torch.zeros(1, 4, 1), "softmax", temperature=5.0).flatten()
        tensor([0.2500, 0.2500, 0.2500, 0.2500])

    Source:
        Hu et al. 2020, arXiv:2106.09564, eq. (1).
    """
    tempered = at_least_float32(logits) / temperature
    return tempered.softmax(dim=1) if activation == "softmax" else tempered.sigmoid()


def mix_logits(
    members: Sequence[tuple[Tensor, float | Tensor]],
    activation: Activation,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Logits whose tempered probabilities are the mean of several networks' tempered ones.

    Args:
        members: Logits `(B, C, *spatial)` and weight of each network, one number or one for each
            sample, `(B,)`; weights sum to one.
        activation: "softmax" or "sigmoid".
        temperature: T, dimensionless, > 0.

    Returns:
        `(B, C, *spatial)` in float32; with `probabilities(..., temperature=T)` they give
        `sum_k w_k sigma(l_k / T)`.

    Example:
        >>> members = [(torch.tensor([[[2.0], [0.0]]]), 0.5), (torch.tensor([[[0.0], [2.0]]]), 0.5)]
        >>> probabilities(mix_logits(members, "softmax"), "softmax").flatten()
        tensor([0.5000, 0.5000])

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    tempered = [at_least_float32(logits) / temperature for logits, _ in members]
    shares = [_log(weight, logits.ndim) for logits, weight in members]

    def mean(logs: list[Tensor]) -> Tensor:
        stacked = torch.stack([log + share for log, share in zip(logs, shares, strict=True)])
        return stacked.logsumexp(0)

    if activation == "softmax":
        return temperature * mean([logits.log_softmax(1) for logits in tempered])
    positive = mean([F.logsigmoid(logits) for logits in tempered])
    negative = mean([F.logsigmoid(-logits) for logits in tempered])
    return temperature * (positive - negative)


def _log(weight: float | Tensor, axes: int) -> float | Tensor:
    """Logarithm of a network's weight; that of a sample it does not count for is minus infinity."""
    if isinstance(weight, Tensor):
        return at_least_float32(weight).log().reshape(-1, *[1] * (axes - 1))
    # A share may be too small beside another one for any number but zero.
    return math.log(max(weight, sys.float_info.min))


def resize(values: Tensor, size: Sequence[int]) -> Tensor:
    """Resample logits to another resolution: linearly to a finer one, by means to a coarser one.

    Args:
        values: `(B, C, *spatial)`.
        size: Spatial size wanted.

    Returns:
        `(B, C, *size)` in float32; the values themselves where nothing is to be done.

    Example:
        >>> resize(torch.tensor([[[1.0, 3.0, 5.0, 7.0]]]), (2,))
        tensor([[[2., 6.]]])
    """
    if tuple(values.shape[2:]) == tuple(size):
        return values
    values = at_least_float32(values)
    if any(new > old for new, old in zip(size, values.shape[2:], strict=True)):
        return F.interpolate(values, size=tuple(size), mode=_LINEAR[len(size)], align_corners=False)
    return F.interpolate(values, size=tuple(size), mode="area")


def binarise(logits: Tensor, rule: Literal["argmax", "positive"]) -> Tensor:
    """The binary prediction behind logits: one-hot argmax, or logit > 0.

    Both do not depend on a temperature. A threshold of 0.5 on softened probabilities does, and
    gives an empty target where four classes share the probability at T = 5.

    Args:
        logits: `(B, C, *spatial)`.
        rule: "argmax", the one class with the largest logit; or "positive", every logit > 0.

    Returns:
        Zeros and ones, `(B, C, *spatial)`; of equal logits the first is the largest.

    Example:
        >>> binarise(torch.tensor([[[1.0], [3.0]]]), "argmax").flatten()
        tensor([0., 1.])
    """
    if rule == "positive":
        return (logits > 0).float()
    # By rows, as an argmax is slow; among equals the first wins.
    logits = at_least_float32(logits.detach())
    hard = (logits - logits.amax(1, keepdim=True)).sign_().add_(1)
    left = torch.ones_like(hard[:, :1])
    for row in hard.chunk(hard.shape[1], dim=1):
        left.sub_(row.mul_(left))
    return hard


def latent_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    normalisation: Normalisation = "softmax",
    temperature: float = 1.0,
    reduction: Reduction = "sum",
) -> Tensor:
    """Kullback-Leibler divergence from the teacher's to the student's normalised features.

    `sum_j q_j log(q_j / p_j)` with q from the teacher and p from the student, averaged over the
    batch. For "softmax" and "l1" j runs over channels and space together; for the other two, the
    divergence of each distribution is averaged over voxels or channels.

    Args:
        student: `(B, C, *spatial)`.
        teacher: Same shape; no gradient flows into it.
        normalisation: "softmax" over the flattened vector; "softmax_channel" over channels at each
            voxel; "softmax_spatial" over space in each channel; "l1", absolute values over their
            sum.
        temperature: Divides the features before a softmax, dimensionless, > 0.
        reduction: "sum" over j; or "mean" over j, which shrinks with the length of the vector.

    Returns:
        A scalar, in nats, >= 0.

    Example:
        >>> z = torch.zeros(1, 2, 4, 4, 4)
        >>> latent_kl(z, z)
        tensor(0.)

    Source:
        Hu et al. 2020, arXiv:2106.09564, eq. (3). "Flattened and normalized" is read as the
        softmax over the flattened vector; the sum over j is the paper's, the mean over the batch
        replaces its sum over samples.
    """
    log_p = _log_distribution(at_least_float32(student), normalisation, temperature)
    log_q = _log_distribution(at_least_float32(teacher).detach(), normalisation, temperature)
    q = log_q.exp()
    # The last two sum to zero; with them no summand is negative, and the rounding of a normaliser,
    # which would enter with the whole mass of q, cancels.
    summands = q * (log_q - log_p) + (log_p.exp() - q)
    divergence: Tensor = summands.sum(dim=-1) if reduction == "sum" else summands
    return divergence.mean()


def _log_distribution(features: Tensor, normalisation: Normalisation, temperature: float) -> Tensor:
    """Log probabilities whose last axis is the one that is normalised."""
    if normalisation == "l1":
        # LeakyReLU features are signed and may sum to zero; a tiny floor keeps logs finite.
        sizes = features.flatten(1).abs() + torch.finfo(features.dtype).tiny ** 0.5
        shares: Tensor = sizes / sizes.sum(dim=1, keepdim=True)
        return shares.log()
    if normalisation == "softmax_channel":
        features = features.flatten(2).transpose(1, 2)
    elif normalisation == "softmax_spatial":
        features = features.flatten(2)
    else:
        features = features.flatten(1)
    log_distribution: Tensor = (features / temperature).log_softmax(dim=-1)
    return log_distribution


def standardise(values: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    """Values less their mean, over their standard deviation: `(v - m) / sqrt(var + 1e-5)`.

    Args:
        values: In float32 or float64.
        axes: Axes of the mean and of the (population) variance.

    Returns:
        Same shape; a constant gives zeros.

    Example:
        >>> standardise(torch.tensor([[0.0, 2.0, 4.0]]), 1)
        tensor([[-1.2247,  0.0000,  1.2247]])
    """
    centred = values - values.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + 1e-5).rsqrt()


def unit(values: Tensor, axes: int | tuple[int, ...], floor: Tensor | float = 1e-12) -> Tensor:
    """Vectors over their L2 norm.

    Args:
        values: In float32 or float64.
        axes: Axes of the vectors.
        floor: Squared length up to which a vector counts as zero.

    Returns:
        Same shape; zero, without a gradient, where a vector is too short to have a direction.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1)
        tensor([[0.6000, 0.8000], [0.0000, 0.0000]])
    """
    energy = values.square().sum(axes, keepdim=True)
    # A slope of 1e6 at dead features would drown that of all others.
    return values * ((energy > floor) * energy.clamp_min(floor).rsqrt())


def full_precision(values: Tensor) -> torch.autocast:
    """A context in which matrix products and convolutions keep their inputs' precision.

    Args:
        values: A tensor on the device in question.

    Returns:
        A context manager that switches autocast off.

    Example:
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu"), full_precision(x):
        ...     (x @ x).dtype
        torch.float32
    """
    # There is no autocast for the meta device, and nothing to switch off.
    return torch.autocast("cpu" if values.is_meta else values.device.type, enabled=False)
