"""A U-Net whose encoder is any convolutional one of timm, for slices."""

import importlib
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UpBlock(nn.Module):
    """Upsample, join the encoder's features, convolve twice (batch norm, ReLU)."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        widths = (in_channels + skip_channels, out_channels, out_channels)
        self.convolutions = nn.Sequential()
        for before, after in pairwise(widths):
            convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
            self.convolutions.extend((convolution, nn.BatchNorm2d(after), nn.ReLU()))

    def forward(self, features: Tensor, skip: Tensor | None, size: Sequence[int]) -> Tensor:
        """Return features of the given size."""
        features = F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)
        joined = features if skip is None else torch.cat((features, skip), dim=1)
        return cast("Tensor", self.convolutions(joined))


class TimmUNet(nn.Module):
    """A U-Net for slices: an encoder of timm and a plain decoder."""

    # Source: Ronneberger et al. 2015, arXiv:1505.04597, with padded convolutions, batch norm and
    # bilinear upsampling; widths of the decoder are our choice.

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        encoder: str = "resnet18",
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
    ) -> None:
        super().__init__()
        self.encoder = _create_encoder(encoder, in_channels)
        widths = list(self.encoder.feature_info.channels())
        if len(decoder_channels) < len(widths) or min(decoder_channels) < 1:
            raise ValueError(
                f"TimmUNet: the encoder {encoder} has {len(widths)} levels, which need as many "
                f"decoder_channels, all positive; got {tuple(decoder_channels)}."
            )
        # A layer of its own, so that distillation can tap it by name.
        self.bottleneck = nn.Identity()
        # The last step has no features beside it: the first level is coarser than the input.
        skips = [*reversed(widths[:-1]), 0]
        inputs = [widths[-1], *decoder_channels]
        self.decoder = nn.ModuleList(
            UpBlock(below, skip, width)
            for below, skip, width in zip(inputs, skips, decoder_channels, strict=False)
        )
        self.head = nn.Conv2d(decoder_channels[len(widths) - 1], out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        self._check_size(image)
        levels = list(self.encoder(image))
        # Swin and its like put channels last.
        if str(getattr(self.encoder, "output_fmt", "")) == "NHWC":
            levels = [features.movedim(-1, 1) for features in levels]
        features = self.bottleneck(levels.pop())
        for block in self.decoder:
            skip = levels.pop() if levels else None
            size = image.shape[2:] if skip is None else skip.shape[2:]
            features = block(features, skip, size)
        return cast("Tensor", self.head(features))

    def _check_size(self, image: Tensor) -> None:
        factor = self.encoder.feature_info.reduction()[-1]
        # Batch norm of a single value fails, but only in a batch of one: refuse it beforehand.
        if self.training and max(image.shape[2:]) <= factor:
            raise ValueError(
                f"TimmUNet: slices of {tuple(image.shape[2:])} leave one pixel at the bottleneck. "
                f"Use more than {factor} pixels along one axis, or another encoder."
            )


def _create_encoder(name: str, in_channels: int) -> Any:
    # Here, so that other networks neither wait for timm nor see the deprecations of its import.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        timm = importlib.import_module("timm")
    try:
        return timm.create_model(name, features_only=True, in_chans=in_channels, pretrained=False)
    except (RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"TimmUNet: encoder {name!r} cannot be used: {error}. Take one of timm with features "
            "at several resolutions, such as resnet18, efficientnet_b0 or convnext_atto."
        ) from error
