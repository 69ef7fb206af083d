"""Which modalities a sample has, and random subsets of them."""

from itertools import product

import torch
from torch import Tensor


def find_present(image: Tensor) -> Tensor:
    """Tell which modalities a sample has: an absent one is a channel of zeros."""
    return image.ne(0).flatten(2).any(-1)


def draw_subset(present: Tensor) -> Tensor:
    """Draw a subset of the modalities of each sample; all that are not empty are equally likely."""
    # The binary digits of a number from 1 to 2^k - 1 are one of the subsets of k modalities.
    subsets = 2 ** present.sum(1) - 1
    draw = torch.rand(len(present), dtype=torch.float64, device=present.device)
    number = (draw * subsets).long() + 1
    digit = (present.cumsum(1) - 1).clamp(min=0)
    return present & (number[:, None] >> digit).bitwise_and(1).bool()


def every_subset(modalities: int) -> list[tuple[bool, ...]]:
    """List the subsets of some modalities that are not empty."""
    return [subset for subset in product((False, True), repeat=modalities) if any(subset)]


def spread(mask: Tensor, features: Tensor) -> Tensor:
    """Give a mask of modalities the axes of their features, so that it broadcasts."""
    return mask.reshape(*mask.shape, *[1] * (features.ndim - 2))
