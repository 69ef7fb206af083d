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
    encode,
    find_present,
    resize_like,
    spread,
)


def unit(
    axes: int, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, dropout: float = 0.0
) -> nn.Sequential:
    """Make a convolution, dropout, instance norm and a leaky ReLU of slope 0.2."""
    convolution = CONVOLUTION[axes](inputs, outputs, kernel, stride=stride, padding=kernel // 2)
    norm = InstanceNorm(outputs)
    return nn.Sequential(convolution, nn.Dropout(dropout), norm, nn.LeakyReLU(0.2))


class ContentLevel(nn.Module):
    """Three convolutions, the last one added to the first."""

    def __init__(self, axes: int, inputs: int, width: int, *, stride: int, dropout: float) -> None:
        super().__init__()
        self.first = unit(axes, inputs, width, stride=stride)
        self.second = unit(axes, width, width, dropout=dropout)
        self.third = unit(axes, width, width)

    def forward(self, features: Tensor) -> Tensor:
        """Return the features of this resolution, (B, width, *spatial)."""
        first = self.first(features)
        return cast("Tensor", first + self.third(self.second(first)))


class ContentEncoder(nn.Module):
    """What a modality shows: feature maps of each resolution."""

    def __init__(self, axes: int, channels: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            ContentLevel(axes, before, width, stride=2 if i else 1, dropout=dropout)
            for i, (before, width) in enumerate(pairwise((1, *channels)))
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """Encode one modality, (B, 1, *spatial), finest resolution first."""
        encoded = [image]
        for level in self.levels:
            encoded.append(level(encoded[-1]))
        return encoded[1:]


def appearance_encoder(axes: int, channels: int, code: int) -> nn.Sequential:
    """Make what says how a modality shows it: a short code without place."""
    convolution = CONVOLUTION[axes]
    # Wider up to four times, then only coarser, as in the published configuration.
    widths = [channels, 2 * channels, 4 * channels, 4 * channels, 4 * channels]
    layers: list[nn.Module] = [convolution(1, channels, 7, padding=3), nn.ReLU()]
    for before, after in pairwise(widths):
        layers += [convolution(before, after, 3, stride=2, padding=1), nn.ReLU()]
    pool = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[axes](1)
    return nn.Sequential(*layers, pool, convolution(widths[-1], code, 1))


def modulate(features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Give normalised features the scale and shift of a style (adaptive instance norm)."""
    normalised = F.instance_norm(features) if prod(features.shape[2:]) > 1 else features
    shape = (*scale.shape, *[1] * (features.ndim - 2))
    return normalised * scale.reshape(shape) + shift.reshape(shape)


class StyledBlock(nn.Module):
    """Residual block of two convolutions, both modulated by the style."""

    def __init__(self, axes: int, channels: int) -> None:
        super().__init__()
        self.first = CONVOLUTION[axes](channels, channels, 3, padding=1)
        self.second = CONVOLUTION[axes](channels, channels, 3, padding=1)

    def forward(self, features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Return features (B, channels, *spatial) in the style (B, channels)."""
        inner = F.relu(modulate(self.first(features), scale, shift))
        return features + modulate(self.second(inner), scale, shift)


class Reconstructor(nn.Module):
    """A modality from the fused content and its own style."""

    def __init__(self, axes: int, channels: Sequence[int], code: int, blocks: int) -> None:
        super().__init__()
        convolution, deepest = CONVOLUTION[axes], channels[-1]
        self.style = nn.Sequential(
            *(nn.Flatten(), nn.Linear(code, deepest), nn.ReLU()),
            *(nn.Linear(deepest, deepest), nn.ReLU(), nn.Linear(deepest, 2 * deepest)),
        )
        self.blocks = nn.ModuleList(StyledBlock(axes, deepest) for _ in range(blocks))
        self.finer = nn.ModuleList(
            # Group norm with one group is layer norm: it keeps the ratio of channels, the style.
            nn.Sequential(convolution(a, b, 5, padding=2), nn.GroupNorm(1, b), nn.ReLU())
            for a, b in pairwise(channels[::-1])
        )
        self.head = convolution(channels[0], 1, 7, padding=3)

    def forward(self, contents: Sequence[Tensor], code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the modality (B, *spatial), and mean and log-variance of its style."""
        # The same two vectors scale and shift the features below.
        mean, log_variance = self.style(code).chunk(2, dim=1)
        features = contents[-1]
        for block in self.blocks:
            features = block(features, mean, log_variance)
        for layer, like in zip(self.finer, contents[-2::-1], strict=True):
            features = layer(resize_like(features, like, "nearest"))
        return self.head(features)[:, 0], mean, log_variance


class GatedFusion(nn.Module):
    """Weigh the content of each modality voxel by voxel, and join what is left."""

    def __init__(self, axes: int, modalities: int, channels: int) -> None:
        super().__init__()
        gates = CONVOLUTION[axes](modalities * channels, modalities, 3, padding=1)
        self.gates = nn.Sequential(gates, InstanceNorm(modalities), nn.Sigmoid())
        self.join = unit(axes, modalities * channels, channels, kernel=1)

    def forward(self, contents: Tensor, chosen: Tensor) -> Tensor:
        """Fuse."""
        # A choice, not a product: an absent modality has no gradient, whatever its features are.
        kept = torch.where(spread(chosen, contents), contents, 0)
        gates = self.gates(kept.flatten(1, 2))
        return cast("Tensor", self.join((kept * gates[:, :, None]).flatten(1, 2)))


class MaskDecoder(nn.Module):
    """From the fused content of all resolutions to logits."""

    def __init__(self, axes: int, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.reduce, self.fuse = nn.ModuleList(), nn.ModuleList()
        for below, width in pairwise(channels[::-1]):
            self.reduce.append(unit(axes, below, width))
            last = unit(axes, width, width, kernel=1)
            self.fuse.append(nn.Sequential(unit(axes, 2 * width, width), last))
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
        check_widths("GatedFusionNet", channels, spatial_dims, even=True)
        axes, modalities = spatial_dims, range(in_channels)
        self.encoders = nn.ModuleList(ContentEncoder(axes, channels, dropout) for _ in modalities)
        *finer, deepest = channels
        self.fusions = nn.ModuleList(GatedFusion(axes, in_channels, width) for width in finer)
        self.bottleneck = GatedFusion(axes, in_channels, deepest)
        self.decoder = MaskDecoder(axes, channels, out_channels)
        self.appearances = nn.ModuleList(
            appearance_encoder(axes, style_channels, code) for _ in modalities
        )
        self.reconstructors = nn.ModuleList(
            Reconstructor(axes, channels, code, blocks) for _ in modalities
        )
        self.levels = len(channels)

    def forward(self, image: Tensor) -> Tensor | dict[str, Tensor]:
        """Return logits, or in train mode the mapping."""
        check_image("GatedFusionNet", image, len(self.encoders), self.levels)
        present = find_present(image)
        chosen = draw_subset(present) if self.training else present
        fusions, encoded = (*self.fusions, self.bottleneck), encode(self.encoders, image)
        contents = [fuse(level, chosen) for fuse, level in zip(fusions, encoded, strict=True)]
        logits = cast("Tensor", self.decoder(contents))
        if not self.training:
            return logits
        shown = [
            reconstructor(contents, appearance(modality))
            for reconstructor, appearance, modality in zip(
                self.reconstructors,
                self.appearances,
                image.chunk(len(self.encoders), dim=1),
                strict=True,
            )
        ]
        images, means, log_variances = (torch.stack(own, dim=1) for own in zip(*shown, strict=True))
        return {
            "out": logits,
            "reconstruction": images,
            "style_mean": means,
            "style_log_variance": log_variances,
            "present": present,
        }
