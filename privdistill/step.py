"""What passes through a step: terms read a `Step`, the user gets an `Output`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any, Literal, NamedTuple

from torch import Tensor

from privdistill.exceptions import ShapeMismatchError

# Finds the logits in what a network returned, given the number of spatial axes.
Select = Callable[[Any, int], list[Tensor]]


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
        terms: Every term by name, unweighted and detached.
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


def find_heads(output: Any, axes: int, equals: Sequence[int] | None = None) -> list[Tensor]:
    """Find the logits in what a network returned: one tensor, or several under deep supervision.

    A tensor is taken as it is; one with an axis more holds stacked heads. Of a mapping the entries
    "out" or "logits" and those that begin with "aux" are taken; of an object the attribute
    `logits`; of a tuple or list the first entry and those with as many channels that are coarser
    by a whole factor. Further ones as fine as the finest are heads in a list, never in a tuple,
    where a reconstruction may stand beside the logits.

    Args:
        output: What the forward pass returned.
        axes: Number of spatial axes.
        equals: Which of the equally fine tensors in a list are heads, the main one first, as
            `settle_heads` found out; by default all, in the network's order.

    Returns:
        Logits `(B, C, *spatial)`, finest first.

    Raises:
        ShapeMismatchError: If no logits with this number of axes can be found.

    Example:
        >>> import torch
        >>> heads = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 8, 8), torch.zeros(1, 64)]
        >>> [tuple(head.shape) for head in find_heads(heads, axes=2)]
        [(1, 2, 8, 8), (1, 2, 4, 4)]
    """
    if isinstance(output, Tensor) and output.ndim == axes + 2:
        return [output]
    if isinstance(output, Tensor) and output.ndim == axes + 3:
        return list(output.unbind(1))
    first, *others = _entries(output) or [None]
    if first is None:
        shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
        raise ShapeMismatchError(
            f"The network returned a {type(output).__name__}{shape}; expected logits "
            f"(B, C, *spatial) with {axes} spatial axes, a mapping with 'out' or 'logits', an "
            "object with .logits, or a tuple or list that begins with them. Otherwise pass "
            "`select_logits=` to the wrapper, a function from the output to the logits."
        )
    leading = find_heads(first, axes, equals)
    alike = leading[0].shape[:2]
    nested = [inner if isinstance(inner, tuple | list) else [inner] for inner in others]
    further = [
        other
        for other in chain.from_iterable(nested)
        if isinstance(other, Tensor) and other.ndim == axes + 2 and other.shape[:2] == alike
    ]
    heads = [*leading, *further]
    finest = max(heads, key=lambda head: prod(head.shape[2:])).shape
    fine = [head for head in heads if head.shape == finest]
    if isinstance(output, list) and equals is not None and len(fine) > max(equals):
        fine = [fine[index] for index in equals]
    if not isinstance(output, Mapping | list):
        fine = fine[: max(1, sum(head.shape == finest for head in leading))]
    coarse = [head for head in heads if _divides(head.shape[2:], finest[2:])]
    return [*fine, *sorted(coarse, key=lambda head: -prod(head.shape[2:]))]


def _divides(size: Sequence[int], whole: Sequence[int]) -> bool:
    factors = [divmod(large, small) for large, small in zip(whole, size, strict=True)]
    return all(not rest for _, rest in factors) and any(factor > 1 for factor, _ in factors)


def _entries(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        auxiliary = [value for key, value in output.items() if str(key).startswith("aux")]
        return [output.get("out", output.get("logits")), *auxiliary]
    if isinstance(output, tuple | list) and not hasattr(output, "logits"):
        return list(output)
    return [getattr(output, "logits", None)]


def chosen_heads(
    select: Callable[[Any], Tensor | Sequence[Tensor]], output: Any, _axes: int
) -> list[Tensor]:
    """Return the logits that the user's own function finds, in the form of `find_heads`.

    Args:
        select: Function from the output to the logits, or to a list of them, finest first.
        output: What the forward pass returned.

    Returns:
        Logits `(B, C, *spatial)`, as given.

    Raises:
        ShapeMismatchError: If it gives something else.
    """
    chosen = select(output)
    heads = [chosen] if isinstance(chosen, Tensor) else list(chosen or ())
    if not heads or not all(isinstance(head, Tensor) and head.ndim > 2 for head in heads):
        raise ShapeMismatchError(
            f"`select_logits` gave {str(getattr(chosen, 'shape', chosen))[:80]}; expected "
            "logits (B, C, *spatial), or a list of them, finest first."
        )
    return heads


def undecided(output: Any, axes: int) -> bool:
    """Say whether an output is a list with several tensors that may be the main head.

    Args:
        output: What the forward pass returned.
        axes: Number of spatial axes.

    Returns:
        Whether `settle_heads` has to look at the network itself.
    """
    return len(find_heads(output, axes)) > len(find_heads(output, axes, equals=(0,)))
