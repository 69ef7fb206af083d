"""Which tensor was computed from which, and at which resolution, in one forward pass."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from privdistill.taps.layout import Layout, find_layout

# Pooling to a fixed size gives context (squeeze-excitation, ASPP, the bins of PSP), not features.
_FIXED_POOLS = ("adaptive_avg_pool", "adaptive_max_pool", "_adaptive_avg_pool")
_POOLS = ("avg_pool", "max_pool")
_REDUCTIONS = ("mean", "sum", "amax", *_POOLS)
# A window that covers more than this at once is no encoder's pooling.
_WIDEST_POOL = 4
_LINEAR = ("addmm", "mm", "bmm", "linear")
# What cuts or pads at the border leaves the resolution as it is.
_BORDERS = ("slice", "constant_pad", "reflection_pad", "replication_pad", "split", "cat", "index")
UPSAMPLING = ("upsample", "_upsample")
_COPIES = ("view", "_unsafe_view", "clone", "_to_copy", "alias")
RESHAPING = (*_COPIES, "permute", "transpose", "expand", "slice", "unsqueeze", "squeeze")


@dataclass(eq=False)
class Node:
    """One tensor of the forward pass: how it was made, and from what.

    `grid` is empty for what is no feature map of the image: vectors, windows, weights. `base` and
    `stride` are the size and the stride (input voxels per voxel) of the last map up to here.
    `window` is how many voxels a learned layer reads at once, negative if it is transposed; 0 for
    operators without weights.
    """

    number: int
    operator: str
    shape: tuple[int, ...]
    parents: tuple["Node", ...]
    pooled: bool
    window: int
    channels: int
    grid: tuple[int, ...]
    base: tuple[int, ...]
    stride: float

    @property
    def origin(self) -> "Node":
        """The node before it was only reshaped."""
        node = self
        while node.operator.startswith(RESHAPING):
            node = node.parents[0]
        return node


@dataclass(eq=False)
class LayerOutput:
    """Output of a layer that may have weights; `learns` is set if they made it."""

    name: str
    select: int | str | None
    node: Node
    weighs: bool
    learns: bool
    inputs: list[Node]


Outputs = list[LayerOutput]
Nodes = set[Node]


class FlowRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record which tensor was computed from which, below autograd and without gradients."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs: Outputs = []
        self._nodes = WeakIdKeyDictionary()
        self._numbers = count()
        self._rank = image.ndim
        self._batch, self.spatial = image.shape[0], tuple(image.shape[2:])
        self._add(image, "input", (), ())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Weights and constants have no node: what depends on them alone is nothing of the image.
        parents = tuple(self.nodes((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and parents:
                self._add(leaf, func.overloadpacket.__name__, parents, args)
        return result

    def nodes(self, values: Any) -> list[Node]:
        """Return the nodes of all tensors in a value that depend on the input."""
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return [self._nodes[tensor] for tensor in tensors if tensor in self._nodes]

    def _add(
        self, tensor: Tensor, operator: str, parents: tuple[Node, ...], args: tuple[Any, ...]
    ) -> None:
        shape = tuple(tensor.shape)
        # Windows of a transformer are cut along the batch and are no maps of the image.
        features = shape[:1] == (self._batch,) and tensor.is_floating_point()
        layout = self._layout(operator, shape, parents) if features else None
        is_map = layout is not None and (layout.kind != "tokens" or prod(layout.grid) > 1)
        grid = layout.grid if layout and is_map else ()
        channels = shape[1] if layout and layout.kind == "map" else shape[-1] if shape else 0
        # Global context stays global until it meets a feature map again.
        inherits = bool(parents) and all(parent.pooled for parent in parents)
        pooled = inherits or self._pools(operator, shape, parents)
        if operator.startswith("_fft"):
            # Frequencies are no places: each is of the whole image, until they are turned back.
            pooled = operator == "_fft_r2c" or (operator == "_fft_c2c" and bool(args[3]))
        window = int(operator.startswith(_LINEAR))
        if operator == "convolution":
            window = prod(args[1].shape[2:]) * (-1 if args[6] else 1)
        base, stride = grid, 1.0
        if parents:
            # What stood longest has the least rounding in its stride.
            same = [parent for parent in parents if grid and parent.grid == grid]
            before = min(same or parents[:1], key=lambda parent: parent.number)
            base, stride = before.base, before.stride
            # What lies between two maps is measured by them.
            if grid:
                base, stride = grid, stride * _zoom(operator, args, before.base, grid)
        self._nodes[tensor] = Node(
            next(self._numbers), operator, shape, parents, pooled, window, channels, grid,
            base, stride,
        )  # fmt: skip

    def _layout(
        self, operator: str, shape: tuple[int, ...], parents: tuple[Node, ...]
    ) -> Layout | None:
        """How features are laid out: what is cut or padded stays as it was, whatever its size."""
        if operator.startswith(_BORDERS) and parents and len(parents[0].shape) == len(shape):
            whole, grid = parents[0].shape, parents[0].grid
            if whole[1:-1] == grid != whole[2:]:
                return Layout("channels_last", shape[1:-1])
        known = [node.base for node in parents if node.base]
        layout = find_layout(shape, self.spatial, known)
        # Tokens that are no whole grid may be queries, or several levels in a row.
        return None if layout and layout.prefix and layout.grid not in known else layout

    def _pools(self, operator: str, shape: tuple[int, ...], parents: tuple[Node, ...]) -> bool:
        """Whether an operator pools to a fixed size, or reduces a map to one voxel."""
        if operator.startswith(_FIXED_POOLS):
            return True
        if _gathers(operator, shape, parents):
            return True
        several = len(shape) == self._rank and prod(shape[2:]) > 1
        if several or not operator.startswith(_REDUCTIONS):
            return False
        maps = [node.shape for node in parents if len(node.shape) == self._rank]
        widest = max((max(shape[2:]) for shape in maps), default=1)
        return widest > (_WIDEST_POOL if "pool" in operator else 1)

    def watch(self, name: str, module: nn.Module) -> Any:
        """Return a hook that notes the node of a layer's output."""
        weighs = any(True for _ in module.parameters())

        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            inputs = self.nodes(args)
            for select, value in _entries(output):
                for node in self.nodes(value) if isinstance(value, Tensor) else ():
                    # What is only resampled was learned at a coarser resolution.
                    learns = weighs and not node.operator.startswith(UPSAMPLING)
                    # A layer may only join its input to what it computed: a skip connection.
                    if node.operator != "cat" or not set(inputs) & set(node.parents):
                        found = LayerOutput(name, select, node, weighs, learns, inputs)
                        self.outputs.append(found)

        return hook


def _gathers(operator: str, shape: tuple[int, ...], parents: tuple[Node, ...]) -> bool:
    """Whether attention reduces a map to one vector: one query, or one weighted mean."""
    if operator != "bmm" or len(parents) < 2 or parents[0].shape[-1] == 1:
        return False
    weights = ["softmax" in parent.origin.operator for parent in parents]
    return (weights[0] and shape[-2] == 1) or (weights[1] and shape[-1] == 1)


def _zoom(
    operator: str, args: tuple[Any, ...], before: tuple[int, ...], after: tuple[int, ...]
) -> float:
    """By how much an operator raises the stride: as it was told, else as the sizes say."""
    if operator == "convolution":
        wide = args[1].ndim - 2
        steps = prod(list(args[3]) * (wide // len(args[3])))
        return 1 / steps if args[6] else float(steps)
    if operator.startswith(_POOLS):
        window, *given = [[n] * len(before) if isinstance(n, int) else n for n in args[1:3]]
        return float(prod(given[0] if given and given[0] else window))
    if operator == "slice":
        return float(args[4]) if len(args) > 4 and after != before else 1.0
    if operator.startswith(_BORDERS) or not before:
        return 1.0
    return float(prod(before) / prod(after))


def _entries(output: Any) -> list[tuple[int | str | None, Any]]:
    if isinstance(output, Mapping):
        return list(output.items())
    return list(enumerate(output)) if isinstance(output, tuple | list) else [(None, output)]


def ancestors(sources: Iterable[Node], parents: Callable[[Node], Iterable[Node]]) -> Nodes:
    """The nodes from which the sources can be reached, these included, along chosen parents."""
    found: Nodes = set()
    waiting = list(sources)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(parents(node))
    return found


def parents_of(node: Node) -> tuple[Node, ...]:
    """All parents of a node, for `ancestors`."""
    return node.parents


def behind(sources: Nodes, reached: Nodes) -> Nodes:
    """The nodes that depend on any of the sources."""
    found: Nodes = set()
    for node in sorted(reached, key=lambda node: node.number):
        if any(parent in sources or parent in found for parent in node.parents):
            found.add(node)
    return found
