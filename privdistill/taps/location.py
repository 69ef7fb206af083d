"""Locate the bottleneck of any encoder-decoder from one forward pass."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from privdistill.exceptions import LayerNotFoundError
from privdistill.taps.layout import find_layout
from privdistill.taps.names import layers

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


@dataclass
class _Node:
    """One tensor of the forward pass: how it was made, from what, and how many voxels it has.

    `voxels` is 0 for what is no feature map of the image: vectors, windows, weights.
    """

    operator: str
    shape: tuple[int, ...]
    parents: tuple[int, ...]
    pooled: bool
    voxels: int


@dataclass
class _LayerOutput:
    """Output of a layer; `keeps` is set if it has the shape of the layer's input.

    `origin` is the node before it was only reshaped; `voxels` is 0 if it is no feature map.
    """

    name: str
    select: int | str | None
    node: int
    origin: int
    voxels: int
    learns: bool
    keeps: bool


class _FlowRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record which tensor was computed from which, below autograd and without gradients."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[_Node] = []
        self.layer_outputs: list[_LayerOutput] = []
        self._numbers = WeakIdKeyDictionary()
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
        parents = tuple(self._known((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and parents:
                self._add(leaf, func.overloadpacket.__name__, parents)
        return result

    def number(self, tensor: Any) -> int | None:
        """Return the node of a tensor, or None where it does not depend on the input."""
        if not isinstance(tensor, Tensor) or tensor not in self._numbers:
            return None
        return int(self._numbers[tensor])

    def _known(self, values: Any) -> Iterator[int]:
        for leaf in tree_leaves(values):
            number = self.number(leaf)
            if number is not None:
                yield number

    def _add(self, tensor: Tensor, operator: str, parents: tuple[int, ...]) -> None:
        shape = tuple(tensor.shape)
        makes_pool = operator.startswith(_FIXED_POOLS) or (
            operator.startswith(_REDUCTIONS) and self._collapses(operator, shape, parents)
        )
        # Global context stays global until it meets a feature map again.
        inherits = bool(parents) and all(self.nodes[parent].pooled for parent in parents)
        self._numbers[tensor] = len(self.nodes)
        pooled = makes_pool or inherits
        self.nodes.append(_Node(operator, shape, parents, pooled, self._voxels(shape)))

    def _voxels(self, shape: tuple[int, ...]) -> int:
        layout = find_layout(shape, self._spatial) if shape[:1] == (self._batch,) else None
        if layout is None or (layout.kind == "tokens" and prod(layout.grid) == 1):
            return 0
        return prod(layout.grid)

    def _collapses(self, operator: str, shape: tuple[int, ...], parents: tuple[int, ...]) -> bool:
        """Whether a reduction leaves one voxel of a map."""
        if len(shape) == self._rank and prod(shape[2:]) > 1:
            return False
        maps = [self.nodes[p].shape for p in parents if len(self.nodes[p].shape) == self._rank]
        widest = max((max(shape[2:]) for shape in maps), default=1)
        return widest > (_WIDEST_POOL if "pool" in operator else 1)

    def watch(self, name: str, module: nn.Module) -> Any:
        """Return a hook that notes the node of a layer's output."""
        learns = any(True for _ in module.parameters())

        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            inputs = set(self._known(args))
            shapes = {self.nodes[item].shape for item in inputs}
            for select, value in _entries(output):
                number = self.number(value)
                if number is not None and not self._joins(number, inputs):
                    node, origin = self.nodes[number], _origin(self.nodes, number)
                    # What is only resampled was learned at a coarser resolution.
                    here = learns and not node.operator.startswith(_UPSAMPLING)
                    found = (number, origin, node.voxels, here, node.shape in shapes)
                    self.layer_outputs.append(_LayerOutput(name, select, *found))

        return hook

    def _joins(self, number: int, inputs: set[int]) -> bool:
        """Whether a layer only joins its input to what it computed, as a skip connection does."""
        node = self.nodes[number]
        return node.operator == "cat" and bool(inputs & set(node.parents))


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
    with flow, _watched(model, flow):
        output = model(image)
    sources = [number for leaf in tree_leaves(output) if (number := flow.number(leaf)) is not None]
    reached = _ancestors(flow.nodes, sources, of=_features)
    # One activation that is used in many places gives no one output.
    runs = Counter((item.name, item.select) for item in flow.layer_outputs)
    once = [i for i in flow.layer_outputs if i.learns or runs[i.name, i.select] == 1]
    # Norms and activations end a stage as well as convolutions; pooling alone does not begin one.
    outputs = [i for i in once if i.node in reached and (i.learns or i.keeps)]
    return _choose(flow, outputs, sources, role)


@contextmanager
def _watched(model: nn.Module, flow: _FlowRecorder) -> Iterator[None]:
    with ExitStack() as stack:
        # Each module once: a shared layer has several names.
        known = {module: name for name, module in reversed(layers(model).items())}
        for module, name in known.items():
            handle = module.register_forward_hook(flow.watch(name, module))
            stack.callback(handle.remove)
        yield


def _parents(nodes: list[_Node], number: int) -> Sequence[int]:
    return nodes[number].parents


def _ancestors(
    nodes: list[_Node],
    sources: Sequence[int],
    of: Callable[[list[_Node], int], Sequence[int]] = _parents,
) -> set[int]:
    found: set[int] = set()
    waiting = list(sources)
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting.extend(of(nodes, number))
    return found


def _features(nodes: list[_Node], number: int) -> list[int]:
    """Parents of a node without gates: maps that were upsampled only to multiply another one.

    Attention has none: its keys and values may be coarser than the features that pass it by.
    """
    parents = list(dict.fromkeys(nodes[number].parents))
    if _attends(nodes, nodes[number]):
        return []
    if not nodes[number].operator.startswith("mul"):
        return parents
    features = [parent for parent in parents if not nodes[parent].operator.startswith(_UPSAMPLING)]
    return features or parents


def _attends(nodes: list[_Node], node: _Node) -> bool:
    weights = [nodes[_origin(nodes, parent)].operator for parent in node.parents]
    return node.operator.startswith("_scaled_dot_product") or (
        node.operator == "bmm" and any("softmax" in operator for operator in weights)
    )


def _origin(nodes: list[_Node], number: int) -> int:
    """Node that was only reshaped since."""
    while nodes[number].operator.startswith(_RESHAPING):
        number = nodes[number].parents[0]
    return number


def _resampled(nodes: list[_Node], number: int) -> Sequence[int]:
    """Parents of a node that only resamples them."""
    only = nodes[number].operator.startswith((*_UPSAMPLING, *_COPIES))
    return nodes[number].parents if only else ()


def _coarsest(flow: _FlowRecorder, outputs: list[_LayerOutput]) -> list[_LayerOutput]:
    # Maps of one voxel are legitimate where the example is small; only pooled ones are left out.
    maps = [item for item in outputs if item.voxels and not flow.nodes[item.node].pooled]
    fewest = min((item.voxels for item in maps), default=0)
    return [item for item in maps if item.voxels == fewest < flow.nodes[0].voxels]


def _choose(
    flow: _FlowRecorder, outputs: list[_LayerOutput], sources: list[int], role: str
) -> Location:
    coarse = _coarsest(flow, outputs)
    resampled = _ancestors(flow.nodes, sources, of=_resampled)
    heads = {item.name for item in coarse if item.node in resampled}
    body = [item for item in coarse if not _inside(item.name, heads)]
    if not body:
        raise LayerNotFoundError(
            f"Bottleneck of the {role}: no layer has a coarser output than the input"
            f"{' outside its head' if coarse else ''}, so there is no bottleneck to find. Name a "
            f"layer pair: {_REMEDY}"
        )
    encoder = _encoder_part(flow, [item for item in outputs if item.learns], body, role)
    last = _last(encoder)
    _check_single(flow, encoder, body, last, role)
    shape = flow.nodes[last.node].shape
    names = dict.fromkeys(item.name for item in coarse if not _inside(item.name, {last.name}))
    how = f"last encoder output at the coarsest resolution, {last.voxels} voxels"
    return Location(last.name, shape, tuple(names), how, last.select)


def _encoder_part(
    flow: _FlowRecorder, learned: list[_LayerOutput], body: list[_LayerOutput], role: str
) -> list[_LayerOutput]:
    """Drop what another part of the network than the encoder does at the same resolution.

    The part that reaches the coarsest resolution first belongs to the encoder. A later part that
    also holds finer layers is a decoder or a head; one that lives at this resolution only is a
    bottleneck of its own, if anything finer is learned behind it.
    """
    learned = [item for item in learned if item.voxels]
    depth = _shared_depth([item.name for item in learned])
    first = _part(body[0].name, depth)
    finer = [item for item in learned if item.voxels > body[0].voxels]
    _check_encoder(flow, [i for i in learned if _part(i.name, depth) != first], body, finer, role)
    # Without a decoder behind it, what follows the encoder is a head, such as an ASPP.
    decoded = any(item.node > body[-1].node for item in finer)
    others = {_part(item.name, depth) for item in finer}
    parts = [(_part(item.name, depth), item) for item in body]
    return [item for part, item in parts if part == first or (decoded and part not in others)]


def _check_encoder(
    flow: _FlowRecorder,
    elsewhere: list[_LayerOutput],
    body: list[_LayerOutput],
    finer: list[_LayerOutput],
    role: str,
) -> None:
    """Refuse to choose where a decoder goes on to a coarser resolution than its encoder."""
    apart = {item.name for item in elsewhere}
    own = [item for item in finer if item.name not in apart]
    start = min(item.node for item in [*own, *body] if item.name not in apart)
    whole = flow.nodes[0].voxels
    before = [item for item in elsewhere if item.node < start and item.voxels < whole]
    if not before or not any(item.node > body[-1].node for item in own):
        return
    coarsest = min(item.voxels for item in before)
    encoded = [item for item in before if item.voxels == coarsest]
    listed = [_last(encoded), _last(body)]
    raise LayerNotFoundError(
        f"Bottleneck of the {role}: the part that goes down to the coarsest resolution also goes "
        "up again, and another part went down before it, so either may be the encoder:\n"
        + "\n".join(f"  '{item.name}' {flow.nodes[item.node].shape}" for item in listed)
        + f"\nName the one to match: {_REMEDY}"
    )


def _shared_depth(names: list[str]) -> int:
    """Number of leading name parts that every layer shares, as in a network inside a wrapper."""
    containers = {name.rpartition(".")[0] for name in names}
    leaves = [name.split(".") for name in names if name not in containers]
    depth = 0
    while leaves and all(len(path) > depth + 1 for path in leaves):
        if len({path[depth] for path in leaves}) > 1:
            break
        depth += 1
    return depth


def _part(name: str, depth: int) -> str:
    parts = name.split(".")
    part = parts[min(depth, len(parts) - 1)]
    # numbered layers of one nn.Sequential belong together
    return "numbered" if part.isdigit() else part


def _inside(name: str, parts: set[str]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def _last(items: list[_LayerOutput]) -> _LayerOutput:
    # A block and its last layer give the same tensor; the block's name is what people know.
    return max(items, key=lambda i: (i.origin, i.select is None, -i.name.count(".")))


def _check_single(
    flow: _FlowRecorder,
    encoder: list[_LayerOutput],
    body: list[_LayerOutput],
    last: _LayerOutput,
    role: str,
) -> None:
    """Refuse to choose among branches of which neither depends on the other."""
    before = _ancestors(flow.nodes, [last.node])
    # Elsewhere, what depends on the encoder is its decoder; what does not is a second network.
    encoded = {item.node for item in encoder}
    second = [item for item in body if not encoded & _ancestors(flow.nodes, [item.node])]
    apart = [item for item in (*encoder, *second) if item.origin not in before]
    if apart:
        same = [[other for other in apart if other.origin == item.origin] for item in apart]
        names = dict.fromkeys([last.name, *(_last(items).name for items in same)])
        listed = "\n".join(f"  '{name}'" for name in names)
        raise LayerNotFoundError(
            f"Bottleneck of the {role}: several branches are equally coarse and independent:\n"
            f"{listed}\nName the one to match: {_REMEDY}"
        )
