"""Logits of a whole volume from a network that sees a part of it at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor

from kdnet.data.description import Size
from kdnet.data.samples import Plane, cut, stack

#: Overlap of windows, and width of the Gaussian that weights them, as a share of the window.
#: Source of both: nnU-Net (Isensee et al. 2021): half a patch, an eighth of a patch. MONAI lets no
#: weight fall below a thousandth of the centre's.
OVERLAP = 0.5
SIGMA = 0.125

#: Slices that a network sees at a time.
_SLICES = 8


def predict_volume(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    patch: Size | None = None,
    slices: Plane | None = None,
) -> Tensor:
    """Predict a volume at once, window by window, or slice by slice."""
    if patch is not None:
        return _by_windows(predict, image, patch)
    return predict(image) if slices is None else _by_slices(predict, image, slices)


def volume_predictor(
    predict: Callable[[Tensor], Tensor], *, patch: Size | None, slices: Plane | None
) -> Callable[[Tensor], Tensor]:
    """Make a function of whole volumes of a function of their parts."""
    return lambda image: predict_volume(predict, image, patch=patch, slices=slices)


def _by_windows(predict: Callable[[Tensor], Tensor], image: Tensor, patch: Size) -> Tensor:
    # MONAI weights in place what it is given; an output of inference mode would forbid it.
    logits = sliding_window_inference(
        image,
        patch,
        1,
        lambda part: predict(part).clone(),
        overlap=OVERLAP,
        mode="gaussian",
        sigma_scale=SIGMA,
    )
    return cast("Tensor", logits)


def _by_slices(predict: Callable[[Tensor], Tensor], image: Tensor, plane: Plane) -> Tensor:
    parts = torch.stack(list(cut(image[0], plane)))
    logits = torch.cat([predict(some) for some in torch.split(parts, _SLICES)])
    return stack(logits.unbind(), plane)[None]
