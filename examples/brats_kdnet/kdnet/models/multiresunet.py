"""MultiResUNet in two or three dimensions (Ibtehaz and Rahman 2020)."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from kdnet.models.blocks import CONVOLUTION, NORMALISATION, POOLING, check_widths

_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
#: Filters of the three convolutions of a block, as shares of its number times 1.67.
_SHARES = tuple(1.67 * share for share in (0.167, 0.333, 0.5))


def norm(axes: int, channels: int) -> nn.Module:
    """Make an instance norm; the original's is over batches, too small in 3-D."""
    return NORMALISATION[axes](channels, affine=True)


def convolution(axes: int, inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    """Make a convolution without bias, and normalisation, with ReLU unless it is a shortcut."""
    layer = CONVOLUTION[axes](inputs, outputs, kernel, padding=kernel // 2, bias=False)
    parts = OrderedDict(convolution=layer, norm=norm(axes, outputs))
    # A shortcut is added to what it goes around, and ReLU follows the sum.
    if kernel > 1:
        parts["activation"] = nn.ReLU()
    return nn.Sequential(parts)


class MultiResBlock(nn.Module):
    """Three successive convolutions whose outputs are concatenated, and a shortcut of kernel 1."""

    def __init__(self, axes: int, in_channels: int, filters: int) -> None:
        super().__init__()
        widths = [in_channels, *(int(share * filters) for share in _SHARES)]
        self.out_channels = sum(widths[1:])
        self.convolutions = nn.ModuleList(convolution(axes, a, b) for a, b in pairwise(widths))
        self.shortcut = convolution(axes, in_channels, self.out_channels, 1)
        self.norm_joined = norm(axes, self.out_channels)
        self.activation = nn.ReLU()
        self.norm_output = norm(axes, self.out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Return features of three receptive fields, (B, out_channels, *spatial)."""
        shortcut = self.shortcut(features)
        outputs = []
        for layer in self.convolutions:
            features = layer(features)
            outputs.append(features)
        joined = self.norm_joined(torch.cat(outputs, dim=1))
        result: Tensor = self.norm_output(self.activation(joined + shortcut))
        return result


class ResPath(nn.Module):
    """Residual convolutions on a skip connection."""

    def __init__(self, axes: int, in_channels: int, out_channels: int, length: int) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (length - 1)
        self.convolutions = nn.ModuleList(convolution(axes, i, out_channels) for i in inputs)
        self.shortcuts = nn.ModuleList(convolution(axes, i, out_channels, 1) for i in inputs)
        self.norms = nn.ModuleList(norm(axes, out_channels) for _ in inputs)
        self.activation = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Return the features that the decoder concatenates."""
        parts = zip(self.convolutions, self.shortcuts, self.norms, strict=True)
        for layer, shortcut, normalise in parts:
            features = normalise(self.activation(layer(features) + shortcut(features)))
        return features


class MultiResUNet(nn.Module):
    """U-Net of MultiRes blocks with residual paths as skip connections."""

    # Source: Ibtehaz and Rahman 2020, Neural Networks 121. The output has as many channels as there
    # are classes and no activation, where the original has one sigmoid channel.

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        filters: Sequence[int] = (32, 64, 128, 256, 512),
        *,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        check_widths("MultiResUNet", filters, spatial_dims, least=1 / _SHARES[0])
        axes = spatial_dims
        *finer, deepest = filters
        self.encoder, self.paths = nn.ModuleList(), nn.ModuleList()
        width = in_channels
        for i, count in enumerate(finer):
            block = MultiResBlock(axes, width, count)
            self.encoder.append(block)
            # Features of fine resolutions are further from the decoder's: their paths are longer.
            self.paths.append(ResPath(axes, block.out_channels, count, len(finer) - i))
            width = block.out_channels
        self.pool = POOLING[axes](kernel_size=2)
        self.bottleneck = MultiResBlock(axes, width, deepest)
        self.upsampling, self.decoder = nn.ModuleList(), nn.ModuleList()
        width = self.bottleneck.out_channels
        for count in reversed(finer):
            self.upsampling.append(_TRANSPOSED[axes](width, count, kernel_size=2, stride=2))
            block = MultiResBlock(axes, 2 * count, count)
            self.decoder.append(block)
            width = block.out_channels
        self.head = CONVOLUTION[axes](width, out_channels, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        factor = 2 ** len(self.encoder)
        # Transposed convolutions double sizes, which must meet those of the skip connections.
        if any(size % factor for size in image.shape[2:]):
            raise ValueError(
                f"MultiResUNet: sizes must be multiples of {factor}, the input has "
                f"{tuple(image.shape[2:])}. Choose another grid, or fewer filters=."
            )
        skips: list[Tensor] = []
        features = image
        for block, path in zip(self.encoder, self.paths, strict=True):
            features = block(features)
            skips.append(path(features))
            features = self.pool(features)
        features = self.bottleneck(features)
        for upsample, block in zip(self.upsampling, self.decoder, strict=True):
            features = block(torch.cat((skips.pop(), upsample(features)), dim=1))
        logits: Tensor = self.head(features)
        return logits
