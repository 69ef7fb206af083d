"""Losses against the reference: Dice plus binary cross-entropy, or any other of the user's own."""

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from privdistill.exceptions import ObjectiveError, ShapeMismatchError
from privdistill.losses import options as rules
from privdistill.losses import targets
from privdistill.losses.functional import Activation, at_least_float32, check_logits, full_precision
from privdistill.losses.fused import Comparison, dice_bce_sums
from privdistill.losses.objective import Term
from privdistill.losses.options import option, options_of
from privdistill.step import Step

#: Any supervised loss: logits and target to a scalar.
Criterion = Callable[[Tensor, Tensor], Tensor]


def dice_bce(
    logits: Tensor,
    comparison: Comparison,
    activation: Activation,
    *,
    include_background: bool = True,
    squared_denominator: bool = False,
    batch_dice: bool = False,
    smoothing: float = 1e-5,
    class_weights: Sequence[float] | None = None,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """`(1 - Dice) + BCE` with every choice the paper leaves open as an option.

    Args:
        logits: Student logits, `(B, C, *spatial)`.
        comparison: What they are compared with.
        activation: "softmax" or "sigmoid".
        include_background: Whether channel 0 counts, for softmax outputs.
        squared_denominator: Dice with squares in the denominator.
        batch_dice: Dice over the batch instead of per sample; under DDP, over each process's own.
        smoothing: Added to Dice's numerator and denominator, in voxels.
        class_weights: One number per channel that counts, scaled to a mean of one.
        sample_weights: Weight of each sample, `(B,)`; the loss is the weighted mean over samples,
            and zero where all weights are.

    Returns:
        A scalar in float32, >= 0.

    Raises:
        ShapeMismatchError: If there are not as many class weights as channels.

    Example:
        >>> perfect = torch.tensor([[[90.0], [-90.0]]])
        >>> dice_bce(perfect, Comparison(torch.tensor([[[1.0], [0.0]]])), "softmax").round()
        tensor(0.)

    Source:
        Hu et al. 2020, arXiv:2106.09564, eqs. (2) and (4).
    """
    # Regions have no background channel.
    first = 0 if include_background or activation == "sigmoid" else 1
    sums = dice_bce_sums(logits, comparison, activation, squared=squared_denominator)
    overlap, size, bce = (values[:, first:] for values in sums) if first else sums
    weights = None if sample_weights is None else sample_weights.to(bce.dtype)
    if batch_dice:
        # No matrix product, which autocast would round to half precision.
        pooled = 1 if weights is None else weights[:, None]
        overlap, size = (overlap * pooled).sum(0), (size * pooled).sum(0)
    dice = (2 * overlap + smoothing) / (size + smoothing)
    mask, known = comparison.mask, None
    voxels: float | Tensor = prod(comparison.source.shape[2:])
    if mask is not None:
        # Without the regions that a sample ignores altogether.
        seen = mask.flatten(2) if mask.shape[1] == 1 else mask[:, first:].flatten(2)
        voxels, known = seen.sum(2).clamp(min=1), seen.amax(2).to(bce.dtype)
    cost = (1 - dice) + bce / voxels
    if class_weights is None and known is None:
        costs = cost.mean(1)
    else:
        shares = _shares(class_weights, known, cost)
        counts = (shares.sum(1) > 0).to(cost.dtype)
        weights = counts if weights is None else counts * weights
        costs = (cost * shares).sum(1)
    if weights is None:
        return costs.mean()
    total = weights.sum()
    # Without any reference the mean is zero, with gradients that are zero.
    return (weights * costs).sum() / torch.where(total > 0, total, torch.ones_like(total))


def _shares(class_weights: Sequence[float] | None, known: Tensor | None, cost: Tensor) -> Tensor:
    """Share of each channel in a sample's mean; zero for all where nothing is known of any."""
    if class_weights is not None and len(class_weights) != cost.shape[1]:
        raise ShapeMismatchError(
            f"`class_weights` has {len(class_weights)} numbers, and {cost.shape[1]} channels "
            "count. Pass one per channel, without the background if it is left out."
        )
    shares = torch.tensor(class_weights or [1.0] * cost.shape[1], dtype=cost.dtype)
    shares = shares.to(cost.device).expand_as(cost)
    shares = shares if known is None else shares * known
    total = shares.sum(dim=1, keepdim=True)
    return shares / torch.where(total > 0, total, 1)


def ground_truth(
    logits: Tensor,
    target: Tensor,
    *,
    activation: Activation = "softmax",
    ignore_index: int | None = None,
    labelled: Tensor | None = None,
    sample_weights: Tensor | None = None,
    validate: bool = True,
    **options: Any,
) -> Tensor:
    r"""Dice and binary cross-entropy against the reference segmentation.

    :math:`L_\mathrm{GT} = 1 - \mathrm{Dice}(y, \sigma(l_s)) + \mathrm{BCE}(y, \sigma(l_s))`, Dice
    per sample and channel.

    Args:
        logits: `(B, C, *spatial)`.
        target: The same, one-hot or regions, or under softmax a label map `(B, *spatial)` or
            `(B, 1, *spatial)`.
        activation: "softmax" or "sigmoid".
        ignore_index: Value in the target that marks voxels to leave out; a sample, or a region of
            one, in which there is nothing else is left out of the mean.
        labelled: Which samples have a reference, boolean `(B,)`; nothing is read of the others.
        sample_weights: Weight of each sample, `(B,)`, >= 0.
        validate: Whether the target's values are checked, for which a GPU waits.
        options: Those of `dice_bce`, such as `class_weights`.

    Returns:
        A scalar, >= 0.

    Raises:
        ObjectiveError: If the target's values do not fit, or the softmax runs over one channel.
        ShapeMismatchError: If the target's shape does not fit the logits.

    Example:
        >>> logits = torch.tensor([[[9.0], [-9.0]]])
        >>> bool(ground_truth(logits, torch.tensor([[0]])) < 1e-3)
        True

    Source:
        Hu et al. 2020, arXiv:2106.09564, eq. (4), averaged over the batch where the paper sums.
    """
    owner = "ground_truth"
    channels, mask, weights = targets.reference(
        target, logits, activation, owner, ignore_index, labelled, sample_weights, validate=validate
    )
    comparison = Comparison(channels, mask=mask)
    return dice_bce(logits, comparison, activation, sample_weights=weights, **options)


@dataclass(eq=False, repr=False, kw_only=True)
class GroundTruth(Term):
    r"""The reference segmentation, by Dice and cross-entropy or by any supervised loss.

    :math:`L_\mathrm{GT} = 1 - \mathrm{Dice}(y, \sigma(l_s)) + \mathrm{BCE}(y, \sigma(l_s))`,
    `privdistill.functional.ground_truth`.

    Args:
        criterion: Another loss: a module or function from logits and target to a scalar, such as
            `monai.losses.DiceCELoss(to_onehot_y=True, softmax=True)`. It is called in float32 with
            the target as it was passed, of labelled samples alone; with sample weights it is
            called for each sample. Beside it only `of` and `resize` have a meaning.
        of: Whose prediction is compared, "student" or that of a `JointTeacher`, "teacher".
        activation: "softmax" or "sigmoid"; None takes the wrapper's.
        include_background: Whether channel 0 counts, for softmax outputs.
        squared_denominator: Dice with squares in the denominator.
        batch_dice: Dice over the batch instead of per sample; under DDP, over each process's own.
        smoothing: Added to Dice's numerator and denominator, in voxels.
        class_weights: One number per channel that counts, scaled to a mean of one.
        ignore_index: Value in the target that marks voxels to leave out; a sample, or a region of
            one, in which there is nothing else is left out of the mean.
        resize: "logits" enlarges logits that are coarser than the target; None refuses them.

    Raises:
        ObjectiveError: If an option has no meaning, or none beside a criterion.

    Example:
        >>> step = Step(student=torch.tensor([[[0.0], [0.0]]]), target=torch.tensor([[0]]))
        >>> GroundTruth(torch.nn.CrossEntropyLoss())(step)
        tensor(0.6931)

    Weight:
        1, or `1 - lambda` beside soft targets: 0.25 in `kdnet()`.
    """

    needs_target = True
    masks_unlabelled = True

    # No field: a module is registered once `nn.Module` is initialised.
    criterion: InitVar[Criterion | None] = field(default=None, kw_only=False)
    of: Literal["student", "teacher"] = option("student", rules.one_of("student", "teacher"))
    activation: Activation | None = option(None, rules.ACTIVATION)
    include_background: bool = True
    squared_denominator: bool = False
    batch_dice: bool = False
    smoothing: float = option(1e-5, rules.POSITIVE)
    class_weights: Sequence[float] | None = option(None, rules.CLASS_WEIGHTS)
    ignore_index: int | None = None
    resize: Literal["logits"] | None = option(None, rules.RESIZE)

    def __post_init__(self, criterion: Criterion | None) -> None:
        super().__init__()
        rules.check_options(self)
        self.needs_teacher = self.of == "teacher"
        if criterion is not None:
            self._check_criterion(criterion)
        self.loss = criterion

    def _check_criterion(self, criterion: Criterion) -> None:
        if not callable(criterion) or isinstance(criterion, type | Term):
            raise ObjectiveError(
                f"GroundTruth: `criterion` is {criterion!r}; expected a loss that is called with "
                "logits and target, such as torch.nn.CrossEntropyLoss()."
            )
        # Whatever differs from a term made of these two alone was given.
        usual = GroundTruth(of=self.of, resize=self.resize)
        given = [name for name in vars(usual) if vars(self).get(name) != vars(usual)[name]]
        if given:
            raise ObjectiveError(
                f"GroundTruth: beside a criterion only `of` and `resize` have a meaning; got "
                f"{given}. Give these options to the criterion."
            )

    def build(self, step: Step) -> None:
        """Refuse logits whose probabilities would be constant; a criterion reads its own way."""
        if self.loss is None and type(self).forward is GroundTruth.forward:
            check_logits(step.student, self.activation or step.activation, self.name)

    def forward(self, step: Step) -> Tensor:
        """Compute the term from one network's logits and the target."""
        step = targets.enlarged(step) if self.resize else step
        if self.loss is not None:
            return self._by_criterion(self.loss, step)
        logits = step.student if self.of == "student" else self._of_teacher(step)
        activation = self.activation or step.activation
        return ground_truth(
            logits, activation=activation, **targets.read_target(step), **options_of(self)
        )

    def _by_criterion(self, criterion: Criterion, step: Step) -> Tensor:
        """The criterion of the labelled samples; with weights their weighted mean."""
        if step.labelled is not None:
            step = targets.labelled_only(step, step.labelled, self.name)
        logits = step.student if self.of == "student" else self._of_teacher(step)
        logits, target = at_least_float32(logits), step.target
        if target is None:
            raise targets.no_target(self.name)
        weights = targets.weights_of_samples(
            None, step.sample_weights, logits, self.name, validate=step.validate
        )
        with full_precision(logits):
            if not len(logits):
                # The empty sum is zero and keeps the graph.
                return logits.sum()
            if weights is None:
                return criterion(logits, target)
            # A criterion gives one number a call: to be weighted, each sample needs its own.
            rows = [slice(index, index + 1) for index in range(len(logits))]
            values = torch.stack([criterion(logits[row], target[row]) for row in rows])
        weights = weights.to(values.dtype)
        return (weights * values).sum() / weights.sum().clamp_min(torch.finfo(values.dtype).tiny)

    def _of_teacher(self, step: Step) -> Tensor:
        # Without gradients, as in validation, a frozen teacher looks like any other.
        if step.teacher is None or not (step.teacher.requires_grad or not torch.is_grad_enabled()):
            raise ObjectiveError(
                f"{self.name}: of='teacher' supervises a teacher that learns, and this one is "
                "frozen. Declare it: DistillationWrapper(JointTeacher(network), student, ...)."
            )
        return step.teacher

    def extra_repr(self) -> str:
        """Show the criterion and the options that were chosen."""
        name = getattr(self.loss, "__name__", type(self.loss).__name__)
        return ", ".join(filter(None, (name * (self.loss is not None), super().extra_repr())))
