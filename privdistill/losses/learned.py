"""Losses on features with networks of their own, which are trained with the student."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from privdistill.exceptions import ObjectiveError, ShapeMismatchError
from privdistill.losses.functional import feature_pair, full_precision, unit
from privdistill.losses.options import POSITIVE, WHOLE, Rule, option
from privdistill.losses.term import FeatureTerm
from privdistill.step import Step

_WIDTH = Rule(lambda value: value is None or WHOLE.holds(value), WHOLE.text)


def variational_information(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    r"""Negative log-likelihood of the teacher's features, given the student's.

    :math:`\frac{1}{2} \left( \frac{(F_t - \mu(F_s))^2}{v_c} + \log v_c \right)`, averaged over
    batch, channels and voxels: minimising it raises a lower bound of the mutual information.

    Args:
        mean: What a network makes of the student's features, `mu(F_s)`, `(B, C, *spatial)`.
        teacher: The teacher's features, same shape; no gradient flows into them.
        variance: `v_c`, > 0, of any shape that fits the mean's, such as `(C, 1, 1)` for two axes.

    Returns:
        A scalar, nats; it may be negative.

    Raises:
        ShapeMismatchError: If the features differ in shape.

    Example:
        >>> z = torch.zeros(1, 2, 4)
        >>> variational_information(z, z, torch.ones(2, 1))
        tensor(0.)

    Source:
        Ahn et al. 2019 (VID), arXiv:1904.05835; layers, initial and least variance as in the
        authors' code, in the copy that RepDistiller publishes. Constants are left out.
    """
    mean, teacher = feature_pair(mean, teacher, "variational_information")
    # Without the constant log(2 pi) / 2, which no gradient sees.
    return ((teacher - mean).square() / variance + variance.log()).mean() / 2


@dataclass(eq=False, repr=False, kw_only=True)
class VariationalInformation(FeatureTerm):
    """Negative log-likelihood of the teacher's features, given the student's.

    `privdistill.functional.variational_information`, where `mu` is three 1x1 convolutions without
    bias and with ReLU between them, and `v_c = softplus(e_c) + min_variance` is learnt for each
    channel. Both are trained with the student; the wrapper makes them after its dry run.

    Args:
        tap: Name of the tap; the numbers of channels may differ.
        hidden: Channels between the convolutions; None takes the teacher's.
        initial_variance: `v_c` before training.
        min_variance: Its floor.

    Raises:
        ObjectiveError: If an option has no meaning, or there was no dry run.

    Example:
        >>> 0.5 * VariationalInformation("level1", hidden=32)
        0.5 * VariationalInformation(tap='level1', hidden=32)

    Weight:
        0.5, as in ACN (Wang et al. 2021).
    """

    equal_channels = False
    hidden: int | None = option(None, _WIDTH)
    initial_variance: float = option(5.0, POSITIVE)
    min_variance: float = option(1e-5, POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_variance <= self.min_variance:
            raise ObjectiveError(
                "VariationalInformation: `initial_variance` must exceed `min_variance`; got "
                f"{self.initial_variance} and {self.min_variance}."
            )
        self.likelihood: _Gaussian | None
        # Registered, so that a twin under another name sees what `build` makes.
        self.register_module("likelihood", None)

    def build(self, step: Step) -> None:
        """Make the mean network and the variances from the tap's shapes, unless they are there."""
        if self.likelihood is None:
            student, teacher = self.features(step)
            inputs, outputs = student.shape[1], teacher.shape[1]
            widths = (inputs, self.hidden or outputs, self.hidden or outputs, outputs)
            gaussian = _Gaussian(widths, self.initial_variance, self.min_variance)
            self.likelihood = gaussian.to(student.device)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of these features."""
        mean, variance = _run(self, self.likelihood, student.flatten(2))
        return variational_information(mean, teacher.flatten(2), variance)


class _Gaussian(nn.Module):
    def __init__(self, widths: tuple[int, ...], initial: float, floor: float) -> None:
        super().__init__()
        # One kernel for any number of axes, since space comes flattened.
        first, second, third = (nn.Conv1d(a, b, 1, bias=False) for a, b in pairwise(widths))
        self.mean = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.floor = floor
        # So that training starts at that variance itself; expm1 keeps the digits of small ones.
        gap = initial - floor
        inverse_softplus = gap + math.log(-math.expm1(-gap))
        self.scale = nn.Parameter(torch.full((widths[-1], 1), inverse_softplus))

    def forward(self, student: Tensor) -> tuple[Tensor, Tensor]:
        # A floor, or a channel that is matched exactly would drive its variance to zero.
        return self.mean(student), F.softplus(self.scale) + self.floor


def contrastive_projection(student: Tensor, teacher: Tensor, *, margin: float = 1.0) -> Tensor:
    r"""Margin contrastive loss between embeddings of the same samples by both networks.

    :math:`\frac{1}{B^2} \sum_i \left( d_{ii}^2 + \sum_{j \neq i} \max(0, m - d_{ij})^2 \right)`, m
    the margin, with d_ij the distance between the student's embedding of sample i and the teacher's
    of sample j, each over its L2 norm.

    Args:
        student: Embeddings `(B, D)`, B >= 2.
        teacher: Embeddings of the same samples, same shape.
        margin: Distance beyond which negatives count no more; two embeddings are at most 2 apart.

    Returns:
        A scalar, >= 0. The negatives are the other samples of the batch; under DDP, of each
        process's own.

    Raises:
        ObjectiveError: If the batch has one sample.
        ShapeMismatchError: If the embeddings differ in shape.

    Example:
        >>> contrastive_projection(torch.eye(2), torch.eye(2))
        tensor(0.)

    Source:
        Chen et al. 2022 (PMKL), doi:10.1109/TMI.2021.3119385, "contrastive knowledge distillation
        loss", after the code the authors published; their tap is the decoder's last feature map.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ShapeMismatchError(
            f"contrastive_projection: the student's embeddings are {tuple(student.shape)}, the "
            f"teacher's {tuple(teacher.shape)}; expected (B, D) of both."
        )
    batch = len(student)
    if batch < 2:
        raise ObjectiveError(
            f"contrastive_projection: the batch holds {batch} sample, and negatives need a second "
            "one. Raise batch_size, and pass drop_last=True to the loader so that the last batch "
            "is not smaller."
        )
    squared = (unit(student, 1)[:, None] - unit(teacher, 1)).square().sum(2)
    # The slope of a root is infinite at zero.
    negative = (margin - squared.clamp_min(1e-12).sqrt()).relu().square()
    # The other samples of the batch are the negatives.
    same = torch.eye(batch, dtype=torch.bool, device=squared.device)
    return torch.where(same, squared, negative).mean()


@dataclass(eq=False, repr=False, kw_only=True)
class ContrastiveProjection(FeatureTerm):
    """Margin contrastive loss between projections of both networks' pooled features.

    `privdistill.functional.contrastive_projection`, where an embedding is the mean over space, a
    linear layer, ReLU and a linear layer. Each network has its own head; both are trained with the
    student, and the wrapper makes them after its dry run.

    Args:
        tap: Name of the tap; the numbers of channels may differ.
        dimensions: Length of an embedding.
        hidden: Width between the linear layers.
        margin: Distance beyond which negatives count no more; two embeddings are at most 2 apart.

    Raises:
        ObjectiveError: If an option has no meaning, the batch has one sample, or there was no
            dry run.

    Example:
        >>> 0.5 * ContrastiveProjection("decoder")
        0.5 * ContrastiveProjection(tap='decoder')

    Weight:
        0.5, as in `pmkl()`.
    """

    equal_channels = False
    dimensions: int = option(16, WHOLE)
    hidden: int = option(32, WHOLE)
    margin: float = option(1.0, POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.student_head: nn.Module | None
        self.teacher_head: nn.Module | None
        self.register_module("student_head", None)
        self.register_module("teacher_head", None)

    def build(self, step: Step) -> None:
        """Make both heads from the tap's shapes, unless they are there."""
        if self.student_head is None:
            student, teacher = self.features(step)
            self.student_head, self.teacher_head = self._head(student), self._head(teacher)

    def _head(self, features: Tensor) -> nn.Module:
        first = nn.Linear(features.shape[1], self.hidden)
        second = nn.Linear(self.hidden, self.dimensions)
        return nn.Sequential(first, nn.ReLU(), second).to(features.device)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of these features."""
        return contrastive_projection(
            _run(self, self.student_head, student.flatten(2).mean(2)),
            _run(self, self.teacher_head, teacher.flatten(2).mean(2)),
            margin=self.margin,
        )


def _run(term: FeatureTerm, network: nn.Module | None, values: Tensor) -> Any:
    """Run a term's own network in the precision of the values, whatever its own and autocast's."""
    if network is None:
        raise ObjectiveError(
            f"{term.name}: its networks are made from the shapes of a dry run, and there was none. "
            "Pass example=torch.zeros(1, C, *spatial) to the wrapper."
        )
    # Cast here, so that gradients reach the weights in their own precision.
    weights = {name: weight.to(values.dtype) for name, weight in network.named_parameters()}
    with full_precision(values):
        return functional_call(network, weights, (values,))
