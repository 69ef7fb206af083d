"""Terms on logits: the student answers as the teacher does."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from privdistill.exceptions import ObjectiveError
from privdistill.losses.base import (
    Term,
    changed_options,
    check_choice,
    check_positive,
    check_resize,
)
from privdistill.losses.functional import (
    Activation,
    at_least_float32,
    probabilities,
    standardise,
)
from privdistill.losses.reading import resolve, teacher_logits
from privdistill.losses.targets import check_activation, enlarged, reference
from privdistill.step import Step

Reduction = Literal["mean", "sum"]


class ResponseTerm(Term):
    """What the terms of this file share: an activation, and a pair of logits.

    Args:
        activation: "softmax" or "sigmoid"; None takes the wrapper's.

    Raises:
        ObjectiveError: If the activation is neither.
    """

    needs_teacher = True

    def __init__(self, *, activation: Activation | None = None) -> None:
        super().__init__()
        if activation is not None:
            owner = type(self).__name__
            check_choice(owner, "activation", activation, ("softmax", "sigmoid"))
        self.activation = activation

    def logits(self, step: Step, temperature: float = 1.0) -> tuple[Tensor, Tensor, Activation]:
        """Return the logits of student and teacher, in float32 at least, and the activation.

        Args:
            step: The step.
            temperature: With several teachers, at which their probabilities are averaged.

        Returns:
            Student logits, the teacher's without gradient, "softmax" or "sigmoid".
        """
        activation = resolve(self.activation, step)
        check_activation(step.student, activation, term=self.name)
        teacher = teacher_logits(step, activation, term=self.name, temperature=temperature)
        return at_least_float32(step.student), at_least_float32(teacher), activation

    def extra_repr(self) -> str:
        """Show the options that were chosen."""
        return changed_options(self, "temperature")


class HintonKL(ResponseTerm):
    """Kullback-Leibler divergence from the teacher's to the student's tempered probabilities.

    `T^2 sum_c q_c log(q_c / p_c)` at each voxel, with `q = sigma(l_t / T)` and
    `p = sigma(l_s / T)`; both are tempered. For the sigmoid (regions) it is the binary divergence
    of each channel's pair `(p_c, 1 - p_c)`, averaged over channels.

    Args:
        temperature: T, dimensionless, > 0.
        scale_by_t2: Whether to multiply by T^2, which keeps the size of the gradient when T
            changes.
        activation: "softmax" or "sigmoid"; None takes the wrapper's.
        standardise: Whether each voxel's logits are first brought to mean 0 and variance 1 over
            channels, so that the student need not match their size.
        reduction: "mean" over voxels, or "sum" over voxels; the batch is averaged in both.

    Shape:
        Student and teacher logits `(B, C, *spatial)`, equal. Output: scalar, nats, >= 0.

    Raises:
        ObjectiveError: If an option has no meaning, the softmax runs over one channel, or fewer
            than three channels are standardised.
        ShapeMismatchError: If the logits differ in shape.

    Example:
        >>> import torch
        >>> teacher, student = torch.tensor([[[2.0], [0.0]]]), torch.zeros(1, 2, 1)
        >>> HintonKL(temperature=1.0)(Step(student=student, teacher=teacher))
        tensor(0.3278)

    Weight:
        0.5 beside half the reference, as in `hinton()`; 10 in `structured()`, at T = 1.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2, where the cross-entropy differs from this
        by the teacher's entropy. Standardisation: Sun et al. 2024, arXiv:2403.01427; the authors'
        code divides by the sample standard deviation, this by the population's, with 1e-5 added to
        the variance.
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        scale_by_t2: bool = True,
        activation: Activation | None = None,
        standardise: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(activation=activation)
        check_choice("HintonKL", "reduction", reduction, ("mean", "sum"))
        self.temperature = check_positive("HintonKL", "temperature", temperature)
        self.scale_by_t2 = scale_by_t2
        self.standardise = standardise
        self.reduction = reduction

    def forward(self, step: Step) -> Tensor:
        """Compute the term from both networks' logits."""
        # Several teachers are averaged before they are standardised, as they would vote.
        mixing = 1.0 if self.standardise else self.temperature
        student, teacher, activation = self.logits(step, mixing)
        if self.standardise:
            student, teacher = self._standardised(student), self._standardised(teacher)
        divergence = _divergence(student / self.temperature, teacher / self.temperature, activation)
        voxels = divergence[0].numel() if self.reduction == "sum" else 1
        return divergence.mean() * (voxels * self.temperature ** (2 * self.scale_by_t2))

    def _standardised(self, logits: Tensor) -> Tensor:
        if logits.shape[1] < 3:
            raise ObjectiveError(
                f"{self.name}: standardise=True needs at least 3 channels; of the "
                f"{logits.shape[1]} here at most a sign would be left, which has no gradient. Pass "
                "standardise=False."
            )
        return standardise(logits, 1)


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


class LogitMSE(ResponseTerm):
    """Mean squared difference of logits.

    `mean((l_s - l_t)^2)` over batch, channels and voxels.

    Args:
        centre: Whether the mean over channels is taken from each voxel's logits first; a softmax
            does not see it.
        activation: "softmax" or "sigmoid"; None takes the wrapper's.

    Shape:
        Student and teacher logits `(B, C, *spatial)`, equal. Output: scalar, >= 0.

    Raises:
        ObjectiveError: If an option has no meaning, the softmax runs over one channel, or logits
            of a sigmoid are centred.
        ShapeMismatchError: If the logits differ in shape.

    Example:
        >>> import torch
        >>> LogitMSE()(Step(student=torch.zeros(1, 2, 4), teacher=torch.full((1, 2, 4), 3.0)))
        tensor(9.)

    Weight:
        Depends on the scale of the logits; begin with 0.1.

    Source:
        Ba and Caruana 2014, arXiv:1312.6184, who sum over outputs and halve; here the mean.
    """

    def __init__(self, *, centre: bool = False, activation: Activation | None = None) -> None:
        super().__init__(activation=activation)
        self.centre = centre

    def forward(self, step: Step) -> Tensor:
        """Compute the term from both networks' logits."""
        student, teacher, activation = self.logits(step)
        difference = student - teacher
        if self.centre:
            self._check_centre(activation)
            difference = difference - difference.mean(1, keepdim=True)
        return difference.square().mean()

    def _check_centre(self, activation: Activation) -> None:
        if activation == "sigmoid":
            raise ObjectiveError(
                f"{self.name}: centre=True takes away what a sigmoid depends on. Pass centre=False."
            )


class ProbabilityMSE(ResponseTerm):
    """Squared distance of probabilities: the zero-order knowledge of a segmentation.

    `sum_c (sigma(l_t)_c - sigma(l_s)_c)^2` at each voxel, averaged over voxels and batch.

    Args:
        activation: "softmax" or "sigmoid"; None takes the wrapper's.

    Shape:
        Student and teacher logits `(B, C, *spatial)`, equal. Output: scalar, in [0, C].

    Raises:
        ObjectiveError: If the activation is neither, or the softmax runs over one channel.
        ShapeMismatchError: If the logits differ in shape.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[[99.0], [-99.0]]])
        >>> ProbabilityMSE()(Step(student=torch.zeros(1, 2, 1), teacher=teacher))
        tensor(0.5000)

    Weight:
        1, as in `xie()`.

    Source:
        Xie et al. 2018, arXiv:1810.08476, "zero-order knowledge"; the exact form could not be
        checked.
    """

    def forward(self, step: Step) -> Tensor:
        """Compute the term from both networks' logits."""
        student, teacher, activation = self.logits(step)
        difference = probabilities(student, activation) - probabilities(teacher, activation)
        return difference.square().sum(1).mean()


class ReliableSoftTargetCE(ResponseTerm):
    """Cross-entropy with the teacher's soft targets, where the teacher knows better.

    `sum(m CE(sigma(l_t / T), sigma(l_s / T))) / sum(m)` over batch and voxels, where
    `m = max(0, CE_s - CE_t)` if the teacher's prediction equals the reference and 0 otherwise;
    `CE_s` and `CE_t` compare each network's untempered output with the reference, and no gradient
    flows through m. For the sigmoid all of this holds for each channel. Zero if no m is positive.

    Args:
        temperature: T, dimensionless, > 0.
        ignore_index: Value in the target that marks voxels to leave out.
        resize: "logits" enlarges logits that are coarser than the target; None refuses them.
        activation: "softmax" or "sigmoid"; None takes the wrapper's.

    Shape:
        Student and teacher logits `(B, C, *spatial)`, equal. Target: the same, one-hot or regions,
        or under softmax a label map `(B, *spatial)` or `(B, 1, *spatial)`. Output: scalar, nats,
        >= 0. The sums run over the batch; under DDP over each process's own.

    Raises:
        ObjectiveError: If an option has no meaning, or the target is missing or does not fit.
        ShapeMismatchError: If logits or target differ in shape.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 2, 1), torch.tensor([[[5.0], [-5.0]]])
        >>> term = ReliableSoftTargetCE()
        >>> term(Step(student=student, teacher=teacher, target=torch.tensor([[0]])))
        tensor(0.6931)
        >>> term(Step(student=student, teacher=teacher, target=torch.tensor([[1]])))
        tensor(0.)

    Weight:
        0.5, as in `pmkl()`.

    Source:
        Chen et al. 2022 (PMKL), doi:10.1109/TMI.2021.3119385, "regularized knowledge distillation
        loss", after the code the authors published, which clips probabilities at 0.005 where this
        works in log space; the form for the sigmoid is this library's.
    """

    needs_target = True

    def __init__(
        self,
        *,
        temperature: float = 10.0,
        ignore_index: int | None = None,
        resize: Literal["logits"] | None = None,
        activation: Activation | None = None,
    ) -> None:
        super().__init__(activation=activation)
        self.temperature = check_positive("ReliableSoftTargetCE", "temperature", temperature)
        self.ignore_index = ignore_index
        self.resize = check_resize("ReliableSoftTargetCE", resize)

    def forward(self, step: Step) -> Tensor:
        """Compute the term from both networks' logits and the target."""
        step = enlarged(step) if self.resize else step
        student, teacher, activation = self.logits(step)
        # Several teachers answer at T; whether they are right is asked of them untempered.
        mixed = teacher_logits(step, activation, term=self.name, temperature=self.temperature)
        target, mask, counts = reference(
            step, student, activation, term=self.name, ignore_index=self.ignore_index
        )
        soft = probabilities(mixed, activation, temperature=self.temperature)
        weight = _reliability(student.detach(), teacher, target.to(student.dtype), activation)
        if mask is not None:
            # Under softmax both are of the voxel, under sigmoid of each channel.
            weight = weight * mask.reshape(weight.shape)
        if counts is not None:
            weight = weight * counts.to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
        # A floor, since there may be no voxel in which the teacher knows better.
        share = weight / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
        return (share * _cross_entropy(student / self.temperature, soft, activation)).sum()


def _cross_entropy(logits: Tensor, target: Tensor, activation: Activation) -> Tensor:
    """At each voxel `(B, *spatial)` for the softmax, of each channel too for the sigmoid."""
    if activation == "softmax":
        return -(target * logits.log_softmax(1)).sum(1)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def _reliability(
    student: Tensor, teacher: Tensor, target: Tensor, activation: Activation
) -> Tensor:
    lead = _cross_entropy(student, target, activation) - _cross_entropy(teacher, target, activation)
    if activation == "softmax":
        right = teacher.argmax(1) == target.argmax(1)
    else:
        right = (teacher > 0) == (target > 0.5)
    return lead.relu() * right
