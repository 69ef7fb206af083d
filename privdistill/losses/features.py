"""Losses on the features of a tap, sample by sample."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from privdistill.losses import functional as ops
from privdistill.losses.functional import Normalisation, Reduction
from privdistill.losses.options import AT_LEAST_ONE, POSITIVE, one_of, option
from privdistill.losses.term import FeatureTerm


def latent_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    normalisation: Normalisation = "softmax",
    temperature: float = 1.0,
    reduction: Reduction = "sum",
) -> Tensor:
    r"""Kullback-Leibler divergence from the teacher's to the student's normalised features.

    :math:`L_\mathrm{KL} = \sum_j q_j \log \frac{q_j}{p_j}`, q from the teacher and p from the
    student, averaged over the batch. For "softmax" and "l1" j runs over channels and space
    together; for the other two, the divergence of each distribution is averaged over voxels or
    channels.

    Args:
        student: `(B, C, *spatial)`.
        teacher: Same shape; no gradient flows into it.
        normalisation: "softmax" over the flattened vector (the default reading of "flattened and
            normalized"); "softmax_channel" over channels at each voxel; "softmax_spatial" over
            space in each channel; "l1", absolute values over their sum.
        temperature: Divides the features before a softmax, dimensionless, > 0.
        reduction: "sum" over j; or "mean" over j, which shrinks with the length of the vector
            (30,720 numbers in the paper's network), so that it all but vanishes.

    Returns:
        A scalar, in nats, >= 0.

    Raises:
        ShapeMismatchError: If the features differ in shape.

    Example:
        >>> z = torch.zeros(1, 2, 4, 4, 4)
        >>> latent_kl(z, z)
        tensor(0.)

    Source:
        Hu et al. 2020, arXiv:2106.09564, eq. (3); the normalisation is not given there. The sum
        over j is the paper's, the mean over the batch replaces its sum over samples.
    """
    student, teacher = ops.feature_pair(student, teacher, "latent_kl")
    log_p = _log_distribution(student, normalisation, temperature)
    log_q = _log_distribution(teacher, normalisation, temperature)
    q = log_q.exp()
    # The last two sum to zero; with them no summand is negative, and the rounding of a normaliser,
    # which would enter with the whole mass of q, cancels.
    summands = q * (log_q - log_p) + (log_p.exp() - q)
    divergence: Tensor = summands.sum(dim=-1) if reduction == "sum" else summands
    return divergence.mean()


def _log_distribution(features: Tensor, normalisation: Normalisation, temperature: float) -> Tensor:
    """Log probabilities whose last axis is the one that is normalised."""
    # As infinite logits: a share of zero costs nothing.
    features = torch.nan_to_num(features, math.nan, ops.LARGEST, -ops.LARGEST)
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


@dataclass(eq=False, repr=False, kw_only=True)
class LatentKL(FeatureTerm, function=latent_kl):
    """Kullback-Leibler divergence between the normalised features of a tap.

    `privdistill.functional.latent_kl` of the tap's features.

    Args:
        tap: Name of the tap; "bottleneck" is located by the wrapper unless given.
        normalisation: "softmax" over the flattened vector, "softmax_channel" per voxel,
            "softmax_spatial" per channel, or "l1", absolute values over their sum.
        temperature: Divides the features before a softmax, dimensionless, > 0.
        reduction: "sum" over the vector, as in the equation; "mean" shrinks with its length.

    Raises:
        ObjectiveError: If an option has no meaning, or a single number is normalised.

    Example:
        >>> 10 * LatentKL()
        10 * LatentKL(tap='bottleneck')

    Weight:
        10, the paper's alpha, as in `kdnet()`.
    """

    normalisation: Normalisation = option(
        "softmax", one_of("softmax", "softmax_channel", "softmax_spatial", "l1")
    )
    temperature: float = option(1.0, POSITIVE)
    reduction: Reduction = option("sum", one_of("sum", "mean"))

    def _normalised(self, shape: Sequence[int]) -> int:
        channels, *space = shape
        # One distribution per voxel, per channel, or per sample.
        of = {"softmax_channel": channels, "softmax_spatial": prod(space)}
        return of.get(self.normalisation, prod(shape))


def feature_l2(student: Tensor, teacher: Tensor, *, normalise: bool = False) -> Tensor:
    r"""Mean squared difference of features.

    :math:`\mathrm{mean} (F_s - F_t)^2` over batch, channels and voxels.

    Args:
        student: `(B, C, *spatial)`.
        teacher: Same shape; no gradient flows into it.
        normalise: Whether each channel of each sample is first brought to mean 0 and variance 1
            over space; the value is then twice one minus the mean Pearson correlation.

    Returns:
        A scalar, >= 0.

    Raises:
        ShapeMismatchError: If the features differ in shape.

    Example:
        >>> feature_l2(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 3.0))
        tensor(9.)

    Source:
        Romero et al. 2015 (FitNets), arXiv:1412.6550, eq. (3), the mean where it halves a sum; the
        regressor is the tap's adapter. Normalised: Cao et al. 2022 (PKD), arXiv:2207.02039, who
        take mean and variance over the batch too and halve; that form could not be checked.
    """
    student, teacher = ops.feature_pair(student, teacher, "feature_l2")
    if normalise:
        space = tuple(range(2, student.ndim))
        student, teacher = ops.standardised(student, space), ops.standardised(teacher, space)
    return (student - teacher).square().mean()


@dataclass(eq=False, repr=False, kw_only=True)
class FeatureL2(FeatureTerm, function=feature_l2):
    """Mean squared difference of features, `privdistill.functional.feature_l2`.

    Args:
        tap: Name of the tap.
        normalise: Whether each channel of each sample is first brought to mean 0 and variance 1
            over space.

    Example:
        >>> 0.1 * FeatureL2("level1", normalise=True)
        0.1 * FeatureL2(tap='level1', normalise=True)

    Weight:
        Depends on the scale of the features; begin with the share that `.balanced()` gives.
    """

    normalise: bool = False


def feature_l1(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean absolute difference of features.

    :math:`\mathrm{mean} \lvert F_s - F_t \rvert` over batch, channels and voxels.

    Args:
        student: `(B, C, *spatial)`.
        teacher: Same shape; no gradient flows into it.

    Returns:
        A scalar, >= 0.

    Raises:
        ShapeMismatchError: If the features differ in shape.

    Example:
        >>> feature_l1(torch.zeros(1, 2, 4), torch.full((1, 2, 4), -3.0))
        tensor(3.)

    Source:
        Wang et al. 2023 (LCKD), arXiv:2310.01035, between modalities that one encoder sees one at a
        time, after the code the authors published. In that of Wang et al. 2023 (ShaSpec),
        arXiv:2307.14126, the gradient flows into both modalities.
    """
    student, teacher = ops.feature_pair(student, teacher, "feature_l1")
    return (student - teacher).abs().mean()


class FeatureL1(FeatureTerm, function=feature_l1):
    """Mean absolute difference of features, `privdistill.functional.feature_l1`.

    Args:
        tap: Name of the tap.

    Example:
        >>> 0.1 * FeatureL1("level1")
        0.1 * FeatureL1(tap='level1')

    Weight:
        0.1, as in LCKD; it depends on the scale of the features.
    """


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    r"""One minus the cosine between the channel vectors of each voxel.

    :math:`1 - \cos(F_s, F_t)`, averaged over voxels and batch. Computed as half the squared
    distance of the two unit vectors, which is the same and exact where they agree. Two zero vectors
    agree; of one zero vector it is one half.

    Args:
        student: `(B, C, *spatial)`.
        teacher: Same shape; no gradient flows into it.

    Returns:
        A scalar, in [0, 2].

    Raises:
        ShapeMismatchError: If the features differ in shape.

    Example:
        >>> feature_cosine(torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [2.0]]]))
        tensor(1.)

    Source:
        The usual cosine distance, averaged over voxels.
    """
    student, teacher = ops.feature_pair(student, teacher, "feature_cosine")
    return (ops.unit(student, 1) - ops.unit(teacher, 1)).square().sum(1).mean() / 2


class FeatureCosine(FeatureTerm, function=feature_cosine):
    """One minus the cosine of each voxel's channels, `privdistill.functional.feature_cosine`.

    Args:
        tap: Name of the tap.

    Example:
        >>> 1.0 * FeatureCosine("level1")
        1 * FeatureCosine(tap='level1')

    Weight:
        1; the term lies in [0, 2].
    """


def attention_transfer(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    r"""Squared distance between the spatial attention maps of both networks.

    :math:`\left\lVert \frac{Q_s}{\lVert Q_s \rVert} - \frac{Q_t}{\lVert Q_t \rVert} \right\rVert^2`
    with :math:`Q = \sum_c |F_c|^p` flattened over space, averaged over the batch.

    Args:
        student: `(B, C, *spatial)`.
        teacher: The same but for C; no gradient flows into it.
        power: p, >= 1; a larger one looks at the strongest activations alone.

    Returns:
        A scalar, in [0, 2].

    Raises:
        ShapeMismatchError: If the features differ in resolution.

    Example:
        >>> attention_transfer(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]]))
        tensor(2.)

    Source:
        Zagoruyko and Komodakis 2017, arXiv:1612.03928, eq. (2), where the norm of the difference is
        not squared; squared, it is smooth where the maps agree. A mean over voxels instead would
        shrink with the patch.
    """
    student, teacher = ops.feature_pair(
        student, teacher, "attention_transfer", equal_channels=False
    )
    return (_attention(student, power) - _attention(teacher, power)).square().sum(1).mean()


def _attention(features: Tensor, power: float) -> Tensor:
    features = features.flatten(2)
    # The unit map does not depend on the scale, so that a high power need not overflow.
    largest = features.detach().abs().amax((1, 2), keepdim=True).clamp_min(1e-12)
    return ops.unit((features / largest).abs().pow(power).sum(1), 1)


@dataclass(eq=False, repr=False, kw_only=True)
class AttentionTransfer(FeatureTerm, function=attention_transfer):
    """Squared distance of spatial attention maps, `privdistill.functional.attention_transfer`.

    Args:
        tap: Name of the tap; the numbers of channels may differ.
        power: p, >= 1; a larger one looks at the strongest activations alone.

    Raises:
        ObjectiveError: If the power is below one, or the tap has one voxel.

    Example:
        >>> 10 * AttentionTransfer("level1")
        10 * AttentionTransfer(tap='level1')

    Weight:
        Of the order of 10: unit maps are compared, so that the term lies in [0, 2].
    """

    equal_channels = False

    # Below one the slope at an activation of zero is infinite.
    power: float = option(2.0, AT_LEAST_ONE)

    def _normalised(self, shape: Sequence[int]) -> int:
        return prod(shape[1:])


def channel_wise(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    r"""Kullback-Leibler divergence between the channels as distributions over space.

    :math:`\frac{T^2}{C} \sum_c \sum_i q_{ci} \log \frac{q_{ci}}{p_{ci}}`, averaged over the batch,
    with q and p the softmax over space of `F_t / T` and `F_s / T` in each channel.

    Args:
        student: `(B, C, *spatial)`.
        teacher: Same shape; no gradient flows into it.
        temperature: T, dimensionless, > 0.

    Returns:
        A scalar, nats, >= 0.

    Raises:
        ShapeMismatchError: If the features differ in shape.

    Example:
        >>> channel_wise(torch.zeros(1, 1, 2), torch.tensor([[[2.0, 0.0]]]), temperature=1.0)
        tensor(0.3278)

    Source:
        Shu et al. 2021 (CWD), arXiv:2011.13256, and the code the authors published with it.
    """
    divergence = latent_kl(
        student, teacher, normalisation="softmax_spatial", temperature=temperature
    )
    # As in Hinton's: slopes of tempered features shrink with T^2.
    return temperature**2 * divergence


@dataclass(eq=False, repr=False, kw_only=True)
class ChannelWise(FeatureTerm, function=channel_wise):
    """Divergence of the channels as maps over space, `privdistill.functional.channel_wise`.

    Args:
        tap: Name of the tap.
        temperature: T, dimensionless, > 0.

    Raises:
        ObjectiveError: If the temperature is not positive, or the tap has one voxel.

    Example:
        >>> 1.0 * ChannelWise("decoder")
        1 * ChannelWise(tap='decoder', temperature=4.0)

    Weight:
        Of the order of 1; the divergence is a mean over channels.
    """

    _shown = ("tap", "temperature")

    temperature: float = option(4.0, POSITIVE)

    def _normalised(self, shape: Sequence[int]) -> int:
        return prod(shape[1:])


def gram(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared difference of the channels' correlations over space: style without place.

    :math:`\frac{\lVert G_t - G_s \rVert^2}{4 C^2}` with :math:`G = F F^\top / S` of the `(C, S)`
    features, S voxels, averaged over the batch. Its slope grows with the cube of the features: in
    fp16 it may overflow for features beyond some hundreds, and a gradient scaler then skips the
    step.

    Args:
        student: `(B, C, *spatial)`.
        teacher: Same shape; no gradient flows into it.

    Returns:
        A scalar, >= 0.

    Raises:
        ShapeMismatchError: If the features differ in shape.

    Example:
        >>> gram(torch.zeros(1, 1, 4), torch.full((1, 1, 4), 2.0))
        tensor(4.)

    Source:
        Azad et al. 2022 (SMU-Net), after Gatys et al. 2015, arXiv:1508.06576:
        `|| G_t - G_s ||^2 / (4 C^2 S^2)` of sums over voxels, which is this. SMU-Net's code divides
        by C and S once more and mixes the samples of a batch, so that its weight (1e-4) belongs
        to other values.
    """
    student, teacher = ops.feature_pair(student, teacher, "gram")
    # The mean over the C x C entries, over four: the 4 C^2 of the formula.
    return (_correlations(student) - _correlations(teacher)).square().mean() / 4


def _correlations(features: Tensor) -> Tensor:
    flat = features.flatten(2)
    with ops.full_precision(flat):
        return flat @ flat.mT / flat.shape[2]


class Gram(FeatureTerm, function=gram):
    """Squared difference of the channels' correlations over space, `privdistill.functional.gram`.

    Args:
        tap: Name of the tap.

    Example:
        >>> (1.0 * Gram("level1")).balanced()
        (1 * Gram(tap='level1')).balanced(0.99)

    Weight:
        Depends on the scale of the features; begin with the share that `.balanced()` gives.
    """
