"""MultiResUNet in two or three dimensions (Ibtehaz and Rahman 2020)."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from kdnet.models.blocks import CONVOLUTION, POOLING, check_widths

Norm = Literal["instance", "batch"]

_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORMALISATION: dict[str, dict[int, Callable[..., nn.Module]]] = {
    "instance": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
}
_SHARES = (0.167, 0.333, 0.5)


class Layers:
    """Makes layers of a network's kind of norm and number of axes."""

    def __init__(self, kind: Norm, axes: int) -> None:
        self.norm = partial(_NORMALISATION[kind][axes], affine=True)
        self.plain = CONVOLUTION[axes]

    def convolution(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, *, activation: bool = True
    ) -> nn.Sequential:
        """Make a convolution without bias, normalisation, and a ReLU where it is wanted."""
        padding = kernel_size // 2
        convolution = self.plain(
            in_channels, out_channels, kernel_size, padding=padding, bias=False
        )
        parts = OrderedDict(convolution=convolution, norm=self.norm(out_channels))
        if activation:
            parts["activation"] = nn.ReLU()
        return nn.Sequential(parts)


class MultiResBlock(nn.Module):
    """Three successive convolutions whose outputs are concatenated, and a shortcut of kernel 1."""

    def __init__(self, in_channels: int, filters: int, alpha: float, layers: Layers) -> None:
        super().__init__()
        widths = [int(share * alpha * filters) for share in _SHARES]
        self.out_channels = sum(widths)
        inputs = [in_channels, *widths[:-1]]
        self.convolutions = nn.ModuleList(map(layers.convolution, inputs, widths))
        self.shortcut = layers.convolution(in_channels, self.out_channels, 1, activation=False)
        self.norm_joined = layers.norm(self.out_channels)
        self.activation = nn.ReLU()
        self.norm_output = layers.norm(self.out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Return features of three receptive fields, (B, out_channels, *spatial)."""
        shortcut = self.shortcut(features)
        outputs = []
        for convolution in self.convolutions:
            features = convolution(features)
            outputs.append(features)
        joined = self.norm_joined(torch.cat(outputs, dim=1))
        result: Tensor = self.norm_output(self.activation(joined + shortcut))
        return result


class ResPath(nn.Module):
    """Residual convolutions on a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, length: int, layers: Layers) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (length - 1)
        self.convolutions = nn.ModuleList(layers.convolution(i, out_channels) for i in inputs)
        self.shortcuts = nn.ModuleList(
            layers.convolution(i, out_channels, 1, activation=False) for i in inputs
        )
        self.norms = nn.ModuleList(layers.norm(out_channels) for _ in inputs)
        self.activation = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Return the features that the decoder concatenates."""
        parts = zip(self.convolutions, self.shortcuts, self.norms, strict=True)
        for convolution, shortcut, norm in parts:
            features = norm(self.activation(convolution(features) + shortcut(features)))
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
        alpha: float = 1.67,
        norm: Norm = "instance",
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        # The smallest share of a block's filters is one filter or more.
        check_widths("MultiResUNet", filters, spatial_dims, least=1 / (_SHARES[0] * alpha))
        if norm not in _NORMALISATION:
            raise ValueError(f"MultiResUNet: norm is 'instance' or 'batch', not {norm!r}.")
        layers = Layers(norm, spatial_dims)
        *finer, deepest = filters
        self.encoder, self.paths = nn.ModuleList(), nn.ModuleList()
        width = in_channels
        for i, count in enumerate(finer):
            block = MultiResBlock(width, count, alpha, layers)
            self.encoder.append(block)
            self.paths.append(ResPath(block.out_channels, count, len(finer) - i, layers))
            width = block.out_channels
        self.pool = POOLING[spatial_dims](kernel_size=2)
        self.bottleneck = MultiResBlock(width, deepest, alpha, layers)
        self.upsampling, self.decoder = nn.ModuleList(), nn.ModuleList()
        width = self.bottleneck.out_channels
        for count in reversed(finer):
            self.upsampling.append(_TRANSPOSED[spatial_dims](width, count, kernel_size=2, stride=2))
            block = MultiResBlock(2 * count, count, alpha, layers)
            self.decoder.append(block)
            width = block.out_channels
        self.head = CONVOLUTION[spatial_dims](width, out_channels, kernel_size=1)

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
