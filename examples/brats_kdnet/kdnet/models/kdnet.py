"""The encoder-decoder of KD-Net's Fig. 1, an adaptation of No New-Net."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from kdnet.models.blocks import (
    CONVOLUTION,
    LINEAR,
    NORMALISATION,
    POOLING,
    check_widths,
    resize_like,
)


class ConvolutionBlock(nn.Sequential):
    """Convolution of kernel 3, instance norm, leaky ReLU of slope 0.01."""

    def __init__(self, in_channels: int, out_channels: int, spatial_dims: int) -> None:
        super().__init__()
        convolution = CONVOLUTION[spatial_dims]
        self.convolution = convolution(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm = NORMALISATION[spatial_dims](out_channels, affine=True)
        self.activation = nn.LeakyReLU(0.01, inplace=True)


class EncoderLevel(nn.Sequential):
    """Two convolution blocks at one resolution."""

    def __init__(self, in_channels: int, out_channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.first = ConvolutionBlock(in_channels, out_channels, spatial_dims)
        self.second = ConvolutionBlock(out_channels, out_channels, spatial_dims)


class DecoderLevel(nn.Module):
    """Halve the channels, upsample, join the skip connection, convolve."""

    def __init__(
        self, in_channels: int, out_channels: int, *, skip: bool, spatial_dims: int
    ) -> None:
        super().__init__()
        self.skip = skip
        self.mode = LINEAR[spatial_dims]
        self.reduce = ConvolutionBlock(in_channels, out_channels, spatial_dims)
        joined = 2 * out_channels if skip else out_channels
        self.fuse = ConvolutionBlock(joined, out_channels, spatial_dims)

    def forward(self, features: Tensor, encoded: Tensor) -> Tensor:
        """Return the features at the resolution of `encoded`."""
        # The size of the encoder's features, not a factor of two, so that odd sizes work too.
        features = resize_like(self.reduce(features), encoded, self.mode)
        joined = torch.cat((encoded, features), dim=1) if self.skip else features
        return cast("Tensor", self.fuse(joined))


class KDNet(nn.Module):
    """Teacher and student of KD-Net: five resolutions, 14.49 million parameters."""

    # Source: Hu et al. 2020, arXiv:2106.09564, Fig. 1. Widths, and the convolution that halves the
    # channels before each upsampling, come from its source, No New-Net (Isensee et al. 2018).
    # `prior` is what outputs say of every voxel at first (Lin et al. 2017, arXiv:1708.02002,
    # section 3.3); the paper has none. Of `exclusive` classes the first is the background.

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (30, 60, 120, 240, 480),
        skip_connections: int | None = None,
        spatial_dims: int = 3,
        *,
        prior: float | None = None,
        exclusive: bool = False,
    ) -> None:
        super().__init__()
        levels = len(channels) - 1
        skip_connections = levels if skip_connections is None else skip_connections
        check_widths("KDNet", channels, spatial_dims)
        if not 0 <= skip_connections <= levels:
            raise ValueError(
                f"KDNet: {levels + 1} resolutions have 0 to {levels} skip connections, not "
                f"{skip_connections}."
            )
        widths = [in_channels, *channels]
        self.encoder = nn.ModuleList(
            EncoderLevel(widths[i], widths[i + 1], spatial_dims) for i in range(levels)
        )
        self.pool = POOLING[spatial_dims](kernel_size=2)
        # One block, not two: with it the count of parameters is the published one.
        self.bottleneck = ConvolutionBlock(channels[-2], channels[-1], spatial_dims)
        self.decoder = nn.ModuleList(
            DecoderLevel(
                channels[i + 1],
                channels[i],
                skip=i >= levels - skip_connections,
                spatial_dims=spatial_dims,
            )
            for i in reversed(range(levels))
        )
        self.last = ConvolutionBlock(channels[0], channels[0], spatial_dims)
        self.head = CONVOLUTION[spatial_dims](channels[0], out_channels, kernel_size=1)
        if prior is not None:
            # Regions are small, and it takes hundreds of steps to come down from a half.
            rare = cast("Tensor", self.head.bias).detach()[int(exclusive) :]
            nn.init.constant_(rare, math.log(prior) - math.log1p(-prior))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        self._check_size(image)
        encoded: list[Tensor] = []
        features = image
        for level in self.encoder:
            features = level(features)
            encoded.append(features)
            features = self.pool(features)
        features = self.bottleneck(features)
        for level in self.decoder:
            features = level(features, encoded.pop())
        return cast("Tensor", self.head(self.last(features)))

    def _check_size(self, image: Tensor) -> None:
        # Instance norm of one voxel is zero whatever the weights: refuse rather than learn nothing.
        factor = 2 ** len(self.encoder)
        deepest = [size // factor for size in image.shape[2:]]
        if min(deepest) == 0 or (self.training and max(deepest) == 1):
            raise ValueError(
                f"KDNet: an input of {tuple(image.shape[2:])} voxels leaves {tuple(deepest)} at "
                f"the bottleneck, where instance norm needs more than one voxel. Use at least "
                f"{factor} voxels along each axis and {2 * factor} along one, or fewer channels=."
            )
