"""Locate the bottleneck of any encoder-decoder from one forward pass."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from privdistill.exceptions import LayerNotFoundError
from privdistill.taps.layout import find_layout
from privdistill.taps.names import watched

# Pooling to a fixed size gives context (squeeze-excitation, ASPP, the bins of PSP), not features.
_FIXED_POOLS = ("adaptive_avg_pool", "adaptive_max_pool", "_adaptive_avg_pool")
_REDUCTIONS = ("mean", "sum", "amax", "avg_pool", "max_pool")
# A window that covers more than this at once is no encoder's pooling.
_WIDEST_POOL = 4
_REMEDY = "taps={'bottleneck': Tap(teacher=..., student=...)}."
_UPSAMPLING = ("upsample", "_upsample")
_COPIES = ("view", "_unsafe_view", "clone", "_to_copy", "alias")
_RESHAPING = (*_COPIES, "permute", "transpose", "expand", "slice", "unsqueeze", "squeeze")


@dataclass(frozen=True)
class Location:
    """Where the bottleneck is, and what else came into question.

    Attributes:
        name: Dotted name of the layer.
        shape: Shape of its output for the example.
        candidates: Names of the other layers at the same resolution, in the order they ran.
        how: How it was decided, in a few words.
        select: Index or key of the features, where the layer gives several tensors.
    """

    name: str
    shape: tuple[int, ...]
    candidates: tuple[str, ...]
    how: str
    select: int | str | None = None


@dataclass(eq=False)
class _Node:
    """One tensor of the forward pass: how it was made, from what, and how many voxels it has.

    `voxels` is 0 for what is no feature map of the image: vectors, windows, weights.
    """

    number: int
    operator: str
    shape: tuple[int, ...]
    parents: tuple["_Node", ...]
    pooled: bool
    voxels: int

    @property
    def origin(self) -> "_Node":
        """The node before it was only reshaped."""
        node = self
        while node.operator.startswith(_RESHAPING):
            node = node.parents[0]
        return node


@dataclass(eq=False)
class _LayerOutput:
    """Output of a layer; `keeps` is set if it has the shape of the layer's input."""

    name: str
    select: int | str | None
    node: _Node
    learns: bool
    keeps: bool


_Outputs = list[_LayerOutput]


class _FlowRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record which tensor was computed from which, below autograd and without gradients."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs: _Outputs = []
        self._nodes = WeakIdKeyDictionary()
        self._numbers = count()
        self._rank = image.ndim
        self._batch, self._spatial = image.shape[0], tuple(image.shape[2:])
        self._add(image, "input", ())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        parents = tuple(self.nodes((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and parents:
                self._add(leaf, func.overloadpacket.__name__, parents)
        return result

    def nodes(self, values: Any) -> list[_Node]:
        """Return the nodes of all tensors in a value that depend on the input."""
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return [self._nodes[tensor] for tensor in tensors if tensor in self._nodes]

    def _add(self, tensor: Tensor, operator: str, parents: tuple[_Node, ...]) -> None:
        shape = tuple(tensor.shape)
        layout = find_layout(shape, self._spatial) if shape[:1] == (self._batch,) else None
        is_map = layout is not None and (layout.kind != "tokens" or prod(layout.grid) > 1)
        voxels = prod(layout.grid) if layout and is_map else 0
        # Global context stays global until it meets a feature map again.
        inherits = bool(parents) and all(parent.pooled for parent in parents)
        pooled = inherits or self._pools(operator, shape, parents)
        self._nodes[tensor] = _Node(next(self._numbers), operator, shape, parents, pooled, voxels)

    def _pools(self, operator: str, shape: tuple[int, ...], parents: tuple[_Node, ...]) -> bool:
        """Whether an operator pools to a fixed size, or reduces a map to one voxel."""
        if operator.startswith(_FIXED_POOLS):
            return True
        several = len(shape) == self._rank and prod(shape[2:]) > 1
        if several or not operator.startswith(_REDUCTIONS):
            return False
        maps = [node.shape for node in parents if len(node.shape) == self._rank]
        widest = max((max(shape[2:]) for shape in maps), default=1)
        return widest > (_WIDEST_POOL if "pool" in operator else 1)

    def watch(self, name: str, module: nn.Module) -> Any:
        """Return a hook that notes the node of a layer's output."""
        learns = any(True for _ in module.parameters())

        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            inputs = self.nodes(args)
            shapes = {node.shape for node in inputs}
            for select, value in _entries(output):
                for node in self.nodes(value) if isinstance(value, Tensor) else ():
                    # What is only resampled was learned at a coarser resolution.
                    here = learns and not node.operator.startswith(_UPSAMPLING)
                    # A layer may only join its input to what it computed: a skip connection.
                    if node.operator != "cat" or not set(inputs) & set(node.parents):
                        found = _LayerOutput(name, select, node, here, node.shape in shapes)
                        self.outputs.append(found)

        return hook


def _entries(output: Any) -> list[tuple[int | str | None, Any]]:
    if isinstance(output, Mapping):
        return list(output.items())
    return list(enumerate(output)) if isinstance(output, tuple | list) else [(None, output)]


def locate_bottleneck(model: nn.Module, image: Tensor, *, role: str = "network") -> Location:
    """Find the last encoder output at the coarsest resolution on the path to the logits.

    One forward pass records which tensor was computed from which. Left out are global-pooling
    branches (squeeze-excitation, ASPP, PSP), keys and values of attention, layers the logits do
    not depend on, heads whose output is only resampled into logits, layers that only join a skip
    connection, activations that run several times, and what a decoder does at that resolution
    before it upsamples. Names decide nothing but which layers belong to one part.

    Args:
        model: The network, uncompiled, in the mode in which its forward is to be read; call
            under `torch.no_grad()`.
        image: Its input, `(B, C, *spatial)`; the values do not matter.
        role: What messages call the network.

    Returns:
        The layer and the other candidates.

    Raises:
        LayerNotFoundError: If the network never downsamples, or two branches that do not depend
            on each other are equally coarse; the message lists the candidates.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Upsample(16), nn.Conv2d(4, 2, 1))
        >>> locate_bottleneck(net, torch.zeros(1, 1, 16, 16)).name
        '0'

    Source:
        Hu et al. 2020, arXiv:2106.09564, section 2.2: the latent representation between encoder
        and decoder. The paper does not say which layer of Fig. 1 that is; the rule here is ours.
    """
    flow = _FlowRecorder(image)
    with flow, watched(model, flow.watch):
        sources = flow.nodes(model(image))
    reached = _ancestors(sources, _features)
    # One activation that is used in many places gives no one output.
    runs = Counter((item.name, item.select) for item in flow.outputs)
    once = [i for i in flow.outputs if i.learns or runs[i.name, i.select] == 1]
    # Norms and activations end a stage as well as convolutions; pooling alone does not begin one.
    outputs = [i for i in once if i.node in reached and (i.learns or i.keeps)]
    return _choose(outputs, sources, prod(image.shape[2:]), role)


def _ancestors(sources: list[_Node], parents: Callable[[_Node], Iterable[_Node]]) -> set[_Node]:
    found: set[_Node] = set()
    waiting = list(sources)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(parents(node))
    return found


def _parents(node: _Node) -> tuple[_Node, ...]:
    return node.parents


def _features(node: _Node) -> Sequence[_Node]:
    """Parents of a node without gates: maps that were upsampled only to multiply another one.

    Attention has none: its keys and values may be coarser than the features that pass it by.
    """
    if _attends(node):
        return []
    if not node.operator.startswith("mul"):
        return node.parents
    features = [item for item in node.parents if not item.operator.startswith(_UPSAMPLING)]
    return features or node.parents


def _attends(node: _Node) -> bool:
    weights = [parent.origin.operator for parent in node.parents]
    return node.operator.startswith("_scaled_dot_product") or (
        node.operator == "bmm" and any("softmax" in operator for operator in weights)
    )


def _resampled(node: _Node) -> Sequence[_Node]:
    """Parents of a node that only resamples them."""
    return node.parents if node.operator.startswith((*_UPSAMPLING, *_COPIES)) else ()


def _choose(outputs: _Outputs, sources: list[_Node], whole: int, role: str) -> Location:
    # Maps of one voxel are legitimate where the example is small; only pooled ones are left out.
    maps = [item for item in outputs if item.node.voxels and not item.node.pooled]
    fewest = min((item.node.voxels for item in maps), default=0)
    coarse = [item for item in maps if item.node.voxels == fewest < whole]
    resampled = _ancestors(sources, _resampled)
    heads = {item.name for item in coarse if item.node in resampled}
    body = [item for item in coarse if not _inside(item.name, heads)]
    if not body:
        raise LayerNotFoundError(
            f"Bottleneck of the {role}: no layer has a coarser output than the input"
            f"{' outside its head' if coarse else ''}, so there is no bottleneck to find. Name a "
            f"layer pair: {_REMEDY}"
        )
    encoder = _encoder_part([i for i in outputs if i.learns and i.node.voxels], body, whole, role)
    last = _last(encoder)
    _check_single(encoder, body, last, role)
    names = dict.fromkeys(item.name for item in coarse if not _inside(item.name, {last.name}))
    how = f"last encoder output at the coarsest resolution, {last.node.voxels} voxels"
    return Location(last.name, last.node.shape, tuple(names), how, last.select)


def _encoder_part(learned: _Outputs, body: _Outputs, whole: int, role: str) -> _Outputs:
    """Drop what another part of the network than the encoder does at the same resolution.

    The part that reaches the coarsest resolution first belongs to the encoder. A later part that
    also holds finer layers is a decoder or a head; one that lives at this resolution only is a
    bottleneck of its own, if anything finer is learned behind it.
    """
    depth = _shared_depth([item.name for item in learned])
    parts = {item.name: _part(item.name, depth) for item in (*learned, *body)}
    first = parts[body[0].name]
    finer = [item for item in learned if item.node.voxels > body[0].node.voxels]
    own = [item for item in finer if parts[item.name] == first]
    _check_encoder(own, [i for i in learned if parts[i.name] != first], body, whole, role)
    # Without a decoder behind it, what follows the encoder is a head, such as an ASPP.
    decoded = any(item.node.number > body[-1].node.number for item in finer)
    kept = {first} | (
        {parts[i.name] for i in body} - {parts[i.name] for i in finer} if decoded else set()
    )
    return [item for item in body if parts[item.name] in kept]


def _check_encoder(
    own: _Outputs, elsewhere: _Outputs, body: _Outputs, whole: int, role: str
) -> None:
    """Refuse to choose where a decoder goes on to a coarser resolution than its encoder."""
    start = min(item.node.number for item in [*own, body[0]])
    before = [item for item in elsewhere if item.node.number < start and item.node.voxels < whole]
    if before and any(item.node.number > body[-1].node.number for item in own):
        coarsest = min(item.node.voxels for item in before)
        encoded = [item for item in before if item.node.voxels == coarsest]
        raise _undecided(
            role,
            "the part that goes down to the coarsest resolution also goes up again, and another "
            "part went down before it, so either may be the encoder",
            [_last(encoded), _last(body)],
        )


def _check_single(encoder: _Outputs, body: _Outputs, last: _LayerOutput, role: str) -> None:
    """Refuse to choose among branches of which neither depends on the other."""
    before = _ancestors([last.node], _parents)
    # Elsewhere, what depends on the encoder is its decoder; what does not is a second network.
    encoded = {item.node for item in encoder}
    second = [item for item in body if encoded.isdisjoint(_ancestors([item.node], _parents))]
    apart = [item for item in (*encoder, *second) if item.node.origin not in before]
    if apart:
        same = [[i for i in apart if i.node.origin is item.node.origin] for item in apart]
        listed = [last, *map(_last, same)]
        raise _undecided(role, "several branches are equally coarse and independent", listed)


def _undecided(role: str, why: str, candidates: _Outputs) -> LayerNotFoundError:
    shapes = {item.name: item.node.shape for item in candidates}
    listed = "".join(f"  '{name}' {shape}\n" for name, shape in shapes.items())
    return LayerNotFoundError(
        f"Bottleneck of the {role}: {why}:\n{listed}Name the one to match: {_REMEDY}"
    )


def _shared_depth(names: list[str]) -> int:
    """Number of leading name parts that every layer shares, as in a network inside a wrapper."""
    containers = {name.rpartition(".")[0] for name in names}
    leaves = [name.split(".") for name in names if name not in containers]
    depth = 0
    while all(len(path) > depth + 1 for path in leaves) and len({p[depth] for p in leaves}) == 1:
        depth += 1
    return depth


def _part(name: str, depth: int) -> str:
    parts = name.split(".")
    part = parts[min(depth, len(parts) - 1)]
    # numbered layers of one nn.Sequential belong together
    return "numbered" if part.isdigit() else part


def _inside(name: str, parts: set[str]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def _last(items: _Outputs) -> _LayerOutput:
    # A block and its last layer give the same tensor; the block's name is what people know.
    return max(items, key=lambda i: (i.node.origin.number, i.select is None, -i.name.count(".")))
