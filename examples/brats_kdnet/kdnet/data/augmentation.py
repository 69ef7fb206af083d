"""What changes a training sample beyond flips: its pose, and the brightness of each modality."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdnet.data.preprocessing import Sample

#: Largest rotation in each plane, radians.
ROTATION = math.radians(20)
#: Largest change of size along each axis, as a share.
SCALE = 0.1
#: Largest change of contrast, as a share, and of brightness, in standard deviations of the brain.
CONTRAST, BRIGHTNESS = 0.2, 0.1


def augment(sample: Sample, draw: int) -> Sample:
    """Rotate and scale all modalities and the reference alike, and change each one's intensities.

    A function of the sample and a number, so that a training that goes on sees what it would have.
    """
    generator = torch.Generator().manual_seed(draw)
    image = sample["image"]
    size = image.shape[1:]
    # MONAI's transform of the same kind takes seconds to be imported, and longer on small volumes.
    grid = F.affine_grid(_pose(size, generator)[None], [1, 1, *size], align_corners=False)
    moved = F.grid_sample(image[None], grid, align_corners=False)[0]
    changed = Sample(image=_brighten(moved, generator), name=sample["name"])
    if "label" in sample:
        label = sample["label"]
        nearest = F.grid_sample(label[None].float(), grid, mode="nearest", align_corners=False)
        changed["label"] = nearest[0].to(label.dtype)
    return changed


def _pose(size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Where a voxel of the new volume lies in the old one: a matrix for `affine_grid`."""
    axes = len(size)
    matrix = torch.eye(axes) * (1 + SCALE * _uniform(axes, generator))
    for first, second in itertools.combinations(range(axes), 2):
        angle = ROTATION * float(_uniform(1, generator))
        turn = torch.eye(axes)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    # Rotations are of voxels; affine_grid counts in halves of an edge, and the last axis first.
    edges = torch.tensor(size[::-1], dtype=torch.float32)
    return torch.cat([matrix * edges / edges[:, None], torch.zeros(axes, 1)], dim=1)


def _brighten(image: Tensor, generator: torch.Generator) -> Tensor:
    """Change contrast and brightness of each modality; what is outside the brain stays zero."""
    shape = (len(image), *[1] * (image.ndim - 1))
    contrast = CONTRAST * _uniform(len(image), generator).reshape(shape)
    brightness = BRIGHTNESS * _uniform(len(image), generator).reshape(shape)
    return torch.where(image == 0, 0.0, image * (1 + contrast) + brightness)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    """Numbers from -1 to 1."""
    return 2 * torch.rand(count, generator=generator) - 1
