"""Terms on relations: between positions, to class prototypes, to neighbours, between examples."""

from itertools import product
from math import ceil
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from privdistill.exceptions import ObjectiveError
from privdistill.losses.base import check_choice, check_positive, check_resize
from privdistill.losses.features import FeatureTerm
from privdistill.losses.functional import Activation, full_precision, probabilities, resize, unit
from privdistill.losses.reading import resolve
from privdistill.losses.response import ResponseTerm
from privdistill.losses.schedules import is_number
from privdistill.losses.targets import enlarged, reference
from privdistill.step import Step

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_SHORT = 1e-12  # squared length below which a vector has no direction


class PairwiseSimilarity(FeatureTerm):
    """Squared difference between the cosine similarities of all pairs of positions in a tap.

    `1/N^2 sum_ij (a_t_ij - a_s_ij)^2`, with a_ij the cosine of the max-pooled features at
    positions i and j, averaged over the batch. The networks may have different channels. A position
    whose features are all zero is similar to none.

    Args:
        tap: Name of the tap; "bottleneck" is located by the wrapper unless given.
        scale: Positions per axis after max-pooling, as a share of the tap's, in (0, 1]; a window is
            `1 / scale` voxels long, rounded up.
        max_positions: Time and memory grow with the square of the positions: where more remain,
            so many of them are drawn anew in each step, from the device's random generator, and
            compared with as many drawn apart. The expected value is that of all pairs; a single one
            scatters around it, by 2 to 3 % at the default.

    Shape:
        Features `(B, C, *spatial)`; C may differ between the networks. Output: scalar, >= 0.

    Raises:
        ObjectiveError: If an option has no meaning.
        LayerNotFoundError: If the step carries no such tap.
        ShapeMismatchError: If the features differ in anything but channels.

    Example:
        >>> from privdistill import TapPair
        >>> z = torch.rand(1, 2, 4, 4, 4)
        >>> PairwiseSimilarity()(Step(student=z, taps={"bottleneck": TapPair(z, z)}))
        tensor(0.)

    Weight:
        1, as in `structured()`.

    Source:
        Liu et al. 2019, arXiv:1903.04197, the pair-wise term. In the authors' code scale = 0.5 is
        the share of an axis that one pooling window spans, which leaves two positions per axis
        (here: scale = 2 / length), and no gradient passes through the norm; here it does.
    """

    equal_channels = False

    def __init__(
        self, tap: str = "bottleneck", *, scale: float = 0.5, max_positions: int = 4096
    ) -> None:
        super().__init__(tap)
        if not (is_number(scale) and 0 < scale <= 1):
            raise ObjectiveError(f"PairwiseSimilarity: `scale` must be in (0, 1]; got {scale!r}.")
        check_positive("PairwiseSimilarity", "max_positions", max_positions)
        self.scale = scale
        self.max_positions = max(1, int(max_positions))

    def forward(self, step: Step) -> Tensor:
        """Compute the term from the tap's features."""
        student, teacher = self.features(step)
        mine, theirs = self._directions(student), self._directions(teacher)
        rows, columns = self._drawn(mine), self._drawn(mine)
        with full_precision(student):
            similar = mine[..., rows].mT @ mine[..., columns]
            return (similar - theirs[..., rows].mT @ theirs[..., columns]).square().mean()

    def _directions(self, values: Tensor) -> Tensor:
        # A tolerance, since 1 / (1 / 49) need not be 49.
        window = ceil(1 / self.scale - 1e-6)
        pooled: Tensor = _MAX_POOL[values.ndim - 2](values, window, ceil_mode=True)
        return unit(pooled.flatten(2), 1)

    def _drawn(self, directions: Tensor) -> Tensor | slice:
        """Which positions are compared; rows and columns apart, so that all pairs are as likely."""
        count = directions.shape[2]
        if count <= self.max_positions:
            return slice(None)
        return torch.randperm(count, device=directions.device)[: self.max_positions]


class PrototypeSimilarity(FeatureTerm):
    """Squared difference between the maps of similarity to class prototypes.

    `mean (M_s - M_t)^2` with `M_c(v) = cos(F(v), proto_c)`, where proto_c is the mean of the
    features over the voxels of class c in the reference, of each sample and network its own. Only
    classes that every sample of the batch has are compared; where there is none, the term is zero.
    Under DDP each process looks at its own batch.

    Args:
        tap: Name of the tap, usually the last features before the logits.
        ignore_index: Value in the target that marks voxels to leave out, of prototypes and maps.
        resize: "logits" enlarges logits that are coarser than the target; None refuses them.

    Shape:
        Features `(B, C, *spatial)`; C may differ between the networks. Target: as the logits,
        one-hot or regions, or under softmax a label map. Where the features have another grid, the
        target's channels are averaged onto it: a voxel then counts by its share of the class, and
        by its share of voxels that are not ignored.
        Output: scalar, in [0, 4].

    Raises:
        ObjectiveError: If the step has no target, or its values do not fit.
        LayerNotFoundError: If the step carries no such tap.
        ShapeMismatchError: If features or target do not fit.

    Example:
        >>> from privdistill import TapPair
        >>> z, labels = torch.rand(1, 3, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long)
        >>> step = Step(torch.zeros(1, 2, 8, 8), target=labels, taps={"decoder": TapPair(z, z)})
        >>> PrototypeSimilarity()(step)
        tensor(0.)

    Weight:
        0.1, as in `protokd()`.

    Source:
        ProtoKD, Wang et al. 2023, arXiv:2303.09830, the authors' code: prototypes per sample, all
        classes with the background. There the features have the target's grid.
    """

    needs_target = True
    equal_channels = False

    def __init__(
        self,
        tap: str = "decoder",
        *,
        ignore_index: int | None = None,
        resize: Literal["logits"] | None = None,
    ) -> None:
        super().__init__(tap)
        self.ignore_index = ignore_index
        self.resize = check_resize("PrototypeSimilarity", resize)

    def forward(self, step: Step) -> Tensor:
        """Compute the term from the tap's features and the target."""
        student, teacher = self.features(step)
        step = enlarged(step) if self.resize else step
        target, mask, weights = reference(
            step, step.student, resolve(None, step), term=self.name, ignore_index=self.ignore_index
        )
        weights = student.new_ones(len(student)) if weights is None else weights.to(student.dtype)
        mask = target.new_ones((1,) * target.ndim) if mask is None else mask
        share = self._on_grid(target * mask, student)
        seen = self._on_grid(mask, student)
        total = share.sum(2, keepdim=True)
        share = share / torch.where(total > 0, total, 1)
        with full_precision(student):
            difference = _prototype_maps(student, share) - _prototype_maps(teacher, share)
        # Samples without weight may hold anything, so they need not have the class.
        counts = weights > 0
        present = ((total.squeeze(2) > 0) | ~counts[:, None]).all(dim=0) & counts.any()
        by_sample = (weights / weights.sum().clamp_min(_SHORT))[:, None]
        costs = (difference.square() * seen).sum(2) / seen.sum(2).clamp_min(_SHORT)
        by_class = (by_sample * costs).sum(dim=0) * present
        return by_class.sum() / present.sum().clamp_min(1)

    @staticmethod
    def _on_grid(channels: Tensor, features: Tensor) -> Tensor:
        return resize(channels, features.shape[2:]).flatten(2).to(features.dtype)


class LocalConsistency(ResponseTerm):
    """Squared difference between the maps of how much each voxel differs from its neighbours.

    `mean_x (c_s(x) - c_t(x))^2` with `c(x) = mean_y ||p(x) - p(y)||` over the neighbours y of x
    (2 in 1-D, 8 in 2-D, 26 in 3-D; fewer at the border) and p the probabilities. The differences
    of each pair of neighbours are kept for the backward pass: 13 times the logits in 3-D.

    Args:
        reduction: "mean" over the neighbours, or "sum", which in 2-D is 64 times the mean inside
            of the image and smaller at its border.
        activation: "softmax" or "sigmoid"; None takes the wrapper's.

    Shape:
        Student and teacher logits `(B, C, *spatial)`, equal. Output: scalar, >= 0.

    Raises:
        ObjectiveError: If an option has no meaning, or the softmax runs over one channel.
        ShapeMismatchError: If the logits differ in shape.

    Example:
        >>> logits = torch.rand(1, 2, 4, 4)
        >>> LocalConsistency()(Step(student=logits, teacher=logits))
        tensor(0.)

    Weight:
        1, as in `xie()`.

    Source:
        Xie et al. 2018, arXiv:1810.08476, first-order knowledge; the exact form could not be
        checked. It is taken to be the sum over the 8 neighbours in 2-D. The mean is ours: it does
        not change with the number of axes, nor with the patch size through its border.
    """

    def __init__(
        self,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        activation: Activation | None = None,
    ) -> None:
        super().__init__(activation=activation)
        check_choice("LocalConsistency", "reduction", reduction, ("mean", "sum"))
        self.reduction = reduction

    def forward(self, step: Step) -> Tensor:
        """Compute the term from both networks' logits."""
        student, teacher, activation = self.logits(step)
        theirs, neighbours = _local_changes(probabilities(teacher, activation))
        mine, _ = _local_changes(probabilities(student, activation))
        difference = mine - theirs
        if self.reduction == "mean":
            difference = difference / neighbours.clamp_min(1)
        return difference.square().mean()


class CenteredKernelAlignment(FeatureTerm):
    """One minus the linear centred kernel alignment (CKA) of a tap's features.

    `1 - ||Y'X||^2 / (||X'X|| ||Y'Y||)`, Frobenius norms, with X and Y the centred features of
    student and teacher, one example a row. It is blind to rotations and to the scale of the
    features, so the networks may have different channels. Features that do not vary are aligned
    with nothing and give one, without a gradient.

    Args:
        tap: Name of the tap; "bottleneck" is located by the wrapper unless given.
        over: What the examples are. "voxels": those of each sample, averaged over the batch, which
            works with the batches of 1 or 2 of 3-D images. "samples": those of the batch, each with
            the flattened tap as its features, as usual where networks are compared; under DDP each
            process takes its own batch.

    Shape:
        Features `(B, C, *spatial)`; C may differ between the networks. Output: scalar, in [0, 1].

    Raises:
        ObjectiveError: If the option has no meaning, or there are fewer than two examples.
        LayerNotFoundError: If the step carries no such tap.
        ShapeMismatchError: If the features differ in anything but channels.

    Example:
        >>> from privdistill import TapPair
        >>> z = torch.rand(1, 2, 4, 4, 4)
        >>> step = Step(student=z, taps={"bottleneck": TapPair(z, 3 * z.flip(1))})
        >>> CenteredKernelAlignment()(step) < 1e-6
        tensor(True)

    Weight:
        1; the term lies in [0, 1].

    Source:
        Kornblith et al. 2019, arXiv:1905.00414, linear CKA, which compares samples; voxels as
        examples are ours.
    """

    equal_channels = False

    def __init__(
        self, tap: str = "bottleneck", *, over: Literal["voxels", "samples"] = "voxels"
    ) -> None:
        super().__init__(tap)
        check_choice("CenteredKernelAlignment", "over", over, ("voxels", "samples"))
        self.over = over

    def forward(self, step: Step) -> Tensor:
        """Compute the term from the tap's features."""
        rows = [
            values.flatten(2).mT if self.over == "voxels" else values.flatten(1).unsqueeze(0)
            for values in self.features(step)
        ]
        if rows[0].shape[1] < 2:
            raise ObjectiveError(
                f"{self.name}: an alignment needs two examples or more, and with "
                f"over={self.over!r} features {tuple(step.taps[self.tap].student.shape)} hold "
                f"{rows[0].shape[1]}. Pass a larger batch, or the other `over`."
            )
        with full_precision(rows[0]):
            return 1 - _alignment(*rows).mean()


def _prototype_maps(values: Tensor, share: Tensor) -> Tensor:
    """Cosines `(B, classes, N)` to each class's mean, for weights of that shape that sum to one."""
    values = values.flatten(2)
    return unit(share @ values.mT, 2) @ unit(values, 1)


def _local_changes(p: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the distances to all neighbours, `(B, *spatial)`, and the number of neighbours."""
    size = p.shape[2:]
    total = p.new_zeros(p.shape[0], *size)
    neighbours = p.new_zeros(size)
    centre = (0,) * len(size)
    # Half of the neighbours: a distance belongs to both of its ends.
    for offset in product((-1, 0, 1), repeat=len(size)):
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
    return unit(x - x.mean(1, keepdim=True), (1, 2), floor)
