"""What passes through a step: terms read a `Step`, the user gets an `Output`."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor


class TapPair(NamedTuple):
    """The activations captured under one tap name.

    Attributes:
        student: Student features after the tap's adapter, `(B, C, *spatial)`, with their graph.
        teacher: Teacher features of the same shape, without gradient.
    """

    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class Step:
    """Everything a term may read in one training step.

    A term takes what it needs, so masks and schedules reach it without new signatures.

    Attributes:
        student: Student logits, `(B, C, *spatial)`, before sigmoid or softmax.
        teacher: Teacher logits of the same shape, or None where no term needs them.
        members: Logits and weight of each teacher, where there are several, the weight perhaps one
            for each sample, `(B,)`; `teacher` is then the logarithm of their mean probabilities.
        target: Reference as the user passed it, or None.
        labelled: Which samples have a reference, boolean `(B,)`; None where all have.
        sample_weights: Weight of each sample in terms that read the target, `(B,)`, or None.
        image: The student's view of the input, `(B, C, *spatial)`, or None.
        taps: Captured activations by tap name.
        activation: "softmax" (exclusive classes) or "sigmoid" (overlapping regions); a term's own
            option wins.
        index: Number of training steps taken before this one, a scalar on the device.
        advance: Whether the optimizer takes a step after this one; not after a micro-batch.
        validate: Whether values (not only shapes) are checked in this step; such checks make a
            GPU wait.
        student_output: What the student returned, before its logits were found in it: a mapping,
            tuple or object, for terms that read reconstructions or posteriors. The same for each
            head under deep supervision. In `Term.build` it is that of train mode.
    """

    student: Tensor
    teacher: Tensor | None = None
    members: tuple[tuple[Tensor, float | Tensor], ...] = ()
    target: Tensor | None = None
    labelled: Tensor | None = None
    sample_weights: Tensor | None = None
    image: Tensor | None = None
    taps: dict[str, TapPair] = field(default_factory=dict)
    activation: Literal["softmax", "sigmoid"] = "softmax"
    index: Tensor | int = 0
    advance: bool = True
    validate: bool = True
    student_output: Any = None


class Output(NamedTuple):
    """What a call of the wrapper returns. A named tuple, so that DDP and Fabric can walk it.

    Attributes:
        loss: The objective, a scalar, in float32 unless the networks are float64.
        terms: Every term that was computed, by name, unweighted and detached.
        student: Student logits, `(B, C, *spatial)`; under deep supervision a list of them, finest
            first.
        teacher: Teacher logits likewise, or None where the objective needs none.
        taps: Captured activations by tap name; owned by this output, pinned nowhere else.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    student: Tensor | list[Tensor]
    teacher: Tensor | list[Tensor] | None
    taps: dict[str, TapPair]

    def scalars(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the loss and every term, unweighted, for any logger.

        Args:
            prefix: Before each name, such as "train/".

        Returns:
            Scalars without graph; first the loss.

        Example:
            >>> import torch
            >>> one = torch.ones(())
            >>> Output(one, {"latent_kl": 2 * one}, one, None, {}).scalars("train/")
            {'train/loss': tensor(1.), 'train/latent_kl': tensor(2.)}
        """
        values = {"loss": self.loss.detach(), **self.terms}
        return {prefix + name: value for name, value in values.items()}
