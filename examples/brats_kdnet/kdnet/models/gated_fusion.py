"""Disentangled content and appearance of each modality, with gated fusion of the content."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnet.models.blocks import (
    CONVOLUTION,
    InstanceNorm,
    check_image,
    check_widths,
    draw_subset,
    find_present,
    resize_like,
    spread,
)
from kdnet.models.hemis import encode


class ConvolutionUnit(nn.Sequential):
    """Convolution, dropout, instance norm, leaky ReLU of slope 0.2."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        dropout: float = 0.0,
        spatial_dims: int,
    ) -> None:
        convolution = CONVOLUTION[spatial_dims](
            in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2
        )
        layers = [convolution, InstanceNorm(out_channels), nn.LeakyReLU(0.2)]
        if dropout:
            layers.insert(1, nn.Dropout(dropout))
        super().__init__(*layers)


class ContentLevel(nn.Module):
    """Three convolutions, the last one added to the first."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, dropout: float, spatial_dims: int
    ) -> None:
        super().__init__()
        width, axes = out_channels, spatial_dims
        self.first = ConvolutionUnit(in_channels, width, stride=stride, spatial_dims=axes)
        self.second = ConvolutionUnit(width, width, dropout=dropout, spatial_dims=axes)
        self.third = ConvolutionUnit(width, width, spatial_dims=axes)

    def forward(self, features: Tensor) -> Tensor:
        """Return the features of this resolution, (B, out_channels, *spatial)."""
        first = self.first(features)
        return cast("Tensor", first + self.third(self.second(first)))


class ContentEncoder(nn.Module):
    """What a modality shows: feature maps of each resolution."""

    def __init__(self, channels: Sequence[int], dropout: float, spatial_dims: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            ContentLevel(
                before, width, stride=2 if i else 1, dropout=dropout, spatial_dims=spatial_dims
            )
            for i, (before, width) in enumerate(zip((1, *channels), channels, strict=False))
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """Encode one modality, (B, 1, *spatial), finest resolution first."""
        encoded = [image]
        for level in self.levels:
            encoded.append(level(encoded[-1]))
        return encoded[1:]


class AppearanceEncoder(nn.Sequential):
    """How a modality shows it: a short code without place."""

    def __init__(self, channels: int, code: int, spatial_dims: int) -> None:
        convolution = CONVOLUTION[spatial_dims]
        widths = [channels, 2 * channels, 4 * channels, 4 * channels, 4 * channels]
        layers: list[nn.Module] = [convolution(1, channels, 7, padding=3), nn.ReLU()]
        for before, after in pairwise(widths):
            layers += [convolution(before, after, 3, stride=2, padding=1), nn.ReLU()]
        pool = nn.AdaptiveAvgPool2d if spatial_dims == 2 else nn.AdaptiveAvgPool3d
        super().__init__(*layers, pool(1), convolution(widths[-1], code, 1))


class StyleNetwork(nn.Module):
    """From a code of appearance to the two vectors that modulate features."""

    def __init__(self, code: int, channels: int) -> None:
        super().__init__()
        layers = [nn.Linear(code, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.mean = nn.Linear(channels, channels)
        self.log_variance = nn.Linear(channels, channels)

    def forward(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, (B, channels) each, of a code (B, code, 1, ..., 1)."""
        hidden = self.hidden(code.flatten(1))
        return self.mean(hidden), self.log_variance(hidden)


def modulate(features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Give normalised features the scale and shift of a style (adaptive instance norm)."""
    normalised = F.instance_norm(features) if prod(features.shape[2:]) > 1 else features
    shape = (*scale.shape, *[1] * (features.ndim - 2))
    return normalised * scale.reshape(shape) + shift.reshape(shape)


class StyledBlock(nn.Module):
    """Residual block of two convolutions, both modulated by the style."""

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        convolution = CONVOLUTION[spatial_dims]
        self.first = convolution(channels, channels, 3, padding=1)
        self.second = convolution(channels, channels, 3, padding=1)

    def forward(self, features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Return features (B, channels, *spatial) in the style (B, channels)."""
        inner = F.relu(modulate(self.first(features), scale, shift))
        return features + modulate(self.second(inner), scale, shift)


class Reconstructor(nn.Module):
    """A modality from the fused content and its own style."""

    def __init__(self, channels: Sequence[int], code: int, blocks: int, spatial_dims: int) -> None:
        super().__init__()
        convolution = CONVOLUTION[spatial_dims]
        widths = list(channels[::-1])
        self.style = StyleNetwork(code, widths[0])
        self.blocks = nn.ModuleList(StyledBlock(widths[0], spatial_dims) for _ in range(blocks))
        self.finer = nn.ModuleList(
            # Group norm with one group is layer norm: it keeps the ratio of channels, the style.
            nn.Sequential(convolution(a, b, 5, padding=2), nn.GroupNorm(1, b), nn.ReLU())
            for a, b in pairwise(widths)
        )
        self.head = convolution(widths[-1], 1, 7, padding=3)

    def forward(
        self, contents: Sequence[Tensor], code: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Reconstruct."""
        style = self.style(code)
        features = contents[-1]
        for block in self.blocks:
            features = block(features, *style)
        for layer, like in zip(self.finer, contents[-2::-1], strict=True):
            features = layer(resize_like(features, like, "nearest"))
        return self.head(features), style


class GatedFusion(nn.Module):
    """Weigh the content of each modality voxel by voxel, and join what is left."""

    def __init__(self, modalities: int, channels: int, spatial_dims: int) -> None:
        super().__init__()
        convolution = CONVOLUTION[spatial_dims]
        self.gates = nn.Sequential(
            convolution(modalities * channels, modalities, 3, padding=1),
            InstanceNorm(modalities),
            nn.Sigmoid(),
        )
        self.join = ConvolutionUnit(
            modalities * channels, channels, kernel_size=1, spatial_dims=spatial_dims
        )

    def forward(self, contents: Tensor, chosen: Tensor) -> Tensor:
        """Fuse."""
        # A choice, not a product: an absent modality has no gradient, whatever its features are.
        kept = torch.where(spread(chosen, contents), contents, 0)
        gates = self.gates(kept.flatten(1, 2))
        return cast("Tensor", self.join((kept * gates[:, :, None]).flatten(1, 2)))


class MaskDecoder(nn.Module):
    """From the fused content of all resolutions to logits."""

    def __init__(self, channels: Sequence[int], out_channels: int, spatial_dims: int) -> None:
        super().__init__()
        axes = spatial_dims
        self.reduce = nn.ModuleList()
        self.fuse = nn.ModuleList()
        for below, width in zip(channels[:0:-1], channels[-2::-1], strict=True):
            self.reduce.append(ConvolutionUnit(below, width, spatial_dims=axes))
            fused = ConvolutionUnit(2 * width, width, spatial_dims=axes)
            last = ConvolutionUnit(width, width, kernel_size=1, spatial_dims=axes)
            self.fuse.append(nn.Sequential(fused, last))
        self.head = CONVOLUTION[axes](channels[0], out_channels, kernel_size=1)

    def forward(self, contents: Sequence[Tensor]) -> Tensor:
        """Return logits of contents given finest first."""
        features = contents[-1]
        for reduce, fuse, skip in zip(self.reduce, self.fuse, contents[-2::-1], strict=True):
            features = reduce(resize_like(features, skip, "nearest"))
            features = fuse(torch.cat((features, skip), dim=1))
        return cast("Tensor", self.head(features))


class GatedFusionNet(nn.Module):
    """Feature disentanglement and gated fusion: segments whatever modalities a sample has."""

    # Source: Chen et al. 2019, arXiv:2002.09708; widths, layers and weights as in the authors'
    # published configuration. As there, the two vectors that scale and shift features are read as
    # mean and log-variance of the style. Departures: convolutions pad with zeros and appearance
    # encoders halve with kernel 3 (there: reflected voxels, kernel 4), so that small and odd sizes
    # work; all subsets that are not empty are equally likely.
    # In train mode the output is a mapping: "out", logits from a subset that the network draws;
    # the "reconstruction" (B, in_channels, *spatial); its "style_mean" and "style_log_variance",
    # both (B, in_channels, channels[-1]); what is "present" (B, in_channels).

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (16, 32, 64, 128),
        *,
        style_channels: int = 32,
        code: int = 8,
        blocks: int = 4,
        dropout: float = 0.3,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        check_widths("GatedFusionNet", channels, spatial_dims)
        axes, modalities = spatial_dims, range(in_channels)
        self.encoders = nn.ModuleList(ContentEncoder(channels, dropout, axes) for _ in modalities)
        *finer, deepest = channels
        self.fusions = nn.ModuleList(GatedFusion(in_channels, width, axes) for width in finer)
        self.bottleneck = GatedFusion(in_channels, deepest, axes)
        self.decoder = MaskDecoder(channels, out_channels, axes)
        self.appearances = nn.ModuleList(
            AppearanceEncoder(style_channels, code, axes) for _ in modalities
        )
        self.reconstructors = nn.ModuleList(
            Reconstructor(channels, code, blocks, axes) for _ in modalities
        )
        self.levels = len(channels)

    def forward(self, image: Tensor) -> Tensor | dict[str, Tensor]:
        """Return logits, or in train mode the mapping."""
        check_image("GatedFusionNet", image, len(self.encoders), self.levels)
        present = find_present(image)
        chosen = draw_subset(present) if self.training else present
        encoded = encode(self.encoders, image)
        contents = [
            fusion(content, chosen)
            for fusion, content in zip((*self.fusions, self.bottleneck), encoded, strict=True)
        ]
        logits = cast("Tensor", self.decoder(contents))
        if not self.training:
            return logits
        return {"out": logits, **self._reconstruct(image, contents), "present": present}

    def _reconstruct(self, image: Tensor, contents: list[Tensor]) -> dict[str, Tensor]:
        images, means, log_variances = [], [], []
        for i, (appearance, reconstructor) in enumerate(
            zip(self.appearances, self.reconstructors, strict=True)
        ):
            code = appearance(image[:, i : i + 1])
            reconstruction, (mean, log_variance) = reconstructor(contents, code)
            images.append(reconstruction)
            means.append(mean)
            log_variances.append(log_variance)
        return {
            "reconstruction": torch.cat(images, dim=1),
            "style_mean": torch.stack(means, dim=1),
            "style_log_variance": torch.stack(log_variances, dim=1),
        }
