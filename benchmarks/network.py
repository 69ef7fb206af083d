"""The 3-D U-Net on which steps are compared, and a batch for it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn

#: Edge of the patch in voxels, channels of each level.
USUAL = (32, (16, 32, 64, 128))
TINY = (8, (2, 4))


def double_convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions of kernel 3, each with instance norm and leaky ReLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv3d(channels, outputs, 3, padding=1, bias=False),
            nn.InstanceNorm3d(outputs, affine=True),
            nn.LeakyReLU(0.01),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Encoder, bottleneck, decoder with skip connections, three output channels."""

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        *levels, deepest = widths
        steps = list(pairwise((in_channels, *levels)))
        self.encoder = nn.ModuleList(double_convolution(*step) for step in steps)
        self.pool = nn.MaxPool3d(2)
        self.bottleneck = double_convolution(levels[-1], deepest)
        upwards = list(pairwise(reversed(widths)))
        self.up = nn.ModuleList(nn.ConvTranspose3d(*step, 2, stride=2) for step in upwards)
        self.decoder = nn.ModuleList(double_convolution(2 * fine, fine) for _, fine in upwards)
        self.head = nn.Conv3d(widths[0], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in self.encoder:
            skips.append(level(x))
            x = self.pool(skips[-1])
        x = self.bottleneck(x)
        for up, level in zip(self.up, self.decoder, strict=True):
            x = level(torch.cat((skips.pop(), up(x)), 1))
        return self.head(x)


@dataclass
class World:
    """What every contestant begins with.

    Attributes:
        teacher: Sees four modalities.
        student: Sees the first one.
        image: All modalities, (B, 4, X, Y, Z).
        target: Three overlapping regions, (B, 3, X, Y, Z).
    """

    teacher: nn.Module
    student: nn.Module
    image: Tensor
    target: Tensor

    def copy(self) -> Self:
        """The same once more, with networks of its own."""
        return copy.deepcopy(self)


def make_world(size: int, widths: Sequence[int], *, batch: int = 2) -> World:
    """Make networks with random weights and a random batch, the same ones in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher, student = UNet(4, widths), UNet(1, widths)
        image = torch.randn(batch, 4, size, size, size)
        target = (torch.rand(batch, 3, size, size, size) > 0.7).float()
    return World(teacher, student, image, target)
