"""U-HeMIS: one encoder for each modality, fused by mean and variance."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from kdnet.models.blocks import (
    CONVOLUTION,
    LINEAR,
    POOLING,
    InstanceNorm,
    at_least_float32,
    check_image,
    check_widths,
    encode,
    find_present,
    resize_like,
    spread,
)


def hetero_modal_block(axes: int, *widths: int) -> nn.Sequential:
    """Make instance norms, leaky ReLUs of slope 0.01 and convolutions of kernel 3."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        convolution = CONVOLUTION[axes](inputs, outputs, kernel_size=3, padding=1)
        layers += [InstanceNorm(inputs), nn.LeakyReLU(0.01), convolution]
    return nn.Sequential(*layers)


class ModalityEncoder(nn.Module):
    """The encoder of one modality."""

    def __init__(self, axes: int, channels: Sequence[int], outputs: Sequence[int]) -> None:
        super().__init__()
        first = CONVOLUTION[axes](1, channels[0], kernel_size=1)
        self.stem = nn.Sequential(first, nn.LeakyReLU(0.01))
        # A level passes on what the next one takes in, which may be half its width.
        inputs = (channels[0], *outputs)
        widths = zip(inputs, channels, outputs, strict=False)
        self.levels = nn.ModuleList(hetero_modal_block(axes, *own) for own in widths)
        self.pool = POOLING[axes](kernel_size=2)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Encode one modality."""
        features = self.stem(image)
        encoded: list[Tensor] = []
        for level in self.levels:
            features = level(self.pool(features) if encoded else features)
            encoded.append(features)
        return encoded


class HeteroModalDecoder(nn.Module):
    """From the fused features of all resolutions to an image."""

    def __init__(
        self, axes: int, channels: Sequence[int], inputs: Sequence[int], out_channels: int
    ) -> None:
        super().__init__()
        self.mode = LINEAR[axes]
        self.levels = nn.ModuleList()
        below = inputs[-1]
        for width, skip in zip(channels[-2::-1], inputs[-2::-1], strict=True):
            self.levels.append(hetero_modal_block(axes, below + skip, width, width // 2))
            below = width // 2
        self.head = CONVOLUTION[axes](below, out_channels, kernel_size=1)

    def forward(self, fused: Sequence[Tensor]) -> Tensor:
        """Decode."""
        features = fused[-1]
        for level, skip in zip(self.levels, fused[-2::-1], strict=True):
            finer = resize_like(features, skip, self.mode)
            features = level(torch.cat((finer, skip), dim=1))
        return cast("Tensor", self.head(features))


class Moments(nn.Module):
    """Mean and variance over the modalities that are there."""

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        """Fuse."""
        features, mask = at_least_float32(features), spread(present, features)
        count = mask.sum(1).clamp(min=1)
        # A choice, not a product: an absent modality has no gradient, whatever its features are.
        mean = torch.where(mask, features, 0).sum(1) / count
        deviations = torch.where(mask, features - mean[:, None], 0)
        return torch.cat((mean, deviations.square().sum(1) / count), dim=1)


class HeMIS(nn.Module):
    """U-HeMIS: segments whatever modalities a sample has."""

    # Source: Dorent et al. 2019, arXiv:1907.11150, who put HeMIS (Havaei et al. 2016,
    # arXiv:1607.05194) into a U-Net; widths and layers as in their published configuration. The
    # variance is that of the population, as theirs; HeMIS divides by one less. Scale and shift of
    # norms, biases, and the slope of the leaky ReLU are those of the other networks here.

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (8, 16, 32, 64),
        *,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        check_widths("HeMIS", channels, spatial_dims, even=True)
        halves = [width // 2 for width in channels]
        self.encoders = nn.ModuleList(
            ModalityEncoder(spatial_dims, channels, halves) for _ in range(in_channels)
        )
        self.fuse = Moments()
        # A layer of its own, so that the fused bottleneck can be tapped.
        self.bottleneck = Moments()
        self.decoder = HeteroModalDecoder(spatial_dims, channels, channels, out_channels)
        self.levels = len(channels)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        check_image("HeMIS", image, len(self.encoders), self.levels)
        present = find_present(image)
        *finer, deepest = encode(self.encoders, image)
        fused = [self.fuse(features, present) for features in finer]
        return cast("Tensor", self.decoder([*fused, self.bottleneck(deepest, present)]))
