"""A loss that is itself learnt: a critic tells the student's predictions from the teacher's."""

from itertools import pairwise
from math import prod
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from privdistill.exceptions import ObjectiveError, ShapeMismatchError
from privdistill.losses import functional as ops
from privdistill.losses.functional import Activation
from privdistill.losses.options import POSITIVE, Rule, check, one_of
from privdistill.losses.term import ResponseTerm
from privdistill.step import Output, Step

_WIDTHS = (32, 64, 128)
_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Critic(nn.Sequential):
    """A small critic for `HolisticAdversarial`: three convolutions of stride 2, and one of size 1.

    Args:
        channels: Channels it sees: the classes, and those of the image unless it sees none.
        axes: Number of spatial axes, 1 to 3.

    Raises:
        ObjectiveError: If there are no convolutions of so many axes.

    Shape:
        Input `(B, channels, *spatial)` of any size. Output: scores `(B, 1, *smaller)`.

    Example:
        >>> Critic(2 + 1, axes=2)(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 1, 2, 2])

    Source:
        Ours; smaller than that of Liu et al. 2019, without self-attention and spectral norm.
    """

    def __init__(self, channels: int, axes: int = 3) -> None:
        check("Critic", Rule(_CONVOLUTIONS.__contains__, "1, 2 or 3"), axes=axes)
        convolution: Any = _CONVOLUTIONS[axes]
        layers: list[nn.Module] = []
        # Kernels of 3 with padding 1 take any size, and without zeros at the border, of which small
        # patches have a larger share, the score does not depend on it. No norms: they would mix the
        # samples, whose slopes are penalised one by one.
        options = {"stride": 2, "padding": 1, "padding_mode": "circular"}
        for before, after in pairwise((channels, *_WIDTHS)):
            layers += [convolution(before, after, 3, **options), nn.LeakyReLU(0.2)]
        super().__init__(*layers, convolution(_WIDTHS[-1], 1, 1))


def holistic_adversarial(
    student_logits: Tensor,
    critic: nn.Module,
    image: Tensor | None = None,
    *,
    activation: Activation = "softmax",
) -> Tensor:
    r"""How little a critic takes the student's prediction, seen as a whole, for the teacher's.

    :math:`-\mathrm{E}[D(p_s, \mathrm{image})]`: the critic D sees the probabilities and, on further
    channels, the image.

    Args:
        student_logits: `(B, C, *spatial)`.
        critic: A network from `(B, C + image channels, *spatial)` to scores of any shape with B
            first, which are averaged. It gets no gradient.
        image: The student's view, `(B, channels, *spatial)`, resampled to the logits; None if the
            critic does not see it.
        activation: "softmax" or "sigmoid".

    Returns:
        A scalar, of either sign.

    Raises:
        ObjectiveError: If the softmax runs over one channel.
        ShapeMismatchError: If the critic does not score each sample.

    Example:
        >>> critic = torch.nn.Conv2d(2 + 1, 1, 1)
        >>> logits, image = torch.zeros(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 1, 4, 4)
        >>> holistic_adversarial(logits, critic, image).backward()
        >>> critic.weight.grad is None
        True

    Source:
        Liu et al. 2019, arXiv:1903.04197, the holistic term.
    """
    ops.check_logits(student_logits, activation, "holistic_adversarial")
    joint = _seen(student_logits, image, activation)
    with ops.full_precision(joint):
        return -_scores(critic, joint, learning=False).mean()


def critic_loss(
    critic: nn.Module,
    out: Output,
    image: Tensor | None = None,
    *,
    activation: Activation = "softmax",
    gradient_penalty: float = 10.0,
    metric: Literal["rms", "euclidean"] = "rms",
) -> Tensor:
    r"""Compute the critic's loss, after the student's own step; only the critic gets gradients.

    :math:`\mathrm{E}[D(p_s)] - \mathrm{E}[D(p_t)] + \gamma \mathrm{E}[(\lVert
    \nabla D(x) \rVert - 1)^2]`
    with gamma the penalty and x drawn uniformly between p_s and p_t, one point for each sample.

    Args:
        critic: The critic, which you train. Nothing else does, so that in several processes its
            gradients are yours to average before its optimizer steps.
        out: What the step returned; of several heads the finest count.
        image: The student's view `(B, channels, *spatial)`, as the term's critic sees it, such as
            `kd.inputs.for_student(image)`; None if it does not see it.
        activation: The wrapper's, or the term's own.
        gradient_penalty: Weight of the penalty, > 0.
        metric: In which distance of two probability maps the critic's slope is held to one:
            "rms", the root mean square over voxels, so that the scale of the term does not change
            with the patch size, or "euclidean".

    Returns:
        A scalar in float32, or float64 if the logits are. NaN stays NaN, as in every loss: leave
        the critic's step out where it is not finite.

    Raises:
        ObjectiveError: If an option has no meaning, or the step had no teacher.
        ShapeMismatchError: If the logits differ in shape, or the critic does not score each sample.

    Example:
        >>> from privdistill import DistillationWrapper, HolisticAdversarial
        >>> critic = nn.Conv2d(2, 1, 1)
        >>> term = HolisticAdversarial(critic, conditional=False)
        >>> kd = DistillationWrapper(nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), objective=term)
        >>> optimizer = torch.optim.Adam(kd.parameters())
        >>> critic_optimizer = torch.optim.Adam(critic.parameters())
        >>> out = kd(torch.rand(2, 1, 4, 4))
        >>> out.loss.backward(); optimizer.step()
        >>> critic_optimizer.zero_grad()
        >>> critic_loss(critic, out).backward(); critic_optimizer.step()

    Source:
        Gulrajani et al. 2017, arXiv:1704.00028, with the metric "euclidean"; penalty 10 as in Liu
        et al. 2019, arXiv:1903.04197. The penalty is on the slope along the probabilities alone, as
        the image is the same for both.
    """
    check("critic_loss", POSITIVE, gradient_penalty=gradient_penalty)
    check("critic_loss", one_of("rms", "euclidean"), metric=metric)
    if out.teacher is None:
        raise ObjectiveError(
            "critic_loss: the step has no teacher logits. Add HolisticAdversarial to the objective."
        )
    heads = (out.student, out.teacher)
    student, teacher = (each[0] if isinstance(each, list) else each for each in heads)
    student, teacher = ops.logit_pair(student, teacher, activation, "critic_loss")
    # Cut off here: the critic's step must not train the student.
    fake = _seen(student.detach(), image, activation)
    real = _seen(teacher.detach(), image, activation).to(fake.dtype)
    with ops.full_precision(fake):
        distance = _scores(critic, fake).mean() - _scores(critic, real).mean()
        slopes = _slopes(critic, fake, real, student.shape[1])
    if metric == "rms":
        slopes = slopes * prod(fake.shape[2:]) ** 0.5
    return distance + gradient_penalty * (slopes - 1).square().mean()


def _seen(logits: Tensor, image: Tensor | None, activation: Activation) -> Tensor:
    p = ops.probabilities(logits, activation)
    if image is None:
        return p
    if image.ndim != p.ndim or len(image) != len(p):
        raise ShapeMismatchError(
            f"The critic's image is {tuple(image.shape)} beside logits {tuple(p.shape)}. Pass the "
            "student's view of the same samples."
        )
    # Detached: nothing upstream of the input learns from the critic.
    view = ops.resize(ops.at_least_float32(image.detach()), p.shape[2:])
    return torch.cat((p, view.to(p.dtype)), dim=1)


def _slopes(critic: nn.Module, fake: Tensor, real: Tensor, classes: int) -> Tensor:
    """Length of the gradient along the probabilities at a random point between, `(B,)`."""
    # One point for each sample: the probabilities of all its voxels move together.
    share = torch.rand_like(fake[(slice(None), *[slice(1)] * (fake.ndim - 1))])
    # The slope is wanted in validation too.
    with torch.enable_grad():
        between = torch.lerp(fake, real, share).requires_grad_()
        total = _scores(critic, between).sum()
        (slope,) = torch.autograd.grad(total, between, create_graph=True)
    lengths: Tensor = torch.linalg.vector_norm(slope[:, :classes].flatten(1), dim=1)
    return lengths


def _scores(critic: nn.Module, joint: Tensor, *, learning: bool = True) -> Tensor:
    buffers = dict(critic.named_buffers())
    state = {name: p if learning else p.detach() for name, p in critic.named_parameters()}
    # A critic that was cast to half precision still computes in the precision of its input.
    state = {
        name: value.to(joint.dtype) if value.is_floating_point() else value
        for name, value in {**state, **buffers}.items()
    }
    scores: Any = functional_call(critic, state, (joint,))
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if not isinstance(scores, Tensor) or shape[:1] != (len(joint),):
        raise ShapeMismatchError(
            f"The critic returned {shape} for a batch of {len(joint)}; expected scores of any "
            "shape with the batch first, so that each sample is judged by itself."
        )
    for name, buffer in buffers.items():
        if buffer is not state[name]:
            # A batch norm wrote its running statistics into the copy.
            buffer.copy_(state[name])
    return scores.reshape(len(joint), -1).mean(dim=1)


class HolisticAdversarial(ResponseTerm):
    """Make the student's prediction, seen as a whole, one that a critic takes for the teacher's.

    `-E[D(p_s, image)]`, `privdistill.functional.holistic_adversarial`. The critic is yours: the
    term reads it and sends it no gradient, and it is no part of the wrapper's parameters, devices,
    modes or checkpoints. Train it with `critic_loss` and an optimizer of its own. A copy of the
    term, such as the wrapper makes, reads the same critic.

    Args:
        critic: A network from `(B, classes + image channels, *spatial)` to scores of any shape
            with B first, which are averaged, such as `Critic(channels, axes)`.
        conditional: Whether the critic sees the student's view.
        activation: "softmax" or "sigmoid"; None takes the wrapper's.

    Raises:
        ObjectiveError: If an option has no meaning, or the step has no image.

    Example:
        >>> term = HolisticAdversarial(nn.Conv2d(2 + 1, 1, 1))
        >>> list(term.parameters())
        []

    Weight:
        0.1, beside the terms of `structured()`.
    """

    per_head = False

    def __init__(
        self,
        critic: nn.Module,
        *,
        conditional: bool = True,
        activation: Activation | None = None,
    ) -> None:
        super().__init__(activation=activation)
        if not isinstance(critic, nn.Module):
            raise ObjectiveError(
                f"HolisticAdversarial: `critic` is {critic!r}; expected a network of yours, such "
                "as Critic(classes + image channels, axes=3)."
            )
        # Not a submodule, or it would train, move and be saved with the wrapper.
        self._lent = _Lent(critic)
        self.conditional = conditional

    @property
    def critic(self) -> nn.Module:
        """The critic, the very module that was passed."""
        return self._lent.module

    def forward(self, step: Step) -> Tensor:
        """Compute the student's term; the critic gets no gradient from it."""
        if self.conditional and step.image is None:
            raise ObjectiveError(
                f"{self.name}: there is no image for the critic to see. Pass it, or set "
                "conditional=False."
            )
        image = step.image if self.conditional else None
        activation = self.activation or step.activation
        return holistic_adversarial(step.student, self.critic, image, activation=activation)


class _Lent:
    """A module of somebody else: out of sight of `nn.Module`, and the same one in every copy."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
