"""Losses on relations: between positions, to class prototypes, to neighbours, between examples."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from math import ceil, prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from privdistill.exceptions import ObjectiveError
from privdistill.losses import functional as ops
from privdistill.losses.functional import Activation, Reduction
from privdistill.losses.options import FRACTION, RESIZE, WHOLE, one_of, option
from privdistill.losses.targets import enlarged, read_target, reference
from privdistill.losses.term import FeatureTerm, ResponseTerm
from privdistill.step import Step

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_SHORT = 1e-12  # squared length below which a vector has no direction


def pairwise_similarity(
    student: Tensor, teacher: Tensor, *, scale: float = 0.5, max_positions: int = 4096
) -> Tensor:
    r"""Squared difference between the cosine similarities of all pairs of positions.

    :math:`\frac{1}{N^2} \sum_{ij} (a^t_{ij} - a^s_{ij})^2`, with a_ij the cosine of the max-pooled
    features at positions i and j, averaged over the batch. A position whose features are all zero
    is similar to none.

    Args:
        student: `(B, C, *spatial)`.
        teacher: The same but for C; no gradient flows into it.
        scale: Positions per axis after max-pooling, as a share of the features', in (0, 1]; a
            window is `1 / scale` voxels long, rounded up.
        max_positions: Time and memory grow with the square of the positions: where more remain,
            so many of them are drawn anew in each step, from the device's random generator, and
            compared with as many drawn apart. The expected value is that of all pairs; a single one
            scatters around it, by 2 to 3 % at the default.

    Returns:
        A scalar, >= 0.

    Raises:
        ShapeMismatchError: If the features differ in anything but channels.

    Example:
        >>> z = torch.rand(1, 2, 4, 4, 4)
        >>> pairwise_similarity(z, z)
        tensor(0.)

    Source:
        Liu et al. 2019, arXiv:1903.04197, the pair-wise term. In the authors' code scale = 0.5 is
        the share of an axis that one pooling window spans, which leaves two positions per axis
        (here: scale = 2 / length), and no gradient passes through the norm; here it does.
    """
    student, teacher = ops.feature_pair(
        student, teacher, "pairwise_similarity", equal_channels=False
    )
    of_student, of_teacher = _directions(student, scale), _directions(teacher, scale)
    # Rows and columns apart: with one draw the N pairs of a position with itself would count more.
    rows, columns = _drawn(of_student, max_positions), _drawn(of_student, max_positions)
    with ops.full_precision(student):
        similar = of_student[..., rows].mT @ of_student[..., columns]
        return (similar - of_teacher[..., rows].mT @ of_teacher[..., columns]).square().mean()


def _window(scale: float) -> int:
    # A tolerance, since 1 / (1 / 49) need not be 49.
    return ceil(1 / scale - 1e-6)


def _directions(values: Tensor, scale: float) -> Tensor:
    pooled: Tensor = _MAX_POOL[values.ndim - 2](values, _window(scale), ceil_mode=True)
    return ops.unit(pooled.flatten(2), 1)


def _drawn(directions: Tensor, most: int) -> Tensor | slice:
    """Which positions are compared; rows and columns apart, so that all pairs are as likely."""
    count = directions.shape[2]
    if count <= most:
        return slice(None)
    return torch.randperm(count, device=directions.device)[:most]


@dataclass(eq=False, repr=False, kw_only=True)
class PairwiseSimilarity(FeatureTerm, function=pairwise_similarity):
    """Difference of the similarities of positions, `privdistill.functional.pairwise_similarity`.

    Args:
        tap: Name of the tap; the numbers of channels may differ.
        scale: Positions per axis after max-pooling, as a share of the tap's, in (0, 1].
        max_positions: Where more remain, so many of them are drawn anew in each step.

    Raises:
        ObjectiveError: If an option has no meaning, or one position is left.

    Example:
        >>> 1.0 * PairwiseSimilarity(scale=0.25)
        1 * PairwiseSimilarity(tap='bottleneck', scale=0.25)

    Weight:
        1, as in `structured()`.
    """

    equal_channels = False

    scale: float = option(0.5, FRACTION)
    max_positions: int = option(4096, WHOLE)

    def _normalised(self, shape: Sequence[int]) -> int:
        return prod(ceil(length / _window(self.scale)) for length in shape[1:])


def prototype_similarity(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    sample_weights: Tensor | None = None,
) -> Tensor:
    r"""Squared difference between the maps of similarity to class prototypes.

    :math:`\mathrm{mean} (M_s - M_t)^2` with :math:`M_c(v) = \cos(F(v), \mathrm{proto}_c)`, where
    proto_c is the mean of the features over the voxels of class c in the reference, of each sample
    and network its own. Only classes that every sample of the batch has are compared; where there
    is none, the loss is zero. Under DDP each process looks at its own batch.

    Args:
        student: `(B, C, *spatial)`.
        teacher: The same but for C; no gradient flows into it.
        target: One channel per class, `(B, classes, *size)`. Where the features have another grid,
            the channels are averaged onto it: a voxel then counts by its share of the class.
        mask: 1 where a voxel of the target counts, else 0, `(B, 1 or classes, *size)`.
        sample_weights: Weight of each sample, `(B,)`, >= 0.

    Returns:
        A scalar, in [0, 4].

    Raises:
        ShapeMismatchError: If the features differ in anything but channels.

    Example:
        >>> z, target = torch.rand(1, 3, 4, 4), torch.ones(1, 1, 8, 8)
        >>> prototype_similarity(z, z, target)
        tensor(0.)

    Source:
        ProtoKD, Wang et al. 2023, arXiv:2303.09830, the authors' code: prototypes per sample, all
        classes with the background. There the features have the target's grid.
    """
    student, teacher = ops.feature_pair(
        student, teacher, "prototype_similarity", equal_channels=False
    )
    known = student.new_ones(len(student)) if sample_weights is None else sample_weights
    weights = known.to(student.dtype)
    mask = target.new_ones((1,) * target.ndim) if mask is None else mask
    # A voxel of the features counts by the share of it that the mask keeps.
    share, seen = _on_grid(target * mask, student), _on_grid(mask, student)
    total = share.sum(2, keepdim=True)
    share = share / torch.where(total > 0, total, 1)
    with ops.full_precision(student):
        difference = _prototype_maps(student, share) - _prototype_maps(teacher, share)
    # Samples without weight may hold anything, so they need not have the class.
    counts = weights > 0
    present = ((total.squeeze(2) > 0) | ~counts[:, None]).all(dim=0) & counts.any()
    by_sample = (weights / weights.sum().clamp_min(_SHORT))[:, None]
    costs = (difference.square() * seen).sum(2) / seen.sum(2).clamp_min(_SHORT)
    by_class = (by_sample * costs).sum(dim=0) * present
    return by_class.sum() / present.sum().clamp_min(1)


def _on_grid(channels: Tensor, features: Tensor) -> Tensor:
    return ops.resize(channels, features.shape[2:]).flatten(2).to(features.dtype)


def _prototype_maps(values: Tensor, share: Tensor) -> Tensor:
    """Cosines `(B, classes, N)` to each class's mean, for weights of that shape that sum to one."""
    values = values.flatten(2)
    # A matrix product is the mean over a class's voxels, of all classes at once.
    return ops.unit(share @ values.mT, 2) @ ops.unit(values, 1)


@dataclass(eq=False, repr=False, kw_only=True)
class PrototypeSimilarity(FeatureTerm):
    """Difference between maps of similarity to class prototypes.

    `privdistill.functional.prototype_similarity` of the tap's features, and of the target as the
    logits' classes read it.

    Args:
        tap: Name of the tap, usually the last features before the logits.
        ignore_index: Value in the target that marks voxels to leave out, of prototypes and maps.
        resize: "logits" enlarges logits that are coarser than the target; None refuses them.

    Raises:
        ObjectiveError: If the step has no target, or its values do not fit.

    Example:
        >>> 0.1 * PrototypeSimilarity("decoder")
        0.1 * PrototypeSimilarity(tap='decoder')

    Weight:
        0.1, as in `protokd()`.
    """

    needs_target = True
    masks_unlabelled = True
    equal_channels = False

    tap: str = field(default="decoder", kw_only=False)
    ignore_index: int | None = None
    resize: Literal["logits"] | None = option(None, RESIZE)

    def forward(self, step: Step) -> Tensor:
        """Compute the term from the tap's features and the target."""
        student, teacher = self.features(step)
        step = enlarged(step) if self.resize else step
        about = {"owner": self.name, "ignore_index": self.ignore_index, **read_target(step)}
        channels, mask, weights = reference(
            logits=step.student, activation=step.activation, **about
        )
        return prototype_similarity(student, teacher, channels, mask=mask, sample_weights=weights)


def local_consistency(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    reduction: Reduction = "mean",
    activation: Activation = "softmax",
) -> Tensor:
    r"""Squared difference between the maps of how much each voxel differs from its neighbours.

    :math:`\mathrm{mean}_x (c_s(x) - c_t(x))^2` with
    :math:`c(x) = \mathrm{mean}_y \lVert p(x) - p(y) \rVert` over the neighbours y of x (2 in 1-D, 8
    in 2-D, 26 in 3-D; fewer at the border) and p the probabilities. The differences of each pair of
    neighbours are kept for the backward pass: 13 times the logits in 3-D.

    Args:
        student_logits: `(B, C, *spatial)`.
        teacher_logits: Same shape; no gradient flows into it.
        reduction: "mean" over the neighbours, or "sum", which in 2-D is 64 times the mean inside
            of the image and smaller at its border.
        activation: "softmax" or "sigmoid".

    Returns:
        A scalar, >= 0.

    Raises:
        ObjectiveError: If the softmax runs over one channel.
        ShapeMismatchError: If the logits differ in shape.

    Example:
        >>> logits = torch.rand(1, 2, 4, 4)
        >>> local_consistency(logits, logits)
        tensor(0.)

    Source:
        Xie et al. 2018, arXiv:1810.08476, first-order knowledge; the exact form could not be
        checked. It is taken to be the sum over the 8 neighbours in 2-D. The mean is ours: it does
        not change with the number of axes, nor with the patch size through its border.
    """
    student, teacher = ops.logit_pair(
        student_logits, teacher_logits, activation, "local_consistency"
    )
    of_teacher, neighbours = _local_changes(ops.probabilities(teacher, activation))
    of_student, _ = _local_changes(ops.probabilities(student, activation))
    difference = of_student - of_teacher
    # A sum would weigh the border less, which has fewer neighbours.
    if reduction == "mean":
        difference = difference / neighbours.clamp_min(1)
    return difference.square().mean()


def _local_changes(p: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the distances to all neighbours, `(B, *spatial)`, and the number of neighbours."""
    size = p.shape[2:]
    total = p.new_zeros(p.shape[0], *size)
    neighbours = p.new_zeros(size)
    centre = (0,) * len(size)
    # Half of the neighbours: a distance belongs to both of its ends.
    for offset in product(*[(-1, 0, 1)] * len(size)):  # PyTorch 2.6 cannot compile repeat=
        if offset > centre:
            pairs = list(zip(offset, size, strict=True))
            here = tuple(slice(max(0, -s), length - max(0, s)) for s, length in pairs)
            there = tuple(slice(max(0, s), length - max(0, -s)) for s, length in pairs)
            # Its slope at equal neighbours is zero, where that of a square root is infinite.
            distance = torch.linalg.vector_norm(p[:, :, *here] - p[:, :, *there], dim=1)
            for end in (here, there):
                # In place, or each of 26 neighbours would leave a map behind.
                total[:, *end].add_(distance)
                neighbours[end].add_(1)
    return total, neighbours


@dataclass(eq=False, repr=False, kw_only=True)
class LocalConsistency(ResponseTerm, function=local_consistency):
    """Difference between how much voxels differ from their neighbours.

    `privdistill.functional.local_consistency` of both networks' logits.

    Args:
        reduction: "mean" over the neighbours, or "sum", the published form.
        activation: "softmax" or "sigmoid"; None takes the wrapper's.

    Raises:
        ObjectiveError: If an option has no meaning.

    Example:
        >>> 1.0 * LocalConsistency()
        1 * LocalConsistency()

    Weight:
        1, as in `xie()`.
    """

    reduction: Reduction = option("mean", one_of("mean", "sum"))


def centered_kernel_alignment(
    student: Tensor, teacher: Tensor, *, over: Literal["voxels", "samples"] = "voxels"
) -> Tensor:
    r"""One minus the linear centred kernel alignment (CKA) of both networks' features.

    :math:`1 - \frac{\lVert Y^\top X \rVert^2}{\lVert X^\top X \rVert \lVert Y^\top Y \rVert}`,
    Frobenius norms, with X and Y the centred features of student and teacher, one example a row. It
    is blind to rotations and to the scale of the features. Features that do not vary are aligned
    with nothing and give one, without a gradient.

    Args:
        student: `(B, C, *spatial)`.
        teacher: The same but for C; no gradient flows into it.
        over: What the examples are. "voxels": those of each sample, averaged over the batch, which
            works with the batches of 1 or 2 of 3-D images. "samples": those of the batch, each with
            its flattened features, as usual where networks are compared; under DDP each process
            takes its own batch.

    Returns:
        A scalar, in [0, 1].

    Raises:
        ObjectiveError: If there are fewer than two examples.
        ShapeMismatchError: If the features differ in anything but channels.

    Example:
        >>> z = torch.rand(1, 2, 4, 4, 4)
        >>> centered_kernel_alignment(z, 3 * z.flip(1)) < 1e-6
        tensor(True)

    Source:
        Kornblith et al. 2019, arXiv:1905.00414, linear CKA, which compares samples; voxels as
        examples are ours.
    """
    owner = "centered_kernel_alignment"
    student, teacher = ops.feature_pair(student, teacher, owner, equal_channels=False)
    # One group of examples per sample, or one group in all: `(G, examples, numbers)`.
    x, y = (
        values.flatten(2).mT if over == "voxels" else values.flatten(1).unsqueeze(0)
        for values in (student, teacher)
    )
    if x.shape[1] < 2:
        raise ObjectiveError(
            f"{owner}: an alignment needs two examples or more, and with over={over!r} features "
            f"{tuple(student.shape)} hold {x.shape[1]}. Pass a larger batch, or the other `over`."
        )
    with ops.full_precision(x):
        return 1 - _alignment(x, y).mean()


def _alignment(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of `(G, examples, p)` and `(G, examples, q)`, one value a group."""
    x, y = _centred(x), _centred(y)
    if x.shape[1] < max(x.shape[2], y.shape[2]):
        # The same numbers from the smaller of two matrices.
        k, m = x @ x.mT, y @ y.mT
        cross, own, other = k * m, k.square(), m.square()
    else:
        cross, own, other = ((a.mT @ b).square() for a, b in ((y, x), (x, x), (y, y)))
    axes = (1, 2)
    lengths = own.sum(axes).clamp_min(_SHORT) * other.sum(axes).clamp_min(_SHORT)
    return cross.sum(axes) * lengths.rsqrt()


def _centred(x: Tensor) -> Tensor:
    """Examples around their mean, scaled to a Frobenius norm of one."""
    # What rounding leaves of constant features is no variation.
    floor = _SHORT * x.detach().square().sum((1, 2), keepdim=True) + _SHORT**2
    return ops.unit(x - x.mean(1, keepdim=True), (1, 2), floor)


@dataclass(eq=False, repr=False, kw_only=True)
class CenteredKernelAlignment(FeatureTerm, function=centered_kernel_alignment):
    """One minus the CKA of a tap's features, `privdistill.functional.centered_kernel_alignment`.

    Args:
        tap: Name of the tap; the numbers of channels may differ.
        over: What the examples are: the "voxels" of each sample, or the "samples" of the batch.

    Raises:
        ObjectiveError: If the option has no meaning, or there are fewer than two examples.

    Example:
        >>> 1.0 * CenteredKernelAlignment("level1")
        1 * CenteredKernelAlignment(tap='level1')

    Weight:
        1; the term lies in [0, 1].
    """

    equal_channels = False

    over: Literal["voxels", "samples"] = option("voxels", one_of("voxels", "samples"))
