"""A term that is itself learnt: a critic tells the student's predictions from the teacher's."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from privdistill.apart import load_apart
from privdistill.exceptions import LifecycleError, ObjectiveError
from privdistill.losses.base import check_choice, check_positive
from privdistill.losses.functional import (
    Activation,
    at_least_float32,
    full_precision,
    probabilities,
    resize,
)
from privdistill.losses.reading import resolve
from privdistill.losses.response import ResponseTerm
from privdistill.losses.targets import check_activation
from privdistill.step import Step

_WIDTHS = (32, 64, 128)
_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class HolisticAdversarial(ResponseTerm):
    """Make the student's prediction, seen as a whole, one that a critic takes for the teacher's.

    The student's term is `-E[D(p_s, image)]`: the critic D sees the probabilities and, on further
    channels, the student's view. It has a loss of its own, `critic_loss`, and needs an optimizer
    of its own, from `critic_parameters`; the term sends it no gradient. It lies outside of
    `parameters()`, but is moved, copied, pickled and saved (under "critic.") with the term. In
    several processes nothing synchronises it, so the wrapper refuses to train it there.

    Args:
        critic: A network from `(B, classes + image channels, *spatial)` to scores of any shape
            with B first, which are averaged. By default the wrapper builds a small one: three
            convolutions of stride 2 with circular padding and LeakyReLU, then one of kernel size 1.
        gradient_penalty: Weight of the critic's penalty, > 0.
        conditional: Whether the critic sees the image.
        metric: In which distance of two probability maps the critic's slope is held to one:
            "rms", the root mean square over voxels, so that the scale of the term does not change
            with the patch size, or "euclidean".
        activation: "softmax" or "sigmoid"; None takes the wrapper's.

    Shape:
        Logits `(B, C, *spatial)`; an image of another resolution is resampled to theirs. Output:
        scalar, of either sign.

    Raises:
        ObjectiveError: If an option has no meaning, or the step has no image.
        LifecycleError: If there is no critic yet.

    Example:
        >>> term = HolisticAdversarial(nn.Conv2d(2 + 1, 1, 1))
        >>> logits, image = torch.zeros(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 1, 4, 4)
        >>> term(Step(student=logits, image=image)).backward()
        >>> critic_loss = term.critic_loss(logits, torch.ones(1, 2, 4, 4), image, "softmax")
        >>> [parameter.grad is None for parameter in term.critic_parameters()]
        [True, True]

    Weight:
        0.1, beside the terms of `structured()`.

    Source:
        Liu et al. 2019, arXiv:1903.04197, the holistic term (weight 0.1, penalty 10 in the
        authors' code); Gulrajani et al. 2017, arXiv:1704.00028, the loss of the critic, with the
        metric "euclidean". The default critic is smaller than theirs, without self-attention and
        spectral norm, and its penalty is on the slope along the probabilities alone, as the image
        is the same for both.
    """

    per_head = False

    def __init__(
        self,
        critic: nn.Module | None = None,
        *,
        gradient_penalty: float = 10.0,
        conditional: bool = True,
        metric: Literal["rms", "euclidean"] = "rms",
        activation: Activation | None = None,
    ) -> None:
        super().__init__(activation=activation)
        check_choice("HolisticAdversarial", "metric", metric, ("rms", "euclidean"))
        self.gradient_penalty = check_positive(
            "HolisticAdversarial", "gradient_penalty", gradient_penalty
        )
        self.conditional = conditional
        self.metric = metric
        # In a list, out of sight of nn.Module: an optimizer of the student must not train it.
        self._critic = [] if critic is None else [critic]

    @property
    def critic(self) -> nn.Module:
        """The critic.

        Raises:
            LifecycleError: If it has not been built.
        """
        if not self._critic:
            raise LifecycleError(
                f"{self.name}: there is no critic yet. Pass `example=` to the wrapper, which then "
                "builds one of the right shape, or HolisticAdversarial(critic)."
            )
        return self._critic[0]

    def build(self, step: Step) -> None:
        """Make the critic, unless there is one, for the example's channels and axes.

        Args:
            step: Logits and view of the example.

        Raises:
            ObjectiveError: If it was made for a wrapper with others.
        """
        # Only shapes matter here; a softmax would do as well.
        check_activation(step.student, "sigmoid", term=self.name)
        joint = self._seen(step.student, step.image, "sigmoid")
        wanted = joint.shape[1], joint.ndim - 2
        if not self._critic:
            self._critic.append(_Critic(*wanted))
        if isinstance(self.critic, _Critic) and self.critic.sees != wanted:
            (channels, axes), (here, these) = self.critic.sees, wanted
            raise ObjectiveError(
                f"{self.name}: its critic was made for another wrapper, where it sees {channels} "
                f"channels on {axes} axes; here it would see {here} on {these}. Make an objective "
                "for each wrapper."
            )
        self.critic.to(step.student.device)

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """Return what the critic's optimizer trains.

        Returns:
            The critic's parameters.
        """
        return self.critic.parameters()

    def forward(self, step: Step) -> Tensor:
        """Compute the student's term; the critic gets no gradient from it."""
        activation = resolve(self.activation, step)
        check_activation(step.student, activation, term=self.name)
        joint = self._seen(step.student, step.image, activation)
        with full_precision(joint):
            return -self._scores(joint, learning=False).mean()

    def critic_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        image: Tensor | None,
        activation: Activation,
    ) -> Tensor:
        """Compute the critic's loss; nothing but the critic gets gradients from it.

        `E[D(p_s)] - E[D(p_t)] + penalty * E[(||grad D(x)|| - 1)^2]`, with x drawn uniformly
        between p_s and p_t, one point for each sample.

        Args:
            student: Student logits, `(B, C, *spatial)`.
            teacher: Teacher logits, same shape.
            image: The student's view; None if the critic does not see it.
            activation: The wrapper's; the term's own wins.

        Returns:
            A scalar in float32, or float64 if the logits are.
        """
        activation = self.activation or activation
        fake = self._seen(student.detach(), image, activation)
        real = self._seen(teacher.detach(), image, activation).to(fake.dtype)
        with full_precision(fake):
            distance = self._scores(fake).mean() - self._scores(real).mean()
            slopes = self._slopes(fake, real, student.shape[1])
        return distance + self.gradient_penalty * (slopes - 1).square().mean()

    def _slopes(self, fake: Tensor, real: Tensor, classes: int) -> Tensor:
        """Length of the gradient along the probabilities at a random point between, `(B,)`."""
        # One point for each sample: the probabilities of all its voxels move together.
        share = torch.rand_like(fake[(slice(None), *[slice(1)] * (fake.ndim - 1))])
        # The slope is wanted in validation too.
        with torch.enable_grad():
            between = torch.lerp(fake, real, share).requires_grad_()
            total = self._scores(between).sum()
            (slope,) = torch.autograd.grad(total, between, create_graph=True)
        lengths: Tensor = torch.linalg.vector_norm(slope[:, :classes].flatten(1), dim=1)
        return lengths * prod(fake.shape[2:]) ** 0.5 if self.metric == "rms" else lengths

    def _seen(self, logits: Tensor, image: Tensor | None, activation: Activation) -> Tensor:
        p = probabilities(logits, activation)
        if not self.conditional:
            return p
        if image is None:
            raise ObjectiveError(
                f"{self.name}: there is no image for the critic to see. Pass it, or set "
                "conditional=False."
            )
        view = resize(at_least_float32(image.detach()), p.shape[2:])
        return torch.cat((p, view.to(p.dtype)), dim=1)

    def _scores(self, joint: Tensor, *, learning: bool = True) -> Tensor:
        buffers = dict(self.critic.named_buffers())
        state = {name: p if learning else p.detach() for name, p in self.critic.named_parameters()}
        # A critic that was cast to half precision still computes in the precision of its input.
        state = {
            name: value.to(joint.dtype) if value.is_floating_point() else value
            for name, value in (state | buffers).items()
        }
        scores: Tensor = functional_call(self.critic, state, (joint,))
        for name, buffer in buffers.items():
            if buffer is not state[name]:
                # A batch norm wrote its running statistics into the copy.
                buffer.copy_(state[name])
        return scores.flatten(1).mean(dim=1)

    def train(self, mode: bool = True) -> Self:
        """Set the term's and the critic's mode.

        Args:
            mode: Train mode, or eval mode.

        Returns:
            The term.
        """
        super().train(mode)
        for critic in self._critic:
            critic.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for critic in self._critic:
            critic._apply(fn, recurse)  # type: ignore[no-untyped-call]  # noqa: SLF001
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for critic in self._critic:
            critic.state_dict(
                destination=destination, prefix=f"{prefix}critic.", keep_vars=keep_vars
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for critic in self._critic:
            load_apart(critic, f"{prefix}critic.", state_dict, *rest)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Critic(nn.Sequential):
    def __init__(self, channels: int, axes: int) -> None:
        convolution: Any = _CONVOLUTIONS[axes]
        layers: list[nn.Module] = []
        # Kernels of 3 with padding 1 take any size, and without zeros at the border, of which small
        # patches have a larger share, the score does not depend on it. No norms: they would mix the
        # samples, whose slopes are penalised one by one.
        options = {"stride": 2, "padding": 1, "padding_mode": "circular"}
        for before, after in pairwise((channels, *_WIDTHS)):
            layers += [convolution(before, after, 3, **options), nn.LeakyReLU(0.2)]
        super().__init__(*layers, convolution(_WIDTHS[-1], 1, 1))
        self.sees = (channels, axes)
