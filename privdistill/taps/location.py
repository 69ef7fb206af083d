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
   then asked of its children. A module that gives the coarsest level back with finer ones joined,
   like a stage of an HRNet, is encoder, and of it only what leads to that level counts. A module
   or list of layers that gets levels which were exchanged before, or the only two, transforms
   the coarsest and gives finer ones alone, may be the last such stage or a decoder: this is an
   error.
5. Of what is left, the last is the bottleneck: the end of the encoder, or a module of its own
   behind it. Where nothing finer follows, that is the last layer before the head, unless one
   module with several levels holds most of the layers: this is the encoder then.

Attribute names decide nothing but which layers belong to one module.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn

from privdistill.exceptions import LayerNotFoundError, ShapeMismatchError
from privdistill.taps.flow import (
    RESHAPING,
    UPSAMPLING,
    FlowRecorder,
    LayerOutput,
    Node,
    Nodes,
    Outputs,
    ancestors,
    behind,
    parents_of,
)
from privdistill.taps.names import watched

# Finds the logits in what a network returned, given the number of spatial axes.
HeadFinder = Callable[[Any, int], list[Tensor]]

_REARRANGING = (*RESHAPING, "pixel_shuffle")
# Strides that differ by less belong to one level: odd sizes are rounded on the way down and up.
_ONE_LEVEL = 0.75
_MOST_LISTED = 8
_COARSEST = "last encoder output at the coarsest resolution"
_REMEDY = "taps={'bottleneck': Tap(teacher=..., student=...)}."


class Location(NamedTuple):
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


def locate_bottleneck(
    model: nn.Module, image: Tensor, find_heads: HeadFinder, *, role: str = "network"
) -> Location:
    """Find the last encoder output at the coarsest resolution on the path to the logits.

    Args:
        model: The network, uncompiled, in the mode in which its forward is to be read; call
            under `torch.no_grad()`.
        image: Its input, `(B, C, *spatial)`; the values do not matter.
        find_heads: Function from the network's output and the number of spatial axes to its heads.
            Where it finds none, all that the network returns counts.
        role: What messages call the network.

    Returns:
        The layer and the other candidates.

    Raises:
        LayerNotFoundError: If the network never downsamples, two branches that do not depend on
            each other are equally coarse, or encoder and decoder cannot be told apart; the
            message lists the candidates.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Upsample(16), nn.Conv2d(4, 2, 1))
        >>> locate_bottleneck(net, torch.zeros(1, 1, 16, 16), lambda output, axes: [output]).name
        '0'

    Source:
        Hu et al. 2020, arXiv:2106.09564, section 2.2: the latent representation between encoder
        and decoder. The paper does not say which layer of Fig. 1 that is; the rule here is ours.
    """
    flow, heads, unread = FlowRecorder(image), [], None
    with flow, watched(model, flow.watch):
        output = model(image)
        try:
            heads = find_heads(output, image.ndim - 2)
        except ShapeMismatchError as error:
            unread = error
        # Of a network that returns features alone, all of them are what counts.
    try:
        return _locate(flow, _main(flow.nodes(heads)) or flow.nodes(output), role)
    except LayerNotFoundError as error:
        # Queries and masks have no one bottleneck; logits made of them may.
        raise LayerNotFoundError(f"{unread}\n{error}") if unread else error from unread


def _locate(flow: FlowRecorder, logits: list[Node], role: str) -> Location:
    """Find the bottleneck among the layers that some outputs depend on."""
    reached = ancestors(logits, _features)
    runs = Counter((item.name, item.select) for item in flow.outputs)
    # What runs several times gives no one output.
    once = [i for i in flow.outputs if i.node in reached and runs[i.name, i.select] == 1]
    maps = [item for item in once if item.node.grid and not item.node.pooled]
    # Norms and activations end a stage as well as convolutions; pooling alone begins none.
    stages = [i for i in maps if i.learns or i.node.shape in {n.shape for n in i.inputs}]
    deepest = max((item.node.stride for item in stages), default=1.0)
    coarse = [item for item in stages if deepest > 1 and not _finer(item.node, deepest)]
    # Where an encoder ends in a pooling, what comes behind it is the decoder.
    pools = [n for n in reached if n.operator.startswith(("max_pool", "avg_pool")) and not n.pooled]
    ends = {n for n in pools if deepest <= _ONE_LEVEL * n.stride}
    decoded = behind(ends, reached)
    coarse = [item for item in coarse if item.node not in decoded] or coarse
    exchanging = _exchanging(flow.outputs, deepest)
    for name, way in exchanging.items():
        coarse = [i for i in coarse if i.node in way or not _inside(i.name, {name})]
    # Class scores at the coarsest resolution carry as little as the logits do.
    body = _without_head(coarse, logits)
    if not body:
        raise LayerNotFoundError(
            f"Bottleneck of the {role}: no layer has a coarser output than the input, runs only "
            "once and is no head, so there is none to find. What goes through NumPy or a subclass "
            f"of Tensor is not followed. Name a layer pair: {_REMEDY}"
        )
    _check_stages(maps, body, exchanging, reached, role)
    encoder, how = _encoder(maps, body, reached, exchanging, role)
    last = _last(encoder)
    _check_single(encoder, body, last, role)
    names = dict.fromkeys(item.name for item in coarse if not _inside(item.name, {last.name}))
    how = f"{how}, {prod(last.node.grid)} voxels"
    return Location(last.name, last.node.shape, tuple(names), how, last.select)


def _main(heads: list[Node]) -> list[Node]:
    """The head that depends on most of the network, among those as fine as the first."""
    fine = [head for head in heads if head.shape[2:] == heads[0].shape[2:]]
    return [max(fine, key=lambda head: len(ancestors([head], parents_of)))] if fine else []


def _finer(node: Node, stride: float) -> bool:
    return node.stride <= _ONE_LEVEL * stride


# 1. What counts


def _features(node: Node) -> Sequence[Node]:
    """Parents of a node without gates: maps that were upsampled only to multiply another one.

    Attention has none: its keys and values may be coarser than the features that pass it by.
    """
    if _attends(node):
        return []
    if not node.operator.startswith("mul"):
        return node.parents
    features = [item for item in node.parents if not item.operator.startswith(UPSAMPLING)]
    return features or node.parents


def _attends(node: Node) -> bool:
    weights = [parent.origin.operator for parent in node.parents]
    return node.operator.startswith("_scaled_dot_product") or (
        node.operator == "bmm" and any("softmax" in operator for operator in weights)
    )


def _exchanging(outputs: Outputs, deepest: float) -> dict[str, Nodes]:
    """Modules that give the coarsest level back with finer ones joined, and what leads to it."""
    found: dict[str, Nodes] = {}
    coarsest = [item for item in outputs if item.node.grid and not _finer(item.node, deepest)]
    for item in coarsest:
        inside = [i.node for i in outputs if _inside(i.name, {item.name})]
        finer = {node for node in inside if node.grid and _finer(node, deepest)}
        if finer and item.node.grid in [node.grid for node in item.inputs]:
            way = ancestors([item.node], parents_of)
            if not finer.isdisjoint(way):
                found.setdefault(item.name, set()).update(way)
    return found


# 3. The head


def _without_head(coarse: Outputs, logits: list[Node]) -> Outputs:
    """Drop class scores and the modules that end in them, the outermost that leave anything."""
    classes = {node.channels for node in logits}

    def scores(node: Node) -> Sequence[Node]:
        if node.operator.startswith(_REARRANGING):
            return node.parents
        if node.window > 0:
            return ()
        return [parent for parent in node.parents if parent.channels in classes]

    found = ancestors(logits, scores)
    heads = sorted({i.name for i in coarse if i.node in found}, key=lambda name: name.count("."))
    # A head that holds everything coarse holds the bottleneck too: then only its inner parts go.
    for outermost in range(len(heads) + 1):
        left = [i for i in coarse if not _inside(i.name, set(heads[outermost:]))]
        left = [item for item in left if item.node not in found]
        if left:
            return left
    return []


# 4. The decoder


def _encoder(
    maps: Outputs, body: Outputs, reached: Nodes, exchanging: dict[str, Nodes], role: str
) -> tuple[Outputs, str]:
    """Return what is no decoder among the coarsest outputs, and how that was told."""
    finer = [i for i in maps if i.weighs and _finer(i.node, body[0].node.stride)]
    below = behind({item.node for item in body}, reached)
    up = [item for item in finer if item.node in below]
    before = [item for item in finer if item.node not in below]
    module, level = _descend(maps, body, up, before, role)
    first = _child(level[0].name, module)
    kept, keeping = level, set(exchanging)
    for child in {_child(item.name, module) for item in level} - {first, module}:
        risen = [i for i in up if _inside(i.name, {child}) and not _inside(i.name, keeping)]
        way = ancestors([item.node for item in risen], parents_of)
        kept = [i for i in kept if i.node not in way or not _inside(i.name, {child})]
    # Neither may leave nothing: a network of lateral projections alone has a bottleneck, too.
    for drop in (_laterals(kept, reached), _context(reached)):
        kept = [item for item in kept if item.node.origin not in drop] or kept
    inside = [item for item in kept if _inside(item.name, {first})]
    if any(item.learns for item in up):
        return kept, _COARSEST
    if inside and _is_encoder(first, maps, kept):
        return inside, _COARSEST
    return kept, "last layer before the head, as nothing finer follows"


def _descend(
    maps: Outputs, body: Outputs, up: Outputs, before: Outputs, role: str
) -> tuple[str, Outputs]:
    """Return the innermost module that holds encoder and decoder, and its coarsest outputs."""
    module, level = "", body
    while True:
        first = _child(level[0].name, module)
        own = [item for item in level if _inside(item.name, {first})]
        deeper = [item for item in own if item.name != first]
        rises = _rises(up, before, own, first)
        only = all(_inside(item.name, {first}) for item in maps if _inside(item.name, {module}))
        # Only a module that goes down and up, or holds all, holds both encoder and decoder.
        if not deeper or not (rises or only):
            return module, level
        ends = all(_inside(item.name, {first}) for item in up)
        outside = [item for item in before if not _inside(item.name, {first})]
        _check_encoder(outside, own, rises, ends, role)
        module, level = first, deeper


def _child(name: str, module: str) -> str:
    """The child of a module that a layer inside it belongs to."""
    depth = module.count(".") + 1 if module else 0
    return ".".join(name.split(".")[: depth + 1])


def _rises(up: Outputs, before: Outputs, own: Outputs, module: str) -> Outputs:
    """Finer outputs of a module behind its coarse ones, unless it comes down to these again."""
    start, sources = own[0].node.number, ancestors([_last(own).node], parents_of)
    again = [i for i in (*up, *before) if i.node.number > start and i.node in sources]
    return [] if again else [item for item in up if _inside(item.name, {module})]


def _check_encoder(before: Outputs, own: Outputs, rises: Outputs, ends: bool, role: str) -> None:
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


def _check_stages(
    maps: Outputs, body: Outputs, exchanging: dict[str, Nodes], reached: Nodes, role: str
) -> None:
    """Refuse to choose where what may be a stage joins its levels into finer ones alone."""
    names = {item.name for item in body}
    # A list of layers that its parent runs is a part as well.
    parts = {part for name in names for part in accumulate(name.split("."), "{}.{}".format)}
    for part in sorted(part for part in parts if not _inside(part, names.union(exchanging))):
        if _may_be_stage(part, maps, body, set(exchanging), reached):
            why = (
                f"'{part}' joins levels into finer ones alone, so it may be the last stage of an "
                "encoder that exchanges levels, or a decoder"
            )
            listed = [i for i in body if not _inside(i.name, names - {i.name})]
            raise _undecided(role, why, listed[::-1])


def _may_be_stage(
    part: str, maps: Outputs, body: Outputs, exchanging: set[str], reached: Nodes
) -> bool:
    """Whether a part transforms its coarsest level, and got levels that an encoder exchanges."""
    first = body[0]
    inside = [item for item in maps if _inside(item.name, {part})]
    own = [item for item in body if _inside(item.name, {part})]
    finer = [item for item in inside if _finer(item.node, first.node.stride)]
    ends = [item.node for item in finer if not _inside(item.name, exchanging)]
    way = ancestors(ends, parents_of)
    if not any(item.node in way and _transforms(item) for item in own):
        return False
    given, later = _given(part, inside, reached)
    deep = {node for node in given if not _finer(node, first.node.stride)}
    # What an encoder made, and was not just given, is decoded outside of it.
    made = {i.node for i in maps if _inside(first.name, {i.name}) and i.node not in i.inputs}
    # Two levels were never exchanged before: each has a layer, and nothing passes by.
    single = [item for item in inside if item.weighs and len(item.inputs) == 1]
    kept = {n for i in single for n in i.inputs if i.node.shape == n.shape}
    whole = kept >= given and way.issuperset(i.node for i in own) and reached <= later | way
    two = whole and len(given) == 2
    return any(two or _exchanged(fine, level) for fine in given - deep - made for level in deep)


def _transforms(item: LayerOutput) -> bool:
    """Whether a layer does more than to project features to another width."""
    keeps = any(item.node.shape == node.shape for node in item.inputs)
    return item.weighs and (keeps or item.node.window > 1)


def _given(part: str, inside: Outputs, reached: Nodes) -> tuple[Nodes, Nodes]:
    """The maps that a part is given, and all that depends on its layers."""
    made = {item.node for item in inside if item.node not in item.inputs}
    later = made | behind(made, reached)
    ran = [item for item in inside if item.name == part]
    given = {node for item in ran or inside for node in item.inputs if node.grid} - later
    # Its parent may resample a map on the way to the part's first layer.
    return {node for node in given if ran or not _resamples(node)}, later


def _exchanged(fine: Node, deep: Node) -> bool:
    """Whether one map was joined with what came up, and the other with what came down."""
    above, below = ancestors([fine], parents_of), ancestors([deep], parents_of)
    # Levels that were all made of one, like those of a transformer, came up alone.
    level = ancestors([fine], lambda n: [p for p in n.parents if not _finer(fine, p.stride)])
    joined = any(not node.parents for node in level)
    risen = any(_finer(n, p.stride) for n in above - below for p in n.parents if not p.pooled)
    return (
        joined
        and risen
        and any(_finer(p, n.stride) for n in below - above for p in n.parents if not n.pooled)
    )


def _laterals(kept: Outputs, reached: Nodes) -> Nodes:
    """Projections that a sum or join with finer ones waits for, and what depends on them."""
    children: dict[Node, list[Node]] = {}
    for node in reached:
        for parent in node.parents:
            children.setdefault(parent, []).append(node)

    def lateral(node: Node) -> bool:
        resampled = ancestors([node], lambda n: [c for c in children.get(n, ()) if _resamples(c)])
        wide = [n for n in resampled if n.operator.startswith(UPSAMPLING)]
        for join in {child for n in wide for child in children.get(n, ())}:
            # Only what is added up has to be projected to one width; skips are joined as they are.
            project = {"add": _projected, "cat": _made}.get(join.operator.rstrip("_"))
            if project is None or project(node).window != 1:
                continue
            others = ancestors(join.parents, lambda n: n.parents if _resamples(n) else ())
            # The other side of the join, not the way from this very layer to it.
            others -= resampled
            if any(project(n).window == 1 and _finer(n, node.stride) for n in others):
                return True
        return False

    laterals = [item.node for item in kept if lateral(item.node)]
    found = {n for node in laterals for n in (node, _projected(node))}
    return found | behind(found, reached)


def _made(node: Node) -> Node:
    return node


def _projected(node: Node) -> Node:
    """The learned layer before norms and activations."""
    while not node.window and len(node.parents) == 1:
        (node,) = node.parents
    return node


def _resamples(node: Node) -> bool:
    return node.operator.startswith((*UPSAMPLING, *RESHAPING))


def _context(reached: Nodes) -> Nodes:
    """What lies behind features that are joined with a pooled copy of themselves."""
    found: Nodes = set()
    for node in reached:
        pooled = [parent for parent in node.parents if parent.pooled]
        if node.operator == "cat" and 0 < len(pooled) < len(node.parents):
            tail = ancestors(pooled, lambda n: [p for p in n.parents if p.pooled])
            sources = {p.origin for n in tail for p in n.parents if not p.pooled}
            found |= behind(sources, reached)
    return found


# 5. The last of the encoder


def _is_encoder(module: str, maps: Outputs, kept: Outputs) -> bool:
    """Whether a module reads the image, has several levels and holds most of the layers."""
    learned = [item for item in maps if item.learns]
    inside = [item for item in learned if _inside(item.name, {module})]
    others = {item.name for item in kept if item.learns and not _inside(item.name, {module})}
    levels = {item.node.stride for item in inside}
    return inside[:1] == learned[:1] and len(levels) > 1 and len(inside) > len(others)


def _check_single(encoder: Outputs, body: Outputs, last: LayerOutput, role: str) -> None:
    """Refuse to choose among branches of which neither depends on the other."""
    before = ancestors([last.node], parents_of)
    # Elsewhere, what depends on the encoder is its decoder; what does not is a second network.
    encoded = {item.node for item in encoder}
    second = [item for item in body if encoded.isdisjoint(ancestors([item.node], parents_of))]
    apart = [item for item in (*encoder, *second) if _learned_beyond(item.node, before)]
    if apart:
        same = [[i for i in apart if i.node.origin is item.node.origin] for item in apart]
        # The last may lead to a finer level alone, and what it was made of end the encoder.
        source = [item for item in encoder if item.node.origin in before - {last.node.origin}]
        listed = [_last(items) for items in ([last], source, *same) if items]
        raise _undecided(role, "several branches are equally coarse and independent", listed)


def _learned_beyond(node: Node, before: Nodes) -> bool:
    """Whether a node holds what was learned outside of other nodes; joining alone is no branch."""
    beyond = ancestors([node], lambda n: () if n in before else n.parents) - before
    return any(item.window for item in beyond)


def _undecided(role: str, why: str, candidates: Outputs) -> LayerNotFoundError:
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


def _last(items: Outputs) -> LayerOutput:
    # A block and its last layer give the same tensor; the block's name is what people know.
    return max(items, key=lambda i: (i.node.origin.number, i.select is None, -i.name.count(".")))
