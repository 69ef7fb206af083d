"""What changes a training sample beyond flips: its pose, and the brightness of each modality."""

import math
from typing import Any

import torch
from monai.transforms.spatial.dictionary import RandAffined
from torch import Tensor

from kdnet.data.preprocessing import Sample

#: Largest rotation about each axis, radians.
ROTATION = math.radians(20)
#: Largest change of size, as a share.
SCALE = 0.1
#: Largest change of contrast, as a share, and of brightness, in standard deviations of the brain.
CONTRAST, BRIGHTNESS = 0.2, 0.1


def augment(sample: Sample, draw: int) -> Sample:
    """Rotate and scale all modalities and the reference alike, and change each one's intensities.

    A function of the sample and a number, so that a training that goes on sees what it would have.
    """
    axes = sample["image"].ndim - 1
    # A slice has one angle, a volume three.
    move = RandAffined(
        keys=("image", "label"),
        prob=1.0,
        rotate_range=(ROTATION,) * (3 if axes == 3 else 1),
        scale_range=(SCALE,) * axes,
        mode=("bilinear", "nearest"),
        padding_mode="zeros",
        allow_missing_keys=True,
    )
    move.set_random_state(draw % 2**32)
    # MONAI's tensors remember what was done to them, which nobody asks.
    arrays: dict[Any, Any] = {name: sample[name] for name in ("image", "label") if name in sample}
    moved = {name: value.as_subclass(Tensor) for name, value in move(arrays).items()}
    changed = Sample(image=_brighten(moved["image"], draw), name=sample["name"])
    if "label" in sample:
        changed["label"] = moved["label"].to(sample["label"].dtype)
    return changed


def _brighten(image: Tensor, draw: int) -> Tensor:
    """Change contrast and brightness of each modality; what is outside the brain stays zero."""
    generator = torch.Generator().manual_seed(draw)
    shape = (2, len(image), *[1] * (image.ndim - 1))
    contrast, brightness = 2 * torch.rand(shape, generator=generator) - 1
    changed = image * (1 + CONTRAST * contrast) + BRIGHTNESS * brightness
    return torch.where(image == 0, 0.0, changed)
