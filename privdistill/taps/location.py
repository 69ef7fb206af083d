"""Locate the bottleneck of any encoder-decoder from one forward pass.

The rule gives one layer for every network, or an error that lists the candidates:

1. Only what the logits depend on counts, and of it only what is a feature map. Left out are global
   pooling, maps that only gate others, keys and values of attention, and layers that run twice.
2. The bottleneck is among the outputs at the coarsest resolution, counted in strides, not voxels.
3. The head is no bottleneck: class scores, whatever turns them into the logits, and the module
   that ends in them.
4. Nor is the decoder: a module that leads from the coarsest resolution to a finer one, the lateral
   projection that a sum with a finer one waits for, and context that is pooled and pasted beside
   the features it came from (ASPP, PSP). A module that goes down and up holds both; the rule is
   then asked of its children.
5. Of what is left, the last is the bottleneck: the end of the encoder, or a module of its own
   behind it. Where nothing finer follows, that is the last layer before the head, unless one
   module with several levels holds most of the layers: this is the encoder then.

Attribute names decide nothing but which layers belong to one module.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from privdistill.exceptions import LayerNotFoundError, ShapeMismatchError
from privdistill.step import find_heads
from privdistill.taps.layout import find_layout
from privdistill.taps.names import watched

Select = Callable[[Any, int], list[Tensor]]

# Pooling to a fixed size gives context (squeeze-excitation, ASPP, the bins of PSP), not features.
_FIXED_POOLS = ("adaptive_avg_pool", "adaptive_max_pool", "_adaptive_avg_pool")
_POOLS = ("avg_pool", "max_pool")
_REDUCTIONS = ("mean", "sum", "amax", *_POOLS)
# A window that covers more than this at once is no encoder's pooling.
_WIDEST_POOL = 4
_UPSAMPLING = ("upsample", "_upsample")
_COPIES = ("view", "_unsafe_view", "clone", "_to_copy", "alias")
_RESHAPING = (*_COPIES, "permute", "transpose", "expand", "slice", "unsqueeze", "squeeze")
_REARRANGING = (*_RESHAPING, "pixel_shuffle")
_LINEAR = ("addmm", "mm", "bmm", "linear")
# What cuts or pads at the border leaves the resolution as it is.
_BORDERS = ("slice", "constant_pad", "reflection_pad", "replication_pad", "split", "cat", "index")
# Strides that differ by less belong to one level: odd sizes are rounded on the way down and up.
_ONE_LEVEL = 0.75
_MOST_LISTED = 8
_REMEDY = "taps={'bottleneck': Tap(teacher=..., student=...)}."


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
    """One tensor of the forward pass: how it was made, and from what.

    `grid` is empty for what is no feature map of the image: vectors, windows, weights. `base` and
    `stride` are the size and the stride (input voxels per voxel) of the last map up to here.
    `window` is how many voxels a learned layer reads at once, negative if it is transposed; 0 for
    operators without weights.
    """

    number: int
    operator: str
    shape: tuple[int, ...]
    parents: tuple["_Node", ...]
    pooled: bool
    window: int
    channels: int
    grid: tuple[int, ...]
    base: tuple[int, ...]
    stride: float

    @property
    def origin(self) -> "_Node":
        """The node before it was only reshaped."""
        node = self
        while node.operator.startswith(_RESHAPING):
            node = node.parents[0]
        return node


@dataclass(eq=False)
class _LayerOutput:
    """Output of a layer that may have weights.

    `learns` is set if they made it, and `keeps` if it has the shape of the layer's input.
    """

    name: str
    select: int | str | None
    node: _Node
    weighs: bool
    learns: bool
    keeps: bool


_Outputs = list[_LayerOutput]
_Nodes = set[_Node]


class _FlowRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record which tensor was computed from which, below autograd and without gradients."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs: _Outputs = []
        self._nodes = WeakIdKeyDictionary()
        self._numbers = count()
        self._rank = image.ndim
        self._batch, self._spatial = image.shape[0], tuple(image.shape[2:])
        self._add(image, "input", (), ())

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
                self._add(leaf, func.overloadpacket.__name__, parents, args)
        return result

    def nodes(self, values: Any) -> list[_Node]:
        """Return the nodes of all tensors in a value that depend on the input."""
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return [self._nodes[tensor] for tensor in tensors if tensor in self._nodes]

    def _add(
        self, tensor: Tensor, operator: str, parents: tuple[_Node, ...], args: tuple[Any, ...]
    ) -> None:
        shape = tuple(tensor.shape)
        features = shape[:1] == (self._batch,) and tensor.is_floating_point()
        layout = find_layout(shape, self._spatial) if features else None
        is_map = layout is not None and (layout.kind != "tokens" or prod(layout.grid) > 1)
        grid = layout.grid if layout and is_map else ()
        channels = shape[1] if layout and layout.kind == "map" else shape[-1] if shape else 0
        # Global context stays global until it meets a feature map again.
        inherits = bool(parents) and all(parent.pooled for parent in parents)
        pooled = inherits or self._pools(operator, shape, parents)
        window = int(operator.startswith(_LINEAR))
        if operator == "convolution":
            window = prod(args[1].shape[2:]) * (-1 if args[6] else 1)
        base, stride = grid, 1.0
        if parents:
            # What stood longest has the least rounding in its stride.
            same = [parent for parent in parents if grid and parent.grid == grid]
            before = min(same or parents[:1], key=lambda parent: parent.number)
            base = grid or before.base
            stride = before.stride * _zoom(operator, args, before.base, base)
        self._nodes[tensor] = _Node(
            next(self._numbers), operator, shape, parents, pooled, window, channels, grid,
            base, stride,
        )  # fmt: skip

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
        weighs = any(True for _ in module.parameters())

        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            inputs = self.nodes(args)
            shapes = {node.shape for node in inputs}
            for select, value in _entries(output):
                for node in self.nodes(value) if isinstance(value, Tensor) else ():
                    # What is only resampled was learned at a coarser resolution.
                    learns = weighs and not node.operator.startswith(_UPSAMPLING)
                    # A layer may only join its input to what it computed: a skip connection.
                    if node.operator != "cat" or not set(inputs) & set(node.parents):
                        keeps = node.shape in shapes
                        found = _LayerOutput(name, select, node, weighs, learns, keeps)
                        self.outputs.append(found)

        return hook


def _zoom(
    operator: str, args: tuple[Any, ...], before: tuple[int, ...], after: tuple[int, ...]
) -> float:
    """By how much an operator raises the stride: as it was told, else as the sizes say."""
    if operator == "convolution":
        wide = args[1].ndim - 2
        steps = prod(list(args[3]) * (wide // len(args[3])))
        return 1 / steps if args[6] else steps
    if operator.startswith(_POOLS):
        window, *given = [[n] * len(before) if isinstance(n, int) else n for n in args[1:3]]
        return float(prod(given[0] if given and given[0] else window))
    if operator == "slice":
        return float(args[4]) if len(args) > 4 and after != before else 1.0
    if operator.startswith(_BORDERS) or not (before and after):
        return 1.0
    return prod(before) / prod(after)


def _entries(output: Any) -> list[tuple[int | str | None, Any]]:
    if isinstance(output, Mapping):
        return list(output.items())
    return list(enumerate(output)) if isinstance(output, tuple | list) else [(None, output)]


def locate_bottleneck(
    model: nn.Module, image: Tensor, select: Select = find_heads, *, role: str = "network"
) -> Location:
    """Find the last encoder output at the coarsest resolution on the path to the logits.

    Args:
        model: The network, uncompiled, in the mode in which its forward is to be read; call
            under `torch.no_grad()`.
        image: Its input, `(B, C, *spatial)`; the values do not matter.
        select: Function from the network's output and the number of spatial axes to its heads.
            Where it finds none, all that the network returns counts.
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
        output = model(image)
        try:
            heads = select(output, image.ndim - 2)
        except ShapeMismatchError:
            heads = []
        logits = _main(flow.nodes(heads)) or flow.nodes(output)
    reached = _ancestors(logits, _features)
    runs = Counter((item.name, item.select) for item in flow.outputs)
    # What runs several times gives no one output.
    once = [i for i in flow.outputs if i.node in reached and runs[i.name, i.select] == 1]
    maps = [item for item in once if item.node.grid and not item.node.pooled]
    # Norms and activations end a stage as well as convolutions; pooling alone begins none.
    stages = [item for item in maps if item.learns or item.keeps]
    deepest = max((item.node.stride for item in stages), default=1.0)
    coarse = [item for item in stages if deepest > 1 and not _finer(item.node, deepest)]
    body = _without_head(coarse, logits)
    if not body:
        raise LayerNotFoundError(
            f"Bottleneck of the {role}: no layer has a coarser output than the input"
            f"{' outside its head' if coarse else ''}, so there is no bottleneck to find. Name a "
            f"layer pair: {_REMEDY}"
        )
    encoder, how = _encoder(maps, body, reached, role)
    last = _last(encoder)
    _check_single(encoder, body, last, role)
    names = dict.fromkeys(item.name for item in coarse if not _inside(item.name, {last.name}))
    how = f"{how}, {prod(last.node.grid)} voxels"
    return Location(last.name, last.node.shape, tuple(names), how, last.select)


def _main(heads: list[_Node]) -> list[_Node]:
    """The head that depends on most of the network, among those as fine as the first."""
    fine = [head for head in heads if head.shape[2:] == heads[0].shape[2:]]
    return [max(fine, key=lambda head: len(_ancestors([head], _parents)))] if fine else []


def _ancestors(sources: Iterable[_Node], parents: Callable[[_Node], Iterable[_Node]]) -> _Nodes:
    found: _Nodes = set()
    waiting = list(sources)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(parents(node))
    return found


def _parents(node: _Node) -> tuple[_Node, ...]:
    return node.parents


def _behind(sources: _Nodes, reached: _Nodes) -> _Nodes:
    """The nodes that depend on any of the sources."""
    found: _Nodes = set()
    for node in sorted(reached, key=lambda node: node.number):
        if any(parent in sources or parent in found for parent in node.parents):
            found.add(node)
    return found


def _finer(node: _Node, stride: float) -> bool:
    return node.stride <= _ONE_LEVEL * stride


# 1. What counts


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


# 3. The head


def _without_head(coarse: _Outputs, logits: list[_Node]) -> _Outputs:
    """Drop class scores and the modules that end in them, the outermost that leave anything."""
    classes = {node.channels for node in logits}

    def scores(node: _Node) -> Sequence[_Node]:
        if node.operator.startswith(_REARRANGING):
            return node.parents
        if node.window > 0:
            return ()
        return [parent for parent in node.parents if parent.channels in classes]

    found = _ancestors(logits, scores)
    heads = sorted({i.name for i in coarse if i.node in found}, key=lambda name: name.count("."))
    for outermost in range(len(heads) + 1):
        left = [i for i in coarse if not _inside(i.name, set(heads[outermost:]))]
        left = [item for item in left if item.node not in found]
        if left:
            return left
    return []


# 4. The decoder


def _encoder(maps: _Outputs, body: _Outputs, reached: _Nodes, role: str) -> tuple[_Outputs, str]:
    """Return what is no decoder among the coarsest outputs, and how that was told."""
    finer = [i for i in maps if i.weighs and _finer(i.node, body[0].node.stride)]
    behind = _behind({item.node for item in body}, reached)
    up = [item for item in finer if item.node in behind]
    module, level = "", body
    while True:
        first = _child(level[0].name, module)
        own = [item for item in level if _inside(item.name, {first})]
        deeper = [item for item in own if item.name != first]
        rises = _rises(up, own, first)
        only = all(_inside(item.name, {first}) for item in maps if _inside(item.name, {module}))
        if not deeper or not (rises or only):
            break
        before = [i for i in finer if i.node not in behind and not _inside(i.name, {first})]
        ends = all(_inside(item.name, {first}) for item in up)
        _check_encoder(before, own, rises, ends, role)
        module, level = first, deeper
    risen = {_child(i.name, module) for i in up if _inside(i.name, {module})} - {first, module}
    kept = [item for item in level if _child(item.name, module) not in risen]
    kept += _exchanging(level, risen, finer, up)
    for drop in (_laterals(kept, reached), _context(reached)):
        kept = [item for item in kept if item.node.origin not in drop] or kept
    how = "last encoder output at the coarsest resolution"
    if any(item.learns for item in up):
        return kept, how
    inside = [item for item in kept if _inside(item.name, {first})]
    if inside and _is_encoder(first, maps, kept):
        return inside, how
    return kept, "last layer before the head, as nothing finer follows"


def _child(name: str, module: str) -> str:
    """The child of a module that a layer inside it belongs to."""
    depth = module.count(".") + 1 if module else 0
    return ".".join(name.split(".")[: depth + 1])


def _rises(up: _Outputs, own: _Outputs, module: str) -> _Outputs:
    """Finer outputs of a module behind its coarse ones, unless it comes down to these again."""
    before = _ancestors([_last(own).node], _parents)
    rises = [item for item in up if _inside(item.name, {module})]
    return [] if any(item.node in before for item in rises) else rises


def _exchanging(level: _Outputs, risen: set[str], finer: _Outputs, up: _Outputs) -> _Outputs:
    """What children that lead up also lead down to, as the last stage of an HRNet does."""
    upward = {item.node for item in up}
    found: _Outputs = []
    for child in risen:
        inside = [item for item in level if _inside(item.name, {child})]
        sources = {_last(inside).node} if inside else set()
        sources = _ancestors(sources, lambda n: [p for p in n.parents if p not in upward])
        downward = [i for i in finer if i.node in sources and _inside(i.name, {child})]
        found += [item for item in inside if downward and item.node in sources]
    return found


def _check_encoder(before: _Outputs, own: _Outputs, rises: _Outputs, ends: bool, role: str) -> None:
    """Refuse to choose where a decoder goes on to a coarser resolution than its encoder."""
    deepest = max((item.node.stride for item in before), default=1.0)
    if deepest > 1 and rises and (ends or any(_finer(item.node, deepest) for item in rises)):
        encoded = [item for item in before if not _finer(item.node, deepest)]
        raise _undecided(
            role,
            "the part that goes down to the coarsest resolution also goes up again, and another "
            "part went down before it, so either may be the encoder",
            [_last(encoded), _last(own)],
        )


def _laterals(kept: _Outputs, reached: _Nodes) -> _Nodes:
    """Projections that a sum or join with finer ones waits for, and what depends on them."""
    children: dict[_Node, list[_Node]] = {}
    for node in reached:
        for parent in node.parents:
            children.setdefault(parent, []).append(node)

    def lateral(node: _Node) -> bool:
        resampled = _ancestors([node], lambda n: [c for c in children.get(n, ()) if _resamples(c)])
        wide = [n for n in resampled if n.operator.startswith(_UPSAMPLING)]
        for join in {child for n in wide for child in children.get(n, ())}:
            # Only what is added up has to be projected to one width; skips are joined as they are.
            project = {"add": _projected, "cat": _made}.get(join.operator.rstrip("_"))
            if project is None or project(node).window != 1:
                continue
            others = _ancestors(join.parents, lambda n: n.parents if _resamples(n) else ())
            if any(project(n).window == 1 and _finer(n, node.stride) for n in others):
                return True
        return False

    laterals = [item.node for item in kept if lateral(item.node)]
    found = {n for node in laterals for n in (node, _projected(node))}
    return found | _behind(found, reached)


def _made(node: _Node) -> _Node:
    return node


def _projected(node: _Node) -> _Node:
    """The learned layer before norms and activations."""
    while not node.window and len(node.parents) == 1:
        (node,) = node.parents
    return node


def _resamples(node: _Node) -> bool:
    return node.operator.startswith((*_UPSAMPLING, *_RESHAPING))


def _context(reached: _Nodes) -> _Nodes:
    """What lies behind features that are joined with a pooled copy of themselves."""
    found: _Nodes = set()
    for node in reached:
        pooled = [parent for parent in node.parents if parent.pooled]
        if node.operator == "cat" and 0 < len(pooled) < len(node.parents):
            tail = _ancestors(pooled, lambda n: [p for p in n.parents if p.pooled])
            sources = {p.origin for n in tail for p in n.parents if not p.pooled}
            found |= _behind(sources, reached)
    return found


# 5. The last of the encoder


def _is_encoder(module: str, maps: _Outputs, kept: _Outputs) -> bool:
    """Whether a module reads the image, has several levels and holds most of the layers."""
    learned = [item for item in maps if item.learns]
    inside = [item for item in learned if _inside(item.name, {module})]
    others = {item.name for item in kept if item.learns and not _inside(item.name, {module})}
    levels = {item.node.stride for item in inside}
    return inside[:1] == learned[:1] and len(levels) > 1 and len(inside) > len(others)


def _check_single(encoder: _Outputs, body: _Outputs, last: _LayerOutput, role: str) -> None:
    """Refuse to choose among branches of which neither depends on the other."""
    before = _ancestors([last.node], _parents)
    # Elsewhere, what depends on the encoder is its decoder; what does not is a second network.
    encoded = {item.node for item in encoder}
    second = [item for item in body if encoded.isdisjoint(_ancestors([item.node], _parents))]
    apart = [item for item in (*encoder, *second) if _learned_beyond(item.node, before)]
    if apart:
        same = [[i for i in apart if i.node.origin is item.node.origin] for item in apart]
        listed = [last, *map(_last, same)]
        raise _undecided(role, "several branches are equally coarse and independent", listed)


def _learned_beyond(node: _Node, before: _Nodes) -> bool:
    """Whether a node holds what was learned outside of other nodes; joining alone is no branch."""
    beyond = _ancestors([node], lambda n: () if n in before else n.parents) - before
    return any(item.window for item in beyond)


def _undecided(role: str, why: str, candidates: _Outputs) -> LayerNotFoundError:
    shapes = {item.name: item.node.shape for item in candidates}
    lines = [f"  '{name}' {shape}" for name, shape in shapes.items()]
    if len(lines) > _MOST_LISTED:
        lines[_MOST_LISTED - 1 :] = [f"  and {len(lines) - _MOST_LISTED + 1} others"]
    listed = "\n".join(lines)
    return LayerNotFoundError(
        f"Bottleneck of the {role}: {why}:\n{listed}\nName the one to match: {_REMEDY}"
    )


def _inside(name: str, modules: set[str]) -> bool:
    return any(not part or name == part or name.startswith(part + ".") for part in modules)


def _last(items: _Outputs) -> _LayerOutput:
    # A block and its last layer give the same tensor; the block's name is what people know.
    return max(items, key=lambda i: (i.node.origin.number, i.select is None, -i.name.count(".")))


# Which outputs are logits


def settle_heads(
    model: nn.Module,
    image: Tensor,
    *,
    training: bool = True,
    asked: bool = False,
    role: str = "network",
) -> Select:
    """Decide which of the equally fine tensors in a list are heads, and which is the main one.

    The main head is the one that eval mode returns, or the one that depends on most of the
    network where its class speaks of deep supervision. Beside it count those from which it goes
    on: heads of nested decoders, not those of alternative ones.

    Args:
        model: The network, uncompiled; call under `torch.no_grad()`. Its mode is left changed.
        image: Its input, `(B, C, *spatial)`.
        training: Whether the network is trained, so that its output in train mode counts.
        asked: Whether the user passed `head_weights`, so that all of them are heads.
        role: What messages call the network.

    Returns:
        Function from an output and the number of spatial axes to the heads, finest first.

    Raises:
        ShapeMismatchError: If nothing tells the main head.
    """
    alone = _paths(model.eval(), image)
    trained = _paths(model.train(), image) if training else []
    heads = max(alone, trained, key=len)
    if len(alone) == 1:
        main = [index for index, path in enumerate(heads) if path == alone[0]]
    else:
        deepest = max(map(len, heads))
        main = [index for index, path in enumerate(heads) if len(path) == deepest]
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
    others = [index for index in range(len(heads)) if index != chosen]
    if not asked:
        others = [
            i for i in others if len(heads[chosen] - heads[i]) > len(heads[i] - heads[chosen])
        ]
    return partial(find_heads, equals=(chosen, *(others if supervised else ())))


def _paths(model: nn.Module, image: Tensor) -> list[frozenset[str]]:
    """The layers with weights on the way to each of the finest tensors in a list."""
    if model.training and image.shape[0] == 1:
        # Batch norm on maps of one voxel needs more than one value per channel.
        image = torch.cat((image, image))
    flow = _FlowRecorder(image)
    with flow, watched(model, flow.watch):
        output = model(image)
        heads = find_heads(output, image.ndim - 2)
    fine = [head for head in heads if head.shape == heads[0].shape]
    reached = [_ancestors(flow.nodes(head), _parents) for head in fine]
    return [frozenset(i.name for i in flow.outputs if i.weighs and i.node in r) for r in reached]


def _speaks_of_deep_supervision(model: nn.Module) -> bool:
    texts = (
        text
        for module in model.modules()
        for text in (type(module).__doc__ or "", *vars(module), *dict(module.named_children()))
    )
    return any("supervis" in text.lower() for text in texts)
