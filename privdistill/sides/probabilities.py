"""Tell a network that gives probabilities from one that gives logits, which every loss reads."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from privdistill.exceptions import ObjectiveError
from privdistill.taps.flow import FlowRecorder, Node, Nodes, ancestors
from privdistill.taps.location import HeadFinder

_SOFTMAX = ("softmax", "_softmax", "_safe_softmax")
_SQUASHING = ("sigmoid", "hardsigmoid", *_SOFTMAX)
_NORMALISING = ("log_softmax", "_log_softmax", *_SOFTMAX)


def check_logits(model: nn.Module, image: Tensor, select: HeadFinder, role: str) -> None:
    """Refuse a network that ends in a sigmoid or softmax; the image holds large random values.

    It gives probabilities if it stays in [0, 1] and, besides, comes out of a sigmoid or softmax,
    sums to one over channels, or reaches from 0 to 1.
    """
    flow = FlowRecorder(image)
    with flow:
        heads = select(model(image), image.ndim - 2)
    # All heads, as an auxiliary one may have an activation that the main one lacks.
    inside = filter(in_unit_interval, heads)
    if any(_looks_squashed(head) or _is_squashed(flow.nodes(head)) for head in inside):
        raise ObjectiveError(
            f"The {role} returns probabilities: for large random inputs of shape "
            f"{tuple(image.shape)}, too, every value lies in [0, 1]. Losses read logits, and would "
            "take every voxel for foreground. Leave its last sigmoid or softmax out, for instance "
            "by network.activation = nn.Identity(), or undo it by a hook, network."
            "register_forward_hook(lambda *call: call[-1].logit(eps=1e-6)), for a softmax "
            "call[-1].clamp_min(1e-6).log(). If both networks end so, "
            "select_logits=lambda output: output.logit(eps=1e-6) does the same."
        )


def check_no_logarithms(model: nn.Module, image: Tensor, select: HeadFinder, role: str) -> None:
    """Refuse a log-softmax under a sigmoid, by which nothing is ever more probable than a half."""

    def normalises(node: Node) -> bool:
        operators = node.operator, *(parent.operator for parent in node.parents)
        return node.operator in _NORMALISING or "logsumexp" in operators

    flow = FlowRecorder(image)
    with flow:
        head = select(model(image), image.ndim - 2)[0]
    # Biases that expect equal shares of each region sum to one as well.
    if may_be_logarithms(head) and _came_from(flow.nodes(head), normalises):
        raise ObjectiveError(
            f"The {role} returns log-probabilities of exclusive classes, which a sigmoid takes "
            "for logits that are never positive. Pass activation='softmax', or leave its last "
            "log-softmax out."
        )


def may_be_logarithms(head: Tensor) -> bool:
    """Whether all values may be logarithms of probabilities that sum to one."""
    several = head.shape[1] > 1 and not head.is_meta
    return several and bool(head.float().logsumexp(1).abs().max() < 0.02)


def in_unit_interval(head: Tensor) -> bool:
    """Whether all values may be probabilities."""
    return not head.is_meta and bool(((head >= 0) & (head <= 1)).all())


def _looks_squashed(head: Tensor) -> bool:
    """Whether values in [0, 1] reach from end to end, or sum to one, and vary at all."""
    by_channel = head.float().transpose(0, 1).flatten(1)
    # A head whose weights are zero gives its biases, whatever they are.
    varies = torch.any(by_channel.amin(1) < by_channel.amax(1))
    ends = (by_channel.min() < 0.01) & (by_channel.max() > 0.99)
    one = (by_channel.sum(0) - 1).abs().max() < 0.02
    return bool(varies & (ends | one if len(by_channel) > 1 else ends))


def _is_squashed(nodes: list[Node]) -> bool:
    """Whether what a sigmoid or softmax gave was only resampled or joined since."""

    def squashes(node: Node) -> bool:
        return node.operator.removesuffix("_") in _SQUASHING

    # A logarithm makes logits of them again.
    return _came_from(nodes, squashes, but=("log",))


def _came_from(nodes: list[Node], made: Callable[[Node], bool], but: tuple[str, ...] = ()) -> bool:
    """Whether what some operators made was only resampled or joined since, and by no other kind."""
    since: Nodes = ancestors(nodes, lambda node: () if made(node) else node.parents)
    # Behind a layer with weights they are features.
    return all(
        made(n) or (n.parents and not n.window and not n.operator.startswith(but)) for n in since
    )
