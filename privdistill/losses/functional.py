"""The mathematics of the losses, as functions of tensors.

Everything is computed in float32 (float64 where the input is float64) whatever autocast says, and
stays finite for logits of +-1e4.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    members: Sequence[tuple[Tensor, float]], activation: Activation, *, temperature: float = 1.0
) -> Tensor:
    """Logits whose tempered probabilities are the mean of several networks' tempered ones.

    Args:
        members: Logits `(B, C, *spatial)` and weight of each network; weights sum to one.
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
    shares = [math.log(weight) for _, weight in members]

    def mean(logs: list[Tensor]) -> Tensor:
        stacked = torch.stack([log + share for log, share in zip(logs, shares, strict=True)])
        return stacked.logsumexp(0)

    if activation == "softmax":
        return temperature * mean([logits.log_softmax(1) for logits in tempered])
    positive = mean([F.logsigmoid(logits) for logits in tempered])
    negative = mean([F.logsigmoid(-logits) for logits in tempered])
    return temperature * (positive - negative)


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
        Zeros and ones in float32, `(B, C, *spatial)`.

    Example:
        >>> binarise(torch.tensor([[[1.0], [3.0]]]), "argmax").flatten()
        tensor([0., 1.])
    """
    if rule == "positive":
        return (logits > 0).float()
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(
        1, logits.argmax(dim=1, keepdim=True), 1.0
    )


def soft_dice(
    prediction: Tensor,
    target: Tensor,
    *,
    squared_denominator: bool = False,
    batch_dice: bool = False,
    smoothing: float = 1e-5,
    weights: Tensor | None = None,
) -> Tensor:
    """Soft Dice of two probability maps, over space.

    `(2 sum(p t) + e) / (sum(p) + sum(t) + e)`, or with squares in the denominator. Two empty maps
    give 1.

    Args:
        prediction: `(B, C, *spatial)`, in [0, 1].
        target: Same shape; may be soft.
        squared_denominator: Use `sum(p^2) + sum(t^2)`.
        batch_dice: Sum over the batch too, before the ratio.
        smoothing: The constant `e`, in voxels.
        weights: With `batch_dice`, weight of each sample's sums, `(B,)`.

    Returns:
        `(B, C)`, or `(C,)` with `batch_dice`.

    Example:
        >>> p = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
        >>> t = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
        >>> soft_dice(p, t, smoothing=0.0)
        tensor([[0.6667]])

    Source:
        Milletari et al. 2016, arXiv:1606.04797 (squared denominator); the plain form is the usual
        one. Hu et al. 2020 do not say which they use.
    """
    axes = tuple(range(2, prediction.ndim))
    overlap = (prediction * target).sum(axes)
    if squared_denominator:
        size = prediction.square().sum(axes) + target.square().sum(axes)
    else:
        size = prediction.sum(axes) + target.sum(axes)
    if batch_dice:
        if weights is not None:
            # No matrix product, which autocast would round to half precision.
            each = weights.to(overlap.dtype)[:, None]
            overlap, size = each * overlap, each * size
        overlap, size = overlap.sum(0), size.sum(0)
    return (2 * overlap + smoothing) / (size + smoothing)


def binary_cross_entropy(logits: Tensor, target: Tensor, activation: Activation) -> Tensor:
    """Binary cross-entropy of every channel's probability, element by element.

    For the softmax, each channel's probability is compared with its own target as if it were a
    class of its own: `-t log p_c - (1 - t) log(1 - p_c)`, in log space, so that a probability that
    rounds to 0 or 1 costs what it must and no more.

    Args:
        logits: `(B, C, *spatial)`.
        target: Same shape, in [0, 1].
        activation: "softmax" or "sigmoid".

    Returns:
        `(B, C, *spatial)`, in nats, >= 0.

    Example:
        >>> binary_cross_entropy(torch.zeros(1, 2, 1), torch.ones(1, 2, 1), "softmax").flatten()
        tensor([0.6931, 0.6931])

    Source:
        Hu et al. 2020, arXiv:2106.09564, eqs. (2) and (4), which apply BCE to softmax outputs.
    """
    logits = at_least_float32(logits)
    target = target.to(logits.dtype)
    if activation == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss: Tensor = _SoftmaxCrossEntropy.apply(logits, target)
    return loss


class _SoftmaxCrossEntropy(torch.autograd.Function):
    """`-t log p_c - (1 - t) log(1 - p_c)` for the softmax over channels.

    Written with its own gradient: through the operators it takes three times as long and keeps
    eight maps. `1 - p` loses all digits only for the largest p, the winner's; there the others are
    summed instead, and `p_j / (1 - p)` is their own softmax, which is never more than one.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        highest, winner = logits.max(dim=1, keepdim=True)
        shifted = logits - highest
        log_others = shifted.scatter(1, winner, float("-inf")).logsumexp(1, keepdim=True)
        log_total = F.softplus(log_others)
        ctx.save_for_backward(logits, target, winner, highest, log_others, log_total)
        log_p = shifted.sub_(log_total)
        log_rest = log_p.exp().neg_().log1p_().scatter_(1, winner, log_others - log_total)
        return log_p.sub_(log_rest).mul_(target).add_(log_rest).neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, target, winner, highest, log_others, log_total = ctx.saved_tensors
        shifted = logits - highest
        p = (shifted - log_total).exp_()
        positive = gradient * target
        negative = (gradient - positive).mul_(p)
        # d log(1 - p_k) / d z_j is -p_k where j is k, and p_k p_j / (1 - p_k) elsewhere.
        odds = (negative / (1 - p)).scatter_(1, winner, 0.0)
        share = positive.sum(1, keepdim=True) - odds.sum(1, keepdim=True)
        result = negative - positive + p.mul_(odds.add_(share))
        among_others = shifted.sub_(log_others).exp_().scatter_(1, winner, 0.0)
        return result - among_others.mul_(negative.gather(1, winner)), None


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
    summands = log_q.exp() * (log_q - log_p)
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
