"""Locate the bottleneck of any encoder-decoder from one forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from privdistill.exceptions import LayerNotFoundError
from privdistill.taps.names import layers

# Pooling to a fixed size gives context (squeeze-excitation, ASPP, the bins of PSP), not features.
_FIXED_POOLS = ("adaptive_avg_pool", "adaptive_max_pool", "_adaptive_avg_pool")
_REDUCTIONS = ("mean", "sum", "amax", "avg_pool", "max_pool")
# A window that covers more than this at once is no encoder's pooling.
_WIDEST_POOL = 4
_RESAMPLING = ("upsample", "_upsample", "view", "_unsafe_view", "clone", "_to_copy", "alias")


@dataclass(frozen=True)
class Location:
    """Where the bottleneck is, and what else came into question.

    Attributes:
        name: Dotted name of the layer.
        shape: Shape of its output for the example.
        candidates: Names of the other layers at the same resolution, in the order they ran.
    """

    name: str
    shape: tuple[int, ...]
    candidates: tuple[str, ...]


@dataclass
class _Node:
    """One tensor of the forward pass: how it was made, and from what."""

    operator: str
    shape: tuple[int, ...]
    parents: tuple[int, ...]
    pooled: bool


@dataclass
class _LayerOutput:
    """Output of a layer; `keeps` is set if it has the shape of the layer's input."""

    name: str
    node: int
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
        self.nodes.append(_Node(operator, shape, parents, makes_pool or inherits))

    def _collapses(self, operator: str, shape: tuple[int, ...], parents: tuple[int, ...]) -> bool:
        """Whether a reduction leaves one voxel of a map."""
        if len(shape) == self._rank and prod(shape[2:]) > 1:
            return False
        widest = max(
            (max(self.nodes[p].shape[2:]) for p in parents if self._is_map(p)),
            default=1,
        )
        return widest > (_WIDEST_POOL if "pool" in operator else 1)

    def _is_map(self, number: int) -> bool:
        return len(self.nodes[number].shape) == self._rank

    def watch(self, name: str, module: nn.Module) -> Any:
        """Return a hook that notes the node of a layer's output."""
        learns = any(True for _ in module.parameters())

        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            number, inputs = self.number(output), set(self._known(args))
            if number is not None and not self._joins(number, inputs):
                shape = self.nodes[number].shape
                keeps = any(self.nodes[item].shape == shape for item in inputs)
                self.layer_outputs.append(_LayerOutput(name, number, learns, keeps))

        return hook

    def _joins(self, number: int, inputs: set[int]) -> bool:
        """Whether a layer only joins its input to what it computed, as a skip connection does."""
        node = self.nodes[number]
        return node.operator == "cat" and bool(inputs & set(node.parents))


def locate_bottleneck(model: nn.Module, image: Tensor, *, role: str = "network") -> Location:
    """Find the last encoder output at the coarsest resolution on the path to the logits.

    One forward pass records which tensor was computed from which. Left out are global-pooling
    branches (squeeze-excitation, ASPP, PSP), layers the logits do not depend on, heads whose
    output is only resampled into logits, layers that only join a skip connection, and what a
    decoder does at that resolution before it upsamples.

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
    reached = _ancestors(flow.nodes, sources)
    # Norms and activations end a stage as well as convolutions; pooling alone does not begin one.
    outputs = [i for i in flow.layer_outputs if i.node in reached and (i.learns or i.keeps)]
    return _choose(flow, _coarsest(flow, outputs, image), _resampled(flow.nodes, sources), role)


@contextmanager
def _watched(model: nn.Module, flow: _FlowRecorder) -> Iterator[None]:
    with ExitStack() as stack:
        # Each module once: a shared layer has several names.
        known = {module: name for name, module in reversed(layers(model).items())}
        for module, name in known.items():
            handle = module.register_forward_hook(flow.watch(name, module))
            stack.callback(handle.remove)
        yield


def _ancestors(nodes: list[_Node], sources: Sequence[int]) -> set[int]:
    found: set[int] = set()
    waiting = list(sources)
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting.extend(nodes[number].parents)
    return found


def _resampled(nodes: list[_Node], sources: Sequence[int]) -> set[int]:
    """Nodes from which only resampling leads to the logits."""
    found: set[int] = set()
    waiting = list(sources)
    while waiting:
        number = waiting.pop()
        found.add(number)
        if nodes[number].operator.startswith(_RESAMPLING):
            waiting.extend(nodes[number].parents)
    return found


def _coarsest(
    flow: _FlowRecorder, outputs: list[_LayerOutput], image: Tensor
) -> list[_LayerOutput]:
    maps = [
        item
        for item in outputs
        if len(flow.nodes[item.node].shape) == image.ndim and not flow.nodes[item.node].pooled
    ]
    # Maps of one voxel are legitimate where the example is small; only pooled ones are left out.
    size = min((prod(flow.nodes[item.node].shape[2:]) for item in maps), default=0)
    if size >= prod(image.shape[2:]):
        return []
    return [item for item in maps if prod(flow.nodes[item.node].shape[2:]) == size]


def _choose(
    flow: _FlowRecorder, coarse: list[_LayerOutput], resampled: set[int], role: str
) -> Location:
    heads = {item.name for item in coarse if item.node in resampled}
    body = [item for item in coarse if not _inside(item.name, heads)]
    if not body:
        raise LayerNotFoundError(
            f"Bottleneck of the {role}: no layer has a coarser output than the input"
            f"{' outside its head' if coarse else ''}, so there is no bottleneck to find. Name a "
            "layer pair: taps={'bottleneck': Tap(teacher=..., student=...)}."
        )
    encoder = _encoder_part(flow, body)
    last = _outermost(encoder, max(item.node for item in encoder))
    _check_single(flow, encoder, last, role)
    shape = flow.nodes[last.node].shape
    names = dict.fromkeys(item.name for item in coarse if not _inside(item.name, {last.name}))
    return Location(last.name, shape, tuple(names))


def _encoder_part(flow: _FlowRecorder, body: list[_LayerOutput]) -> list[_LayerOutput]:
    """Drop what another part of the network than the encoder does at the same resolution.

    The part that reaches the coarsest resolution first belongs to the encoder. A later part that
    also holds finer layers is a decoder or a head; one that lives at this resolution only is a
    bottleneck of its own.
    """
    depth = _shared_depth([item.name for item in flow.layer_outputs if item.learns])
    first = _part(body[0].name, depth)
    size = prod(flow.nodes[body[0].node].shape[2:])
    finer = {
        _part(item.name, depth)
        for item in flow.layer_outputs
        if item.learns and prod(flow.nodes[item.node].shape[2:]) > size
    }
    parts = [(_part(item.name, depth), item) for item in body]
    return [item for part, item in parts if part == first or part not in finer]


def _shared_depth(names: list[str]) -> int:
    """Number of leading name parts that every layer shares, as in a network inside a wrapper."""
    leaves = [name.split(".") for name in names]
    longest = [path for path in leaves if len(path) > 1]
    depth = 0
    while longest and all(len(path) > depth + 1 for path in longest):
        if len({path[depth] for path in longest}) > 1:
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


def _outermost(items: list[_LayerOutput], node: int) -> _LayerOutput:
    # A block and its last layer give the same tensor; the block's name is what people know.
    same = [item for item in items if item.node == node]
    return min(same, key=lambda item: item.name.count("."))


def _check_single(
    flow: _FlowRecorder, encoder: list[_LayerOutput], last: _LayerOutput, role: str
) -> None:
    before = _ancestors(flow.nodes, [last.node])
    apart = list(dict.fromkeys(item.name for item in encoder if item.node not in before))
    if apart:
        listed = "\n".join(f"  '{name}'" for name in [last.name, *apart])
        raise LayerNotFoundError(
            f"Bottleneck of the {role}: several branches are equally coarse and independent:\n"
            f"{listed}\nName the one to match: "
            "taps={'bottleneck': Tap(teacher=..., student=...)}."
        )
