"""Sums behind Dice and cross-entropy, in one pass over the logits that keeps no map."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from privdistill.losses import functional as ops
from privdistill.losses.functional import Activation, Binarisation

_Recipe = tuple[Activation, bool, float | None, Binarisation, bool]
_Place = tuple[slice, slice, slice]
_Slope = Callable[[Tensor], Tensor]

# Logits in a block: what a core's cache holds, and what keeps an accelerator busy.
_IN_CACHE = 2**17
_ON_DEVICE = 2**22


@dataclass(frozen=True)
class Comparison:
    """What logits are compared with; soft and binary targets are made block by block.

    Args:
        source: Target in [0, 1], or with a temperature the logits behind it, `(B, C, *spatial)`.
        temperature: Divides the source before the activation, dimensionless, > 0; None takes the
            source as the target.
        binarisation: How the target of the cross-entropy is made: "soft" is Dice's own.
        binary_source: Logits that are binarised, if not the source.
        mask: 1 where a voxel counts, else 0, `(B, 1 or C, *spatial)`; None where all count.
    """

    source: Tensor
    temperature: float | None = None
    binarisation: Binarisation = "soft"
    binary_source: Tensor | None = None
    mask: Tensor | None = None


class Sums(NamedTuple):
    """Sums over the voxels that count, each `(B, C)`, in float32 (float64 for such logits).

    Attributes:
        overlap: `sum(p t)`.
        size: `sum(p) + sum(t)`, or of their squares.
        cross_entropy: `sum(-h log p - (1 - h) log(1 - p))`, in nats, >= 0.
    """

    overlap: Tensor
    size: Tensor
    cross_entropy: Tensor


def dice_bce_sums(
    logits: Tensor, comparison: Comparison, activation: Activation, *, squared: bool = False
) -> Sums:
    """Sum, over space, what Dice and binary cross-entropy are made of.

    With p the probabilities, t the target of Dice and h that of the cross-entropy. For the
    softmax each channel is compared with its own target as if it were a class of its own, in log
    space, so that a probability that rounds to 0 or 1 costs what it must and no more.

    Args:
        logits: `(B, C, *spatial)`.
        comparison: Targets of the same shape, and mask; no gradient flows into them.
        activation: "softmax" or "sigmoid".
        squared: Sum the squares of p and t to the size.

    Returns:
        Sums by sample and channel.

    Example:
        >>> sums = dice_bce_sums(torch.zeros(1, 2, 3), Comparison(torch.ones(1, 2, 3)), "softmax")
        >>> sums.overlap, sums.cross_entropy
        (tensor([[1.5000, 1.5000]]), tensor([[2.0794, 2.0794]]))

    Source:
        Hu et al. 2020, arXiv:2106.09564, eqs. (2) and (4), which apply BCE to softmax outputs.
    """
    flat = []
    for values in (comparison.source, comparison.binary_source, comparison.mask):
        plain = None if values is None else values.detach().flatten(2)
        # No graph may keep what was made under inference_mode; the compiler makes no such tensors.
        if plain is not None and not torch.compiler.is_compiling() and plain.is_inference():
            plain = plain.clone()
        flat.append(plain)
    clean = ops.known_finite(logits, comparison.source)
    recipe = (activation, squared, comparison.temperature, comparison.binarisation, clean)
    sums: Tensor = _DiceBCESums.apply(recipe, logits.flatten(2), *flat)
    return Sums(*sums.unbind())


class _DiceBCESums(torch.autograd.Function):
    """`(3, B, C)`, with a gradient of its own: through the operators a dozen maps are kept.

    A block is read from memory once, whatever is made of it; the gradient makes it anew. It can be
    taken once: a second derivative, and `torch.func`, are errors of torch.
    """

    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, *tensors: Any) -> Tensor:
        # Inputs alone, which others keep anyway; blocks are made anew.
        ctx.save_for_backward(*tensors)
        ctx.recipe = recipe
        samples = []
        for places in _blocks(tensors[0]):
            sums = []
            for place in places:
                sums.append(_sums(_block(tensors, recipe, place)))  # noqa: PERF401
            # Sums of sums, as one long one would lose digits.
            samples.append(torch.stack(sums).sum(0) if len(sums) > 1 else sums[0])
        return torch.cat(samples, dim=1) if len(samples) > 1 else samples[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        maps = ctx.saved_tensors
        gradient = torch.empty_like(maps[0])
        for place in chain.from_iterable(_blocks(maps[0])):
            block = _block(maps, ctx.recipe, place)
            gradient[place] = _gradient(block, slopes[:, place[0], :, None])
        # Targets and masks are constants.
        return None, gradient, None, None, None


def _blocks(logits: Tensor) -> list[list[_Place]]:
    """Places of the blocks of logits `(B, C, voxels)`, those of the same samples together."""
    batch, channels, voxels = logits.shape
    elements = _ON_DEVICE
    if torch.compiler.is_compiling():
        elements = logits.numel()
    elif logits.device.type == "cpu":
        elements = _IN_CACHE * torch.get_num_threads()
    count = max(1, elements // (channels * voxels))
    length = max(1, elements // channels)
    blocks: list[list[_Place]] = []
    for first in range(0, batch, count):
        blocks.append([])
        for start in range(0, voxels, length):
            place = (slice(first, first + count), slice(None), slice(start, start + length))
            blocks[-1].append(place)
    return blocks


class _Block(NamedTuple):
    """One block in float32, each `(b, C, voxels)`."""

    logits: Tensor
    target: Tensor
    binary: Tensor
    mask: Tensor | None
    activation: Activation
    squared: bool


def _block(maps: Sequence[Any], recipe: _Recipe, place: _Place) -> _Block:
    """Cut a block out of the whole maps, and make its targets."""
    whole, targets, binary_source, mask = maps
    activation, squared, temperature, rule, clean = recipe
    dtype = torch.float64 if whole.dtype == torch.float64 else torch.float32
    logits = _rows(whole, place, dtype, clean)
    source = target = _rows(targets, place, dtype, clean)
    if temperature is not None:
        tempered = source / temperature
        target = tempered.softmax(1) if activation == "softmax" else tempered.sigmoid()
    # Dice's own target, unless a hard one is asked for.
    binary = target
    if rule != "soft":
        hard = source if binary_source is None else _rows(binary_source, place, dtype, clean)
        binary = ops.largest(hard) if rule == "argmax" else (hard > 0).to(dtype)
    mask = None if mask is None else _rows(mask, place, dtype, True)
    return _Block(logits, target, binary, mask, activation, squared)


def _rows(values: Tensor, place: _Place, dtype: torch.dtype, clean: bool) -> Tensor:
    values = values[place].to(dtype)
    if not clean:
        values = torch.nan_to_num(values, nan=math.nan, posinf=ops.LARGEST, neginf=-ops.LARGEST)
    # Rows of channels_last tensors are strewn over memory, and arithmetic on them is slow; a
    # compiler lays them out by itself.
    if torch.compiler.is_compiling() or values.stride(2) == 1:
        return values
    return values.contiguous()


def _sums(block: _Block) -> Tensor:
    """Overlap, size and cross-entropy, `(3, b, C)`."""
    costs = _softmax_costs if block.activation == "softmax" else _sigmoid_costs
    p, cost = costs(block.logits, block.binary)
    target = block.target
    if block.mask is not None:
        p, target, cost = p * block.mask, target * block.mask, cost * block.mask
    overlap = (p * target).sum(2)
    if block.squared:
        p, target = p.square(), target.square()
    return torch.stack([overlap, p.sum(2) + target.sum(2), cost.sum(2)])


def _gradient(block: _Block, slopes: Tensor) -> Tensor:
    """What slopes in the sums, `(3, b, C, 1)`, are in the logits."""
    masked = slopes if block.mask is None else slopes * block.mask
    of_overlap, of_size, of_cost = masked.unbind()
    gradient = _softmax_gradient if block.activation == "softmax" else _sigmoid_gradient

    def of_p(p: Tensor) -> Tensor:
        return (of_size * (2 * p) if block.squared else of_size) + of_overlap * block.target

    return gradient(block.logits, block.binary, of_p, of_cost)


def _sigmoid_costs(logits: Tensor, binary: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, and the cross-entropy of each."""
    # This is log(1 + exp(-|z|)); `log1p` and `softplus` take eight times as long as `log`.
    rest = logits.abs().sigmoid_().log_()
    return logits.sigmoid(), logits.relu().sub_(logits * binary).sub_(rest)


def _sigmoid_gradient(logits: Tensor, binary: Tensor, of_p: _Slope, of_cost: Tensor) -> Tensor:
    p = logits.sigmoid()
    return (p - binary).mul_(of_cost).addcmul_(of_p(p), p * (1 - p))


class _Softmax(NamedTuple):
    """A softmax of which `1 - p` keeps its digits, also of the one class that takes nearly all.

    Attributes:
        p: Probabilities.
        low: The same, and 0 for a class that is above all others.
        won: 1 for a class that is above all others, else 0.
        relative: `exp(z_c - second)`, and 0 for that class.
        others: The sum of `relative`, without one of several highest classes.
        highest: The highest logit, `(b, 1, voxels)`.
        gap: The second highest logit less the highest, `(b, 1, voxels)`.
        total: `sum exp(z - highest)`.
    """

    p: Tensor
    low: Tensor
    won: Tensor
    relative: Tensor
    others: Tensor
    highest: Tensor
    gap: Tensor
    total: Tensor


def _softmax(logits: Tensor) -> _Softmax:
    # The two highest of the channels, equal where several are highest.
    highest, other, *more = logits.chunk(logits.shape[1], dim=1)
    highest, second = torch.maximum(highest, other), torch.minimum(highest, other)
    for row in more:
        second = torch.maximum(second, torch.minimum(highest, row))
        highest = torch.maximum(highest, row)
    above = logits - second
    # Arithmetic with zeros and ones, as masks and choices take several times as long.
    won = above.clamp_min(0).sign_()
    relative = above.clamp_max_(0).exp_()
    others = relative.sum(1, keepdim=True).sub_(1)
    relative.sub_(won)
    gap = second - highest
    ratio = gap.exp()
    total = (ratio * others).add_(1)
    low = relative * (ratio / total)
    p = torch.addcmul(low, won, 1 / total)
    return _Softmax(p, low, won, relative, others, highest, gap, total)


def _softmax_costs(logits: Tensor, binary: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, and the cross-entropy of each."""
    soft = _softmax(logits)
    log_total = soft.total.log()
    # In this order an offset that all logits share costs no digits.
    log_p = (logits - soft.highest).sub_(log_total)
    of_winner = soft.others.log().add_(soft.gap).sub_(log_total)
    log_rest = (1 - soft.low).log_().addcmul_(soft.won, of_winner)
    return soft.p, log_rest.lerp_(log_p, binary).neg_()


def _softmax_gradient(logits: Tensor, binary: Tensor, of_p: _Slope, of_cost: Tensor) -> Tensor:
    soft = _softmax(logits)
    positive = of_cost * binary
    negative = of_cost - positive
    slope = of_p(soft.p)
    # d log(1 - p_k) / d z_j is -p_k where j is k, and p_k p_j / (1 - p_k) elsewhere; of the winner
    # k, p_j / (1 - p_k) is the softmax over the others, which is never more than one.
    odds = (negative * soft.low).div_(1 - soft.low)
    of_winner = negative.mul_(soft.won).sum(1, keepdim=True).div_(soft.total)
    shared = (positive - odds).sub_(slope * soft.p).sum(1, keepdim=True)
    result = slope.add_(shared).mul_(soft.p).add_(odds).sub_(positive)
    result.addcmul_(soft.won, of_winner)
    return result.sub_(soft.relative.mul_(of_winner / soft.others))
