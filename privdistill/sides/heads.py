"""Which outputs of a network are logits, and a step for each under deep supervision."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from privdistill.exceptions import ObjectiveError, ShapeMismatchError
from privdistill.losses.functional import mix_logits, resize
from privdistill.losses.options import is_number
from privdistill.step import Step
from privdistill.taps.flow import FlowRecorder, ancestors, parents_of
from privdistill.taps.location import HeadFinder
from privdistill.taps.names import watched


def find_heads(output: Any, axes: int, equals: Sequence[int] | None = None) -> list[Tensor]:
    """Find the logits in what a network returned: one tensor, or several under deep supervision.

    A tensor is taken as it is; one with an axis more holds stacked heads. Of a mapping the entries
    "out" or "logits" and those that begin with "aux" are taken; of an object the attribute
    `logits`; of a tuple or list the finest entry and those with as many channels that are coarser
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
    # As the DynUNet of MONAI stacks them.
    if isinstance(output, Tensor) and output.ndim == axes + 3:
        return list(output.unbind(1))
    first, *others = _entries(output, axes) or [None]
    if first is None:
        shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
        raise ShapeMismatchError(
            f"The network returned a {type(output).__name__}{shape}; expected logits "
            f"(B, C, *spatial) with {axes} spatial axes, a mapping with 'out' or 'logits', an "
            "object with .logits, or a tuple or list that begins with them. Otherwise pass "
            "`select_logits=` to the wrapper, a function from the output to the logits."
        )
    # The first entry may itself be a mapping or a list of heads, as where a loss stands beside it.
    leading = find_heads(first, axes, equals)
    alike = leading[0].shape[:2]
    nested = [inner if isinstance(inner, (tuple, list)) else [inner] for inner in others]
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
    if not isinstance(output, (Mapping, list)):
        fine = fine[: max(1, sum(head.shape == finest for head in leading))]
    # Deep supervision halves sizes; a feature map of some other size is no head.
    coarse = [head for head in heads if _divides(head.shape[2:], finest[2:])]
    return [*fine, *sorted(coarse, key=lambda head: -prod(head.shape[2:]))]


def _divides(size: Sequence[int], whole: Sequence[int]) -> bool:
    factors = [divmod(large, small) for large, small in zip(whole, size, strict=True)]
    return all(not rest for _, rest in factors) and any(factor > 1 for factor, _ in factors)


def _entries(output: Any, axes: int) -> list[Any]:
    if isinstance(output, Mapping):
        auxiliary = [value for key, value in output.items() if str(key).startswith("aux")]
        return [output.get("out", output.get("logits")), *auxiliary]
    if not isinstance(output, (tuple, list)) or hasattr(output, "logits"):
        return [getattr(output, "logits", None)]
    # Heads that lie in a list of their own lead whatever stands beside it.
    if not output or not isinstance(output[0], Tensor):
        return list(output)
    return sorted(output, key=lambda entry: -_voxels(entry, axes))


def _voxels(entry: Any, axes: int) -> int:
    return prod(entry.shape[2:]) if isinstance(entry, Tensor) and entry.ndim == axes + 2 else 0


def chosen_heads(
    select: Callable[[Any], Tensor | Sequence[Tensor]], output: Any, _axes: int
) -> list[Tensor]:
    """Return the logits that the user's own function finds, in the form of `find_heads`."""
    chosen = select(output)
    heads = [chosen] if isinstance(chosen, Tensor) else list(chosen or ())
    if not heads or not all(isinstance(head, Tensor) and head.ndim > 2 for head in heads):
        raise ShapeMismatchError(
            f"`select_logits` gave {str(getattr(chosen, 'shape', chosen))[:80]}; expected "
            "logits (B, C, *spatial), or a list of them, finest first."
        )
    return heads


def undecided(output: Any, axes: int) -> bool:
    """Say whether several tensors of an output may be the main head."""
    several = len(find_heads(output, axes)) > len(find_heads(output, axes, equals=(0,)))
    return several or bool(_rivals(output, axes))


def _rivals(output: Any, axes: int) -> list[Tensor]:
    """What is as fine as the first logits and differs in channels: features, or the true logits."""
    first = find_heads(output, axes)[0].shape
    entries = [] if isinstance(output, Mapping) else _entries(output, axes)
    tensors = [entry for entry in entries if _voxels(entry, axes) == prod(first[2:])]
    return [tensor for tensor in tensors if tensor.shape[1] != first[1]]


def settle_heads(
    model: nn.Module,
    image: Tensor,
    *,
    training: bool,
    asked: bool,
    role: str,
) -> HeadFinder:
    """Decide which of the equally fine tensors in a list are heads, and which is the main one.

    The main head is the one that eval mode returns, or the one that depends on most of the
    network where its class speaks of deep supervision. Beside it count those from which it goes
    on: heads of nested decoders, not those of alternative ones. `training` says whether the output
    in train mode counts, `asked` that the user gave each a weight, so that all of them are heads.
    """
    alone, classes = _paths(model.eval(), image, role)
    # What eval mode returns alone also tells which of two tensors of train mode is meant.
    trained = _paths(model.train(), image, role, classes)[0] if training else []
    heads = max(alone, trained, key=len)
    if len(alone) == 1:
        main = [index for index, path in enumerate(heads) if path == alone[0]]
    else:
        deepest = max(map(len, heads))
        main = [index for index, path in enumerate(heads) if len(path) == deepest]
    # Two tensors of one size may as well be alternatives, of which only one is to be trained.
    supervised = asked or _speaks_of_deep_supervision(model)
    if len(main) != 1 or not (supervised or len(alone) == 1):
        if asked:
            return find_heads
        raise ShapeMismatchError(
            f"The {role} returns a list of {len(heads)} tensors of one size, and nothing tells "
            "which of them are logits. Pass `select_logits=` to the wrapper, for instance "
            "`lambda output: output[0]`, or `head_weights=`, one for each."
        )
    (chosen,) = main
    main_path = heads[chosen]
    others = [
        index
        for index, path in enumerate(heads)
        if index != chosen and (asked or len(main_path - path) > len(path - main_path))
    ]
    return partial(find_heads, equals=(chosen, *others) if supervised else (chosen,))


def _paths(
    model: nn.Module, image: Tensor, role: str, classes: int = 0
) -> tuple[list[frozenset[str]], int]:
    """The layers with weights on the way to each of the finest heads, and how many classes."""
    if model.training and image.shape[0] == 1:
        # Batch norm on maps of one voxel needs more than one value per channel.
        image = torch.cat((image, image))
    flow = FlowRecorder(image)
    with flow, watched(model, flow.watch):
        output = model(image)
        heads = find_heads(output, image.ndim - 2)
    fine = [head for head in heads if head.shape == heads[0].shape]
    reached = [ancestors(flow.nodes(head), parents_of) for head in fine]
    rivals = _rivals(output, image.ndim - 2)
    # Features come before the logits; what does not may be the logits themselves.
    if heads[0].shape[1] != classes and not reached[0].issuperset(flow.nodes(rivals)):
        shapes = [tuple(tensor.shape) for tensor in (heads[0], *rivals)]
        raise ShapeMismatchError(
            f"The {role} returns tensors of one size with different channels, {shapes}, and "
            "nothing tells which are logits. Pass `select_logits=` to the wrapper, for instance "
            "`lambda output: output[0]`."
        )
    paths = [frozenset(i.name for i in flow.outputs if i.weighs and i.node in r) for r in reached]
    return paths, heads[0].shape[1]


def _speaks_of_deep_supervision(model: nn.Module) -> bool:
    # Docstrings, options and names of layers: there is no convention, but a word for it.
    texts = (
        text
        for module in model.modules()
        for text in (type(module).__doc__ or "", *vars(module), *dict(module.named_children()))
    )
    return any("supervis" in text.lower() for text in texts)


def head_weights(
    given: Sequence[float] | None, count: int, *, training: bool = False
) -> list[float]:
    """Return the weight of each head, summing to one; None halves it from head to head."""
    # In eval mode such networks return their finest head alone.
    if count == 1 and not (training and given and len(given) > 1):
        return [1.0]
    # As nnU-Net does: a coarse head is a help, not the aim.
    weights = [0.5**index for index in range(count)] if given is None else list(given)
    if len(weights) != count:
        raise ShapeMismatchError(
            f"The student returns {count} heads, and `head_weights` has {len(weights)}: "
            f"{weights}. Pass one weight per head, finest first. If heads come in "
            "a form that is not understood, `select_logits=` may return a list."
        )
    numbers = all(is_number(weight) and 0 <= weight < float("inf") for weight in weights)
    if not numbers or not 0 < sum(weights) < float("inf"):
        raise ObjectiveError(
            f"`head_weights` is {weights}; weights must be finite, not negative and not all zero."
        )
    return [weight / sum(weights) for weight in weights]


def check_heads(student: Tensor, teachers: Sequence[Tensor]) -> None:
    """Compare the shapes of all networks' finest logits for the example."""
    for teacher in teachers:
        if student.shape != teacher.shape:
            raise ShapeMismatchError(
                f"The objective compares logits, but for the example the student gives "
                f"{tuple(student.shape)} and the teacher {tuple(teacher.shape)}. Both must predict "
                "the same classes at the same resolution; pass `select_logits=` if another output "
                "is the one to compare."
            )


def steps_by_head(
    common: Mapping[str, Any],
    heads: Sequence[Tensor],
    teachers: Sequence[Sequence[Tensor]],
    shares: Sequence[float | Tensor],
) -> list[Step]:
    """Return a step for each of the student's heads, with each teacher's logits at its resolution.

    `common` are the fields that the steps share, `shares` what each teacher counts for in the mean.
    """
    steps = []
    for head in heads:
        main = head is heads[0]
        # No comprehension, which is one more call in every step.
        answers = []
        for teacher in teachers:
            answers.append(_at_resolution(teacher, head, main))  # noqa: PERF401
        if len(answers) > 1:
            members = tuple(zip(answers, shares, strict=True))
            mean = mix_logits(members, common["activation"])
            steps.append(Step(head, mean, members, **common))
        else:
            # A single teacher's logits stay what it gave, bit by bit.
            steps.append(Step(head, answers[0] if answers else None, **common))
    return steps


def _at_resolution(heads: Sequence[Tensor], like: Tensor, main: bool) -> Tensor:
    for head in heads:
        if head.shape[2:] == like.shape[2:]:
            return head
    # The main head is never met half-way: networks of other resolutions are a mistake.
    return heads[0] if main else resize(heads[0], like.shape[2:])
