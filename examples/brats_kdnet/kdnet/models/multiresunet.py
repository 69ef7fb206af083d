"""MultiResUNet in two or three dimensions (Ibtehaz and Rahman 2020)."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kdnet.models.blocks import CONVOLUTION, POOLING

Norm = Literal["instance", "batch"]

_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORMALISATION: dict[str, dict[int, type[nn.Module]]] = {
    "instance": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
}
_SHARES = (0.167, 0.333, 0.5)


@dataclass(frozen=True)
class _Layers:
    """Makes layers of a network's kind of norm and number of axes."""

    kind: Norm
    spatial_dims: int

    def norm(self, channels: int) -> nn.Module:
        return _NORMALISATION[self.kind][self.spatial_dims](channels, affine=True)

    def convolution(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, *, activation: bool = True
    ) -> nn.Sequential:
        """Convolution without bias, normalisation, optional ReLU."""
        convolution = CONVOLUTION[self.spatial_dims](
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )
        parts = OrderedDict(convolution=convolution, norm=self.norm(out_channels))
        if activation:
            parts["activation"] = nn.ReLU()
        return nn.Sequential(parts)


class MultiResBlock(nn.Module):
    """Three successive convolutions whose outputs are concatenated, and a shortcut of kernel 1."""

    def __init__(self, in_channels: int, filters: int, alpha: float, layers: _Layers) -> None:
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

    def __init__(self, in_channels: int, out_channels: int, length: int, layers: _Layers) -> None:
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
        for convolution, shortcut, norm in zip(
            self.convolutions, self.shortcuts, self.norms, strict=True
        ):
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
        _check_arguments(filters, alpha, norm, spatial_dims)
        layers = _Layers(norm, spatial_dims)
        *finer, deepest = filters
        self.encoder = nn.ModuleList()
        self.paths = nn.ModuleList()
        width = in_channels
        for i, count in enumerate(finer):
            block = MultiResBlock(width, count, alpha, layers)
            self.encoder.append(block)
            self.paths.append(ResPath(block.out_channels, count, len(finer) - i, layers))
            width = block.out_channels
        self.pool = POOLING[spatial_dims](kernel_size=2)
        self.bottleneck = MultiResBlock(width, deepest, alpha, layers)
        self.upsampling = nn.ModuleList()
        self.decoder = nn.ModuleList()
        width = self.bottleneck.out_channels
        for count in reversed(finer):
            self.upsampling.append(_TRANSPOSED[spatial_dims](width, count, kernel_size=2, stride=2))
            block = MultiResBlock(2 * count, count, alpha, layers)
            self.decoder.append(block)
            width = block.out_channels
        self.head = CONVOLUTION[spatial_dims](width, out_channels, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        self._check_size(image)
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

    def _check_size(self, image: Tensor) -> None:
        factor = 2 ** len(self.encoder)
        if any(size % factor for size in image.shape[2:]):
            raise ValueError(
                f"MultiResUNet: sizes must be multiples of {factor}, the input has "
                f"{tuple(image.shape[2:])}. Choose another grid, or fewer filters=."
            )


def _check_arguments(filters: Sequence[int], alpha: float, norm: str, spatial_dims: int) -> None:
    if spatial_dims not in CONVOLUTION:
        raise ValueError(f"MultiResUNet: spatial_dims is 2 or 3, not {spatial_dims}.")
    if norm not in _NORMALISATION:
        raise ValueError(f"MultiResUNet: norm is 'instance' or 'batch', not {norm!r}.")
    if len(filters) < 2 or int(_SHARES[0] * alpha * min(filters)) < 1:
        raise ValueError(
            f"MultiResUNet: filters needs two numbers or more, each so large that "
            f"{_SHARES[0]} * alpha * filters reaches 1; got {tuple(filters)}, alpha {alpha}."
        )
