"""What networks share: layers, modalities that are there, and checks of widths and images."""

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}
POOLING = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
NORMALISATION = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
LINEAR = {2: "bilinear", 3: "trilinear"}


class InstanceNorm(nn.Module):
    """Instance norm with scale and shift that lets maps of a single voxel pass."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, features: Tensor) -> Tensor:
        """Return the normalised features."""
        # A single voxel minus its own mean is zero, whatever it was.
        if prod(features.shape[2:]) > 1:
            return F.instance_norm(features, weight=self.weight, bias=self.bias)
        shape = (1, -1, *[1] * (features.ndim - 2))
        return features * self.weight.view(shape) + self.bias.view(shape)


def resize_like(features: Tensor, like: Tensor, mode: str) -> Tensor:
    """Bring features to the resolution of others, so that odd sizes work too."""
    corners = None if mode == "nearest" else False
    return F.interpolate(features, size=like.shape[2:], mode=mode, align_corners=corners)


def at_least_float32(features: Tensor) -> Tensor:
    """Return features in float32, or float64 if they are: for squares and exponentials."""
    return features if features.dtype == torch.float64 else features.float()


def check_widths(
    owner: str, widths: Sequence[int], spatial_dims: int, *, least: float = 1, even: bool = False
) -> None:
    """Refuse widths and dimensions that a network cannot be built with."""
    if spatial_dims not in CONVOLUTION:
        raise ValueError(f"{owner}: spatial_dims is 2 or 3, not {spatial_dims}.")
    if len(widths) < 2 or min(widths) < least or (even and any(width % 2 for width in widths)):
        raise ValueError(
            f"{owner}: expected two {'even ' * even}widths or more, finest first, of {least:g} at "
            f"least, found {tuple(widths)}."
        )


def check_image(owner: str, image: Tensor, modalities: int, levels: int) -> None:
    """Refuse an image that a network cannot be run on."""
    factor = 2 ** (levels - 1)
    if image.shape[1] != modalities or min(image.shape[2:]) < factor:
        raise ValueError(
            f"{owner}: an input of {tuple(image.shape)}; expected (B, {modalities}, *spatial) with "
            f"{factor} voxels or more along each axis. Use a larger grid, or fewer channels=."
        )


def encode(encoders: nn.ModuleList, image: Tensor) -> list[Tensor]:
    """Run each modality through its own encoder: (B, M, C, *spatial) for each resolution."""
    parts = zip(encoders, image.chunk(len(encoders), dim=1), strict=True)
    levels = zip(*(encoder(modality) for encoder, modality in parts), strict=True)
    return [torch.stack(level, dim=1) for level in levels]


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
