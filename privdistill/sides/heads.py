"""Which outputs of a network are logits, and a step for each under deep supervision."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn

from privdistill.exceptions import ObjectiveError, ShapeMismatchError
from privdistill.losses.functional import mix_logits, resize
from privdistill.losses.options import NOT_NEGATIVE
from privdistill.sides.restored import set_mode
from privdistill.step import Step
from privdistill.taps.flow import FlowRecorder, Node, Nodes, ancestors
from privdistill.taps.location import HeadFinder
from privdistill.taps.names import watched

# "deep supervision", "deep_supr_num", "deeply-supervised", "DeepSup"; not "semi-supervised".
_DEEP_SUPERVISION = re.compile(r"deep(ly)?[\W_]*sup(ervis|r?(?![a-z]))", re.IGNORECASE)

_UNTOLD = (
    "nothing tells which are logits. Pass `select_logits=` to the wrapper, for instance "
    "`lambda output: output[0]`"
)


class Heads(NamedTuple):
    """What an output holds that may be logits.

    Attributes:
        fine: Tensors as fine as the finest, in the network's order.
        coarse: Coarser heads, the finer first.
        usual: How many of the first fine ones are heads unless `settle_heads` found out more.
    """

    fine: list[Tensor]
    coarse: list[Tensor]
    usual: int


def find_heads(output: Any, axes: int, equals: Sequence[int] | None = None) -> list[Tensor]:
    """Find the logits in what a network returned: one tensor, or several under deep supervision.

    A tensor is taken as it is; one with an axis more holds stacked heads. Of a mapping the entries
    "out" or "logits" and those that begin with "aux" are taken; of an object the attribute
    `logits`; of a tuple or list the finest entry and those with as many channels that are coarser
    by a whole factor. Further ones as fine as the finest are heads in a list; in a tuple, where a
    reconstruction may stand beside the logits, one of them is.

    Args:
        output: What the forward pass returned.
        axes: Number of spatial axes.
        equals: Which of the equally fine tensors are heads, the main one first, as `settle_heads`
            found out; by default the first of a tuple, and all of a list, in the network's order.

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
    # Not by `_is_one`, which would be one more call in every step.
    if isinstance(output, Tensor) and output.ndim == axes + 2:
        return [output]
    fine, coarse, usual = _look(output, axes)
    if equals is None or len(fine) <= max(equals):
        equals = range(usual)
    return [*(fine[index] for index in equals), *coarse]


def undisputed_heads(weights: int, output: Any, axes: int) -> list[Tensor]:
    """Find the logits where no dry run could settle which of several tensors they are.

    If the user gave as many weights as there may be heads, all of them are.
    """
    # Of a single tensor a step need not ask more.
    if _is_one(output, axes):
        return [output]
    fine, coarse, _ = _look(output, axes)
    asked = weights == len([*fine, *coarse])
    if (len(fine) > 1 and not asked) or _rivals(output, axes):
        raise ShapeMismatchError(
            f"The network returns several tensors of one size, and without `example=` {_UNTOLD}."
        )
    return [*fine, *coarse]


def _is_one(output: Any, axes: int) -> bool:
    return isinstance(output, Tensor) and output.ndim == axes + 2


def _look(output: Any, axes: int) -> Heads:
    """Find all that may be heads, whether or not it is settled which are."""
    if _is_one(output, axes):
        return Heads([output], [], 1)
    # As the DynUNet of MONAI stacks them.
    if isinstance(output, Tensor) and output.ndim == axes + 3:
        return Heads(list(output.unbind(1)), [], output.shape[1])
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
    leading = _look(first, axes)
    alike = leading.fine[0].shape[:2]
    nested = [inner if isinstance(inner, (tuple, list)) else [inner] for inner in others]
    further = [t for t in chain.from_iterable(nested) if _is_one(t, axes) and t.shape[:2] == alike]
    heads = [*leading.fine, *leading.coarse, *further]
    finest = max(heads, key=lambda head: prod(head.shape[2:])).shape
    fine = [head for head in heads if head.shape == finest]
    # Deep supervision halves sizes; a feature map of some other size is no head.
    coarse = [head for head in heads if _divides(head.shape[2:], finest[2:])]
    coarse.sort(key=lambda head: -prod(head.shape[2:]))
    led = len(leading.fine) if leading.fine[0].shape == finest else 1
    if isinstance(output, list):
        return Heads(fine, coarse, leading.usual + len(fine) - led)
    # A name, or a list of its own, tells what leads; entries of a mapping are heads by their names.
    if isinstance(output, Mapping):
        coarse = [*fine[led:], *coarse]
    if isinstance(output, Mapping) or not isinstance(first, Tensor):
        fine = fine[:led]
    return Heads(fine, coarse, min(leading.usual, len(fine)))


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
    return prod(entry.shape[2:]) if _is_one(entry, axes) else 0


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


def _rivals(output: Any, axes: int) -> list[Tensor]:
    """What is as fine as the first logits and differs in channels: features, or the true logits."""
    first = find_heads(output, axes)[0].shape
    entries = [] if isinstance(output, Mapping) else _entries(output, axes)
    tensors = [entry for entry in entries if _voxels(entry, axes) == prod(first[2:])]
    return [tensor for tensor in tensors if tensor.shape[1] != first[1]]


class _Paths(NamedTuple):
    """The layers with weights on the way to each of the finest tensors that were found.

    `coarse` are layers at other levels; `stacked` says that one tensor holds all heads.
    """

    paths: list[frozenset[str]]
    coarse: frozenset[str]
    found: Heads
    stacked: bool


def settle_heads(
    weights: int, role: str, model: nn.Module, image: Tensor, *, training: bool
) -> HeadFinder:
    """Decide which of several equally fine tensors are heads, and which is the main one.

    The main head is the one that eval mode returns alone. Otherwise the first of a tuple leads it,
    unless another one goes on from it; of a stack, and of a list where the class speaks of deep
    supervision, it is the one that goes on from all others. Beside it count those others: heads of
    nested decoders, not those of alternative ones; in a tuple none does. `training` says whether
    the output in train mode counts. If the user gave as many weights as there may be heads, all of
    them are.
    """
    for mode in (False, True)[: 1 + training]:
        set_mode(model, training=mode)
        if not _is_one(model(image), image.ndim - 2):
            break
    else:
        # What most networks return; following paths costs many times a forward pass.
        return find_heads
    set_mode(model, training=False)
    alone = trained = _paths(model, image, role)
    if training:
        set_mode(model, training=True)
        # What eval mode returns alone also tells which of two tensors of train mode is meant.
        trained = _paths(model, image, role, alone.found.fine[0].shape[1])
    paths, coarse, found, stacked = max(alone, trained, key=lambda each: len(each.paths))
    if len(paths) == 1:
        return find_heads
    in_tuple = found.usual == 1
    asked = weights == len([*found.fine, *found.coarse])
    told = stacked or _speaks_of_deep_supervision(model)
    everything, main = range(len(paths)), []
    if len(alone.paths) == 1:
        # Equal paths differ in what has no weights, such as an activation behind the logits.
        main = [index for index in everything if paths[index] == alone.paths[0]][:1]
    elif in_tuple and not any(_is_longer(path, paths[0], coarse) for path in paths):
        main = [0]
    elif in_tuple:
        # What leads is but a step on the way to a finer one.
        main = [index for index in everything if all(path <= paths[index] for path in paths)]
    elif told or asked:
        main = [i for i in everything if all(_goes_on(paths[i], path) for path in paths)]
    if len(main) != 1 and not asked:
        # Two tensors of one size may as well be alternatives, of which only one is to be trained.
        raise ShapeMismatchError(
            f"The {role} returns {len(paths)} tensors of one size, and {_UNTOLD}, or "
            "`head_weights=`, one for each."
        )
    chosen = main[0] if len(main) == 1 else 0
    nested = [told and not in_tuple and _goes_on(paths[chosen], path) for path in paths]
    others = [i for i in everything if i != chosen and (asked or nested[i])]
    return partial(find_heads, equals=(chosen, *others))


def _is_longer(path: frozenset[str], first: frozenset[str], coarse: frozenset[str]) -> bool:
    """Whether a path holds all of the first and more, or goes on from it through other levels."""
    level, first_level = path & coarse, first & coarse
    return first < path or (level != first_level and _goes_on(level, first_level))


def _goes_on(path: frozenset[str], other: frozenset[str]) -> bool:
    """Whether one path goes on where the other turns off to its head: decoders in each other."""
    return len(path - other) >= 2 * len(other - path)


def _paths(model: nn.Module, image: Tensor, role: str, classes: int = 0) -> _Paths:
    """Run a network and follow each of its finest tensors back to the layers it came through."""
    flow = FlowRecorder(image)
    with flow, watched(model, flow.watch):
        output = model(image)
        found = _look(output, image.ndim - 2)
    fine = found.fine
    nodes = [flow.nodes(head) for head in fine]
    # Where eval mode returns one alone, the leading one tells nothing.
    leading = nodes[0] if found.usual == 1 and not classes else []
    reached = [_reached(n, i, leading if i else []) for i, n in enumerate(nodes)]
    rivals = _rivals(output, image.ndim - 2)
    before = [node for node in flow.nodes(rivals) if node in reached[0]]
    # Features come before the logits; what does not may be the logits themselves.
    if fine[0].shape[1] != classes and len(before) < len(rivals):
        shapes = [tuple(tensor.shape) for tensor in (fine[0], *rivals)]
        raise ShapeMismatchError(
            f"The {role} returns tensors of one size with different channels, {shapes}, and "
            f"{_UNTOLD}."
        )
    paths = [frozenset(i.name for i in flow.outputs if i.weighs and i.node in r) for r in reached]
    maps = [i for i in flow.outputs if i.node.grid]
    coarse = frozenset(i.name for i in maps if prod(i.node.grid) < prod(fine[0].shape[2:]))
    return _Paths(paths, coarse, found, isinstance(output, Tensor))


def _reached(nodes: list[Node], index: int, leading: list[Node]) -> Nodes:
    """All that a tensor came from; nothing before the leading one if it was made of that alone."""

    def parents(node: Node) -> tuple[Node, ...]:
        # Of stacked heads each was made apart.
        stacks = [n.parents[0] for n in nodes if n.operator == "unbind"]
        if node in stacks and node.operator == "stack":
            return node.parents[index : index + 1]
        return node.parents

    beside = ancestors(nodes, lambda node: () if node in leading else parents(node))
    from_image = any(not node.parents for node in beside)
    return ancestors(nodes, parents) if from_image else beside


def _speaks_of_deep_supervision(model: nn.Module) -> bool:
    # Docstrings, options and names of layers: there is no convention, but a word for it.
    texts = (
        text
        for module in model.modules()
        for text in (type(module).__doc__ or "", *vars(module), *dict(module.named_children()))
    )
    return any(map(_DEEP_SUPERVISION.search, texts))


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
    if not all(map(NOT_NEGATIVE.holds, weights)) or not 0 < sum(weights) < float("inf"):
        raise ObjectiveError(
            f"`head_weights` is {weights}; weights must be finite, not negative and not all zero."
        )
    return [weight / sum(weights) for weight in weights]


def check_heads(student: Tensor, teachers: Mapping[str, Tensor]) -> None:
    """Compare the shapes of all networks' finest logits for the example; teachers by role."""
    for role, teacher in teachers.items():
        if student.shape != teacher.shape:
            raise ShapeMismatchError(
                f"The objective compares logits, but for the example the student gives "
                f"{tuple(student.shape)} and the {role} {tuple(teacher.shape)}. Both must predict "
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
