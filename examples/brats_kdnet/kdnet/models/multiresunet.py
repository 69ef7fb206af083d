"""MultiResUNet in two or three dimensions (Ibtehaz and Rahman 2020)."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

Norm = Literal["instance", "batch"]

_CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOLING = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_NORMALISATION: dict[str, dict[int, type[nn.Module]]] = {
    "instance": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
}
_SHARES = (0.167, 0.333, 0.5)


def _normalisation(channels: int, norm: Norm, spatial_dims: int) -> nn.Module:
    return _NORMALISATION[norm][spatial_dims](channels, affine=True)


class _Convolution(nn.Sequential):
    """Convolution without bias, normalisation, optional ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        norm: Norm,
        spatial_dims: int,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.convolution = _CONVOLUTION[spatial_dims](
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )
        self.norm = _normalisation(out_channels, norm, spatial_dims)
        if activation:
            self.activation = nn.ReLU()


class MultiResBlock(nn.Module):
    """Three successive convolutions whose outputs are concatenated, and a shortcut of kernel 1."""

    def __init__(
        self, in_channels: int, filters: int, *, alpha: float, norm: Norm, spatial_dims: int
    ) -> None:
        super().__init__()
        widths = [int(share * alpha * filters) for share in _SHARES]
        self.out_channels = sum(widths)
        inputs = [in_channels, *widths[:-1]]
        self.convolutions = nn.ModuleList(
            _Convolution(i, o, kernel_size=3, norm=norm, spatial_dims=spatial_dims)
            for i, o in zip(inputs, widths, strict=True)
        )
        self.shortcut = _Convolution(
            in_channels,
            self.out_channels,
            kernel_size=1,
            norm=norm,
            spatial_dims=spatial_dims,
            activation=False,
        )
        self.norm_joined = _normalisation(self.out_channels, norm, spatial_dims)
        self.activation = nn.ReLU()
        self.norm_output = _normalisation(self.out_channels, norm, spatial_dims)

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

    def __init__(
        self, in_channels: int, out_channels: int, *, length: int, norm: Norm, spatial_dims: int
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (length - 1)
        self.convolutions, self.shortcuts = (
            nn.ModuleList(
                _Convolution(
                    i,
                    out_channels,
                    kernel_size=kernel_size,
                    norm=norm,
                    spatial_dims=spatial_dims,
                    activation=activation,
                )
                for i in inputs
            )
            for kernel_size, activation in ((3, True), (1, False))
        )
        self.norms = nn.ModuleList(_normalisation(out_channels, norm, spatial_dims) for _ in inputs)
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
        block_of = partial(MultiResBlock, alpha=alpha, norm=norm, spatial_dims=spatial_dims)
        path_of = partial(ResPath, norm=norm, spatial_dims=spatial_dims)
        levels = len(filters) - 1
        self.encoder = nn.ModuleList()
        self.paths = nn.ModuleList()
        width = in_channels
        for i in range(levels):
            block = block_of(width, filters[i])
            self.encoder.append(block)
            self.paths.append(path_of(block.out_channels, filters[i], length=levels - i))
            width = block.out_channels
        self.pool = _POOLING[spatial_dims](kernel_size=2)
        self.bottleneck = block_of(width, filters[-1])
        self.upsampling = nn.ModuleList()
        self.decoder = nn.ModuleList()
        width = self.bottleneck.out_channels
        for i in reversed(range(levels)):
            self.upsampling.append(
                _TRANSPOSED[spatial_dims](width, filters[i], kernel_size=2, stride=2)
            )
            block = block_of(2 * filters[i], filters[i])
            self.decoder.append(block)
            width = block.out_channels
        self.head = _CONVOLUTION[spatial_dims](width, out_channels, kernel_size=1)

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
    if spatial_dims not in _CONVOLUTION:
        raise ValueError(f"MultiResUNet: spatial_dims is 2 or 3, not {spatial_dims}.")
    if norm not in _NORMALISATION:
        raise ValueError(f"MultiResUNet: norm is 'instance' or 'batch', not {norm!r}.")
    if len(filters) < 2 or int(_SHARES[0] * alpha * min(filters)) < 1:
        raise ValueError(
            f"MultiResUNet: filters needs two numbers or more, each so large that "
            f"{_SHARES[0]} * alpha * filters reaches 1; got {tuple(filters)}, alpha {alpha}."
        )
