"""Which modalities a sample has, and random subsets of them."""

from itertools import product

import torch
from torch import Tensor


def find_present(image: Tensor) -> Tensor:
    """Tell which modalities a sample has: an absent one is a channel of zeros.

    Args:
        image: (B, M, *spatial), one channel for each modality.

    Returns:
        Boolean, (B, M).

    Example:
        >>> find_present(torch.tensor([[[0.0, 0.0], [0.0, 3.0]]]))
        tensor([[False,  True]])
    """
    return image.ne(0).flatten(2).any(-1)


def draw_subset(present: Tensor) -> Tensor:
    """Draw a subset of the modalities of each sample; all that are not empty are equally likely.

    Args:
        present: Which modalities there are, boolean (B, M).

    Returns:
        Which are kept, boolean (B, M); empty only where nothing is present. Random numbers are
        those of PyTorch's generator of the device.
    """
    # The binary digits of a number from 1 to 2^k - 1 are one of the subsets of k modalities.
    subsets = 2 ** present.sum(1) - 1
    draw = torch.rand(len(present), dtype=torch.float64, device=present.device)
    number = (draw * subsets).long() + 1
    digit = (present.cumsum(1) - 1).clamp(min=0)
    return present & (number[:, None] >> digit).bitwise_and(1).bool()


def every_subset(modalities: int) -> list[tuple[bool, ...]]:
    """List the subsets of some modalities that are not empty.

    Args:
        modalities: Their number, M.

    Returns:
        2^M - 1 tuples, which say of each modality whether it is in.

    Example:
        >>> every_subset(2)
        [(False, True), (True, False), (True, True)]
    """
    return [subset for subset in product((False, True), repeat=modalities) if any(subset)]


def spread(mask: Tensor, features: Tensor) -> Tensor:
    """Give a mask of modalities the axes of their features, so that it broadcasts.

    Args:
        mask: (B, M).
        features: (B, M, C, *spatial).

    Returns:
        (B, M, 1, ..., 1).
    """
    return mask.reshape(*mask.shape, *[1] * (features.ndim - 2))
