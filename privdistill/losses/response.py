"""Losses on logits: the student answers as the teacher does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from privdistill.exceptions import ObjectiveError
from privdistill.losses import functional as ops
from privdistill.losses.agreement import warn_of_softening
from privdistill.losses.functional import Activation, Binarisation, Reduction
from privdistill.losses.fused import Comparison
from privdistill.losses.options import CLASS_WEIGHTS, POSITIVE, RESIZE, one_of, option, options_of
from privdistill.losses.supervised import dice_bce
from privdistill.losses.targets import enlarged, read_target, reference
from privdistill.losses.term import ResponseTerm
from privdistill.step import Step


def soft_target_dice_bce(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 5.0,
    student_temperature: float = 1.0,
    scale_by_t2: bool = False,
    binarisation: Binarisation | None = None,
    activation: Activation = "softmax",
    tempered_logits: Tensor | None = None,
    **options: Any,
) -> Tensor:
    r"""Dice against the teacher's soft targets, cross-entropy against its binary prediction.

    :math:`L_\mathrm{KD} = 1 - \mathrm{Dice}(s, \sigma(l_s)) + \mathrm{BCE}(b, \sigma(l_s))` with
    :math:`s = \sigma(l_t / T)` and b the one-hot argmax (softmax) or `l_t > 0` (sigmoid). Only the
    teacher is tempered, and there is no factor T^2: at T > 1 perfect imitation does not bring the
    loss to zero.

    Args:
        student_logits: `(B, C, *spatial)`.
        teacher_logits: Same shape; no gradient flows into it.
        temperature: T, dimensionless, > 0.
        student_temperature: Divides the student's logits, dimensionless, > 0.
        scale_by_t2: Multiply by T^2, which keeps gradients at T = 1 size where both are tempered.
        binarisation: What the cross-entropy compares with: "argmax", "positive" (logit > 0) or
            "soft", the soft targets themselves; by default argmax for softmax outputs and positive
            for sigmoid ones.
        activation: "softmax" or "sigmoid".
        tempered_logits: What the soft targets are made of, if not the teacher's logits: of several
            teachers those of their mean at T, as `mix_logits` gives them.
        options: Those of `dice_bce`, such as `class_weights`.

    Returns:
        A scalar, >= 0.

    Raises:
        ObjectiveError: If the softmax runs over one channel.
        ShapeMismatchError: If the logits differ in shape.

    Example:
        >>> logits = torch.tensor([[[90.0], [-90.0]]])
        >>> soft_target_dice_bce(logits, logits, temperature=5.0).round(decimals=4)
        tensor(0.)

    Source:
        Hu et al. 2020, arXiv:2106.09564, eqs. (1) and (2), averaged over the batch where the paper
        sums; T = 5 is its section 3.2.
    """
    student, teacher = ops.logit_pair(
        student_logits, teacher_logits, activation, "soft_target_dice_bce"
    )
    # Neither depends on a temperature, unlike a threshold on softened probabilities.
    rule = binarisation or ("argmax" if activation == "softmax" else "positive")
    # Of several teachers the decision is that of the mean at T = 1, the soft target of that at T.
    source, binary = (teacher, None) if tempered_logits is None else (tempered_logits, teacher)
    if student_temperature != 1:
        student = ops.finite(student) / student_temperature
    loss = dice_bce(student, Comparison(source, temperature, rule, binary), activation, **options)
    return temperature**2 * loss if scale_by_t2 else loss


@dataclass(eq=False, repr=False, kw_only=True)
class SoftTargetDiceBCE(ResponseTerm):
    """Dice against the teacher's soft targets, cross-entropy against its binary prediction.

    `privdistill.functional.soft_target_dice_bce` of both networks' logits.

    Args:
        temperature: T, dimensionless, > 0.
        student_temperature: Divides the student's logits, dimensionless, > 0.
        scale_by_t2: Multiply by T^2, which keeps gradients at T = 1 size where both are tempered.
        binarisation: What the cross-entropy compares with: "argmax", "positive" (logit > 0) or
            "soft"; by default argmax for softmax outputs and positive for sigmoid ones.
        activation: "softmax" or "sigmoid"; None takes the wrapper's.
        include_background: Whether channel 0 counts, for softmax outputs.
        squared_denominator: Dice with squares in the denominator.
        batch_dice: Dice over the batch instead of per sample; under DDP, over each process's own.
        smoothing: Added to Dice's numerator and denominator, in voxels.
        class_weights: One number per channel that counts, scaled to a mean of one.

    Raises:
        ObjectiveError: If an option has no meaning.

    Example:
        >>> 0.9 * SoftTargetDiceBCE(temperature=1.0, binarisation="soft")
        0.9 * SoftTargetDiceBCE(temperature=1.0, binarisation='soft')

    Weight:
        0.75, the paper's lambda, as in `kdnet()`.
    """

    _shown = ("temperature",)
    _warned = False

    temperature: float = option(5.0, POSITIVE)
    student_temperature: float = option(1.0, POSITIVE)
    scale_by_t2: bool = False
    binarisation: Binarisation | None = option(None, one_of(None, "argmax", "positive", "soft"))
    include_background: bool = True
    squared_denominator: bool = False
    batch_dice: bool = False
    smoothing: float = option(1e-5, POSITIVE)
    class_weights: Sequence[float] | None = option(None, CLASS_WEIGHTS)

    def forward(self, step: Step) -> Tensor:
        """Compute the term from both networks' logits, which stay in half precision till needed."""
        answer = _answer(self, step, self.temperature)
        # Only where values are checked anyway, for which a GPU has to wait.
        if step.validate and not self._warned and not torch.compiler.is_compiling():
            teacher, activation = answer["teacher_logits"], answer["activation"]
            self._warned = warn_of_softening(teacher, self.temperature, activation, term=self.name)
        return soft_target_dice_bce(step.student, **answer, **options_of(self))


def _answer(term: ResponseTerm, step: Step, temperature: float) -> dict[str, Any]:
    """The teacher's answer; of several teachers that of their mean at T = 1, and that at T."""
    activation = term.activation or step.activation
    mixed = term.teacher_logits(step, activation, temperature) if step.members else None
    logits = term.teacher_logits(step, activation)
    return {"teacher_logits": logits, "tempered_logits": mixed, "activation": activation}


def hinton_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    scale_by_t2: bool = True,
    activation: Activation = "softmax",
    standardise: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Kullback-Leibler divergence from the teacher's to the student's tempered probabilities.

    :math:`T^2 \sum_c q_c \log \frac{q_c}{p_c}` at each voxel, with :math:`q = \sigma(l_t / T)` and
    :math:`p = \sigma(l_s / T)`; both are tempered. For the sigmoid (regions) it is the binary
    divergence of each channel's pair `(p_c, 1 - p_c)`, averaged over channels.

    Args:
        student_logits: `(B, C, *spatial)`.
        teacher_logits: Same shape; no gradient flows into it.
        temperature: T, dimensionless, > 0.
        scale_by_t2: Whether to multiply by T^2, which keeps the size of the gradient when T
            changes.
        activation: "softmax" or "sigmoid".
        standardise: Whether each voxel's logits are first brought to mean 0 and variance 1 over
            channels, so that the student need not match their size.
        reduction: "mean" over voxels, or "sum" over voxels; the batch is averaged in both.

    Returns:
        A scalar, nats, >= 0.

    Raises:
        ObjectiveError: If the softmax runs over one channel, or fewer than three channels are
            standardised.
        ShapeMismatchError: If the logits differ in shape.

    Example:
        >>> teacher, student = torch.tensor([[[2.0], [0.0]]]), torch.zeros(1, 2, 1)
        >>> hinton_kl(student, teacher, temperature=1.0)
        tensor(0.3278)

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2, where the cross-entropy differs from this
        by the teacher's entropy. Standardisation: Sun et al. 2024, arXiv:2403.01427, Algorithm 1,
        with 1e-5 added to the variance. The authors' code and figure 2 divide by the sample
        standard deviation: their tempered logits are those of `T sqrt(C / (C - 1))` here.
    """
    student, teacher = ops.logit_pair(student_logits, teacher_logits, activation, "hinton_kl")
    student, teacher = ops.finite(student), ops.finite(teacher)
    if standardise:
        if student.shape[1] < 3:
            raise ObjectiveError(
                "hinton_kl: standardise=True needs at least 3 channels; of the "
                f"{student.shape[1]} here at most a sign would be left, which has no gradient. "
                "Pass standardise=False."
            )
        student, teacher = ops.standardised(student, 1), ops.standardised(teacher, 1)
    divergence = _divergence(student / temperature, teacher / temperature, activation)
    # A sum over voxels and a mean over the batch; slopes shrink with T^2, which the factor undoes.
    voxels = divergence[0].numel() if reduction == "sum" else 1
    return divergence.mean() * (voxels * temperature ** (2 * scale_by_t2))


def _divergence(student: Tensor, teacher: Tensor, activation: Activation) -> Tensor:
    """KL(teacher || student) of tempered logits at each voxel, `(B, *spatial)`."""
    if activation == "softmax":
        log_q, log_p = teacher.log_softmax(1), student.log_softmax(1)
        q = log_q.exp()
        # As in `latent_kl`: summands that are not negative keep their digits near agreement.
        return (q * (log_q - log_p) + (log_p.exp() - q)).sum(1)
    # log(1 - p) from -l: the difference to one has no digits left where p is close to it.
    inside = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    outside = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (inside + outside).mean(1)


@dataclass(eq=False, repr=False, kw_only=True)
class HintonKL(ResponseTerm, function=hinton_kl):
    """Kullback-Leibler divergence from the teacher's to the student's tempered probabilities.

    `privdistill.functional.hinton_kl` of both networks' logits.

    Args:
        temperature: T, dimensionless, > 0.
        scale_by_t2: Whether to multiply by T^2, which keeps the size of the gradient when T
            changes.
        activation: "softmax" or "sigmoid"; None takes the wrapper's.
        standardise: Whether each voxel's logits are first brought to mean 0 and variance 1 over
            channels. Several teachers are averaged before, as they would vote.
        reduction: "mean" over voxels, or "sum" over voxels; the batch is averaged in both.

    Raises:
        ObjectiveError: If an option has no meaning.

    Example:
        >>> 0.5 * HintonKL(temperature=2.0)
        0.5 * HintonKL(temperature=2.0)

    Weight:
        0.5 beside half the reference, as in `hinton()`; 10 in `structured()`, at T = 1.
    """

    _shown = ("temperature",)

    temperature: float = option(4.0, POSITIVE)
    scale_by_t2: bool = True
    standardise: bool = False
    reduction: Reduction = option("mean", one_of("mean", "sum"))

    def __post_init__(self) -> None:
        super().__post_init__()
        # Standardised logits are averaged as the teachers would vote, and tempered after that.
        self.mixing_temperature = 1.0 if self.standardise else self.temperature


def logit_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    centre: bool = False,
    activation: Activation = "softmax",
) -> Tensor:
    r"""Mean squared difference of logits.

    :math:`\mathrm{mean} (l_s - l_t)^2` over batch, channels and voxels.

    Args:
        student_logits: `(B, C, *spatial)`.
        teacher_logits: Same shape; no gradient flows into it.
        centre: Whether the mean over channels is taken from each voxel's logits first; a softmax
            does not see it.
        activation: "softmax" or "sigmoid".

    Returns:
        A scalar, >= 0.

    Raises:
        ObjectiveError: If the softmax runs over one channel, or logits of a sigmoid are centred.
        ShapeMismatchError: If the logits differ in shape.

    Example:
        >>> logit_mse(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 3.0))
        tensor(9.)

    Source:
        Ba and Caruana 2014, arXiv:1312.6184, who sum over outputs and halve; here the mean.
    """
    student, teacher = ops.logit_pair(student_logits, teacher_logits, activation, "logit_mse")
    difference = ops.finite(student) - ops.finite(teacher)
    if centre:
        if activation == "sigmoid":
            raise ObjectiveError(
                "logit_mse: centre=True takes away what a sigmoid depends on. Pass centre=False."
            )
        # What a softmax does not see: an offset that all logits of a voxel share.
        difference = difference - difference.mean(1, keepdim=True)
    return difference.square().mean()


@dataclass(eq=False, repr=False, kw_only=True)
class LogitMSE(ResponseTerm, function=logit_mse):
    """Mean squared difference of logits, `privdistill.functional.logit_mse`.

    Args:
        centre: Whether the mean over channels is taken from each voxel's logits first; a softmax
            does not see it.
        activation: "softmax" or "sigmoid"; None takes the wrapper's.

    Raises:
        ObjectiveError: If an option has no meaning.

    Example:
        >>> 0.1 * LogitMSE(centre=True)
        0.1 * LogitMSE(centre=True)

    Weight:
        Depends on the scale of the logits; begin with 0.1.
    """

    centre: bool = False


def probability_mse(
    student_logits: Tensor, teacher_logits: Tensor, *, activation: Activation = "softmax"
) -> Tensor:
    r"""Squared distance of probabilities: the zero-order knowledge of a segmentation.

    :math:`\sum_c (\sigma(l_t)_c - \sigma(l_s)_c)^2` at each voxel, averaged over voxels and batch.

    Args:
        student_logits: `(B, C, *spatial)`.
        teacher_logits: Same shape; no gradient flows into it.
        activation: "softmax" or "sigmoid".

    Returns:
        A scalar, in [0, C].

    Raises:
        ObjectiveError: If the softmax runs over one channel.
        ShapeMismatchError: If the logits differ in shape.

    Example:
        >>> probability_mse(torch.zeros(1, 2, 1), torch.tensor([[[99.0], [-99.0]]]))
        tensor(0.5000)

    Source:
        Xie et al. 2018, arXiv:1810.08476, "zero-order knowledge"; the exact form could not be
        checked.
    """
    student, teacher = ops.logit_pair(student_logits, teacher_logits, activation, "probability_mse")
    difference = ops.probabilities(student, activation) - ops.probabilities(teacher, activation)
    # A sum over classes: its size does not fall with their number.
    return difference.square().sum(1).mean()


class ProbabilityMSE(ResponseTerm, function=probability_mse):
    """Squared distance of probabilities, `privdistill.functional.probability_mse`.

    Args:
        activation: "softmax" or "sigmoid"; None takes the wrapper's.

    Raises:
        ObjectiveError: If the activation is neither.

    Example:
        >>> from privdistill import Ramp
        >>> Ramp(0, 1, steps=1000) * ProbabilityMSE()
        Ramp(0, 1, steps=1000) * ProbabilityMSE()

    Weight:
        1, as in `xie()`.
    """


def reliable_soft_target_ce(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 10.0,
    ignore_index: int | None = None,
    activation: Activation = "softmax",
    labelled: Tensor | None = None,
    sample_weights: Tensor | None = None,
    validate: bool = True,
    tempered_logits: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy with the teacher's soft targets, where the teacher knows better.

    :math:`\frac{\sum m \mathrm{CE}(\sigma(l_t / T), \sigma(l_s / T))}{\sum m}` over batch and
    voxels, where :math:`m = \max(0, \mathrm{CE}_s - \mathrm{CE}_t)` if the teacher's prediction
    equals the reference and 0 otherwise; `CE_s` and `CE_t` compare each network's untempered output
    with the reference, and no gradient flows through m. For the sigmoid all of this holds for each
    channel. Zero if no m is positive.

    Args:
        student_logits: `(B, C, *spatial)`.
        teacher_logits: Same shape; no gradient flows into it.
        target: The same, one-hot or regions, or under softmax a label map `(B, *spatial)` or
            `(B, 1, *spatial)`.
        temperature: T, dimensionless, > 0.
        ignore_index: Value in the target that marks voxels to leave out.
        activation: "softmax" or "sigmoid".
        labelled: Which samples have a reference, boolean `(B,)`; nothing is read of the others.
        sample_weights: Weight of each sample, `(B,)`, >= 0.
        validate: Whether the target's values are checked, for which a GPU waits.
        tempered_logits: What the soft targets are made of, if not the teacher's logits.

    Returns:
        A scalar, nats, >= 0. The sums run over the batch; under DDP over each process's own.

    Raises:
        ObjectiveError: If the target does not fit, or the softmax runs over one channel.
        ShapeMismatchError: If logits or target differ in shape.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 1), torch.tensor([[[5.0], [-5.0]]])
        >>> reliable_soft_target_ce(student, teacher, torch.tensor([[0]]))
        tensor(0.6931)
        >>> reliable_soft_target_ce(student, teacher, torch.tensor([[1]]))
        tensor(0.)

    Source:
        Chen et al. 2022 (PMKL), doi:10.1109/TMI.2021.3119385, "regularized knowledge distillation
        loss", after the code the authors published, which clips probabilities at 0.005 where this
        works in log space; the form for the sigmoid is this library's.
    """
    owner = "reliable_soft_target_ce"
    student, teacher = ops.logit_pair(student_logits, teacher_logits, activation, owner)
    student, teacher = ops.finite(student), ops.finite(teacher)
    known = (ignore_index, labelled, sample_weights)
    channels, mask, counts = reference(
        target, student, activation, owner, *known, validate=validate
    )
    # Several teachers answer at T; whether they are right is asked of them untempered.
    mixed = teacher if tempered_logits is None else tempered_logits
    soft = ops.probabilities(mixed, activation, temperature=temperature)
    weight = _reliability(student.detach(), teacher, channels.to(student.dtype), activation)
    if mask is not None:
        # Under softmax both are of the voxel, under sigmoid of each channel.
        weight = weight * mask.reshape(weight.shape)
    if counts is not None:
        weight = weight * counts.to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
    # A floor, since there may be no voxel in which the teacher knows better.
    share = weight / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
    return (share * _cross_entropy(student / temperature, soft, activation)).sum()


def _cross_entropy(logits: Tensor, target: Tensor, activation: Activation) -> Tensor:
    """At each voxel `(B, *spatial)` for the softmax, of each channel too for the sigmoid."""
    if activation == "softmax":
        return -(target * logits.log_softmax(1)).sum(1)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def _reliability(
    student: Tensor, teacher: Tensor, target: Tensor, activation: Activation
) -> Tensor:
    # How much better the teacher knows, where its answer is the reference's.
    lead = _cross_entropy(student, target, activation) - _cross_entropy(teacher, target, activation)
    # A teacher that is wrong is not to be copied, however sure it is.
    if activation == "softmax":
        right = teacher.argmax(1) == target.argmax(1)
    else:
        right = (teacher > 0) == (target > 0.5)
    return lead.relu() * right


@dataclass(eq=False, repr=False, kw_only=True)
class ReliableSoftTargetCE(ResponseTerm):
    """Cross-entropy with the teacher's soft targets, where the teacher knows better.

    `privdistill.functional.reliable_soft_target_ce` of both networks' logits and the target.

    Args:
        temperature: T, dimensionless, > 0.
        ignore_index: Value in the target that marks voxels to leave out.
        resize: "logits" enlarges logits that are coarser than the target; None refuses them.
        activation: "softmax" or "sigmoid"; None takes the wrapper's.

    Raises:
        ObjectiveError: If an option has no meaning.

    Example:
        >>> 0.5 * ReliableSoftTargetCE()
        0.5 * ReliableSoftTargetCE(temperature=10.0)

    Weight:
        0.5, as in `pmkl()`.
    """

    needs_target = True
    masks_unlabelled = True
    _shown = ("temperature",)

    temperature: float = option(10.0, POSITIVE)
    ignore_index: int | None = None
    resize: Literal["logits"] | None = option(None, RESIZE)

    def forward(self, step: Step) -> Tensor:
        """Compute the term from both networks' logits and the target."""
        step = enlarged(step) if self.resize else step
        given = {**_answer(self, step, self.temperature), **read_target(step)}
        return reliable_soft_target_ce(step.student, **given, **options_of(self))
