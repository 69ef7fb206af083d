"""From a network that sees a part of a volume at a time to the label map of the whole volume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from kdnet.data.description import Description, Size
from kdnet.data.preprocessing import Preprocessing
from kdnet.data.samples import AXES, Plane
from kdnet.data.targets import predict_classes
from kdnet.data.volumes import Geometry
from kdnet.errors import UserError
from kdnet.files import atomic
from privdistill import DistillationWrapper, GroundTruth

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
    if slices is None:
        return predict(image)
    axis = AXES[slices] + 1
    parts = image[0].movedim(axis, 0).contiguous()
    answers = torch.cat([predict(some) for some in torch.split(parts, _SLICES)])
    return answers.movedim(0, axis).contiguous()[None]


def logits_of(network: nn.Module, example: Tensor) -> DistillationWrapper:
    """Make one that predicts the logits of a network of any form of output, as in training."""
    # No loss is computed: an activation for any number of channels.
    objective = GroundTruth(activation="sigmoid")
    return DistillationWrapper(None, network, objective=objective, example=example)


def volume_predictor(
    network: nn.Module,
    device: torch.device,
    example: Tensor,
    *,
    patch: Size | None,
    slices: Plane | None,
) -> Callable[[Tensor], Tensor]:
    """Make a function of volumes to their logits, on the CPU, of a network for their parts."""
    kd = logits_of(network.to(device), example)

    def predict(part: Tensor) -> Tensor:
        return kd.predict(part.to(device)).float().cpu()

    return lambda image: predict_volume(predict, image, patch=patch, slices=slices)


def predict_finite(network_predict: Callable[[Tensor], Tensor], image: Tensor, name: str) -> Tensor:
    """Run a network on one image without gradients and refuse an output that means nothing."""
    with torch.no_grad():
        logits = network_predict(image[None]).float().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            f"{name}: expected finite network outputs, found NaN or infinity. The image may hold "
            "extreme intensities, or the training of this model diverged."
        )
    return logits


def native_classes(
    logits: Tensor, shape: tuple[int, int, int], preprocessing: Preprocessing, activation: str
) -> NDArray[np.integer]:
    """Class indices on the original grid from the logits of the training grid."""
    softmax = activation == "softmax"
    probabilities = logits.softmax(dim=1) if softmax else logits.sigmoid()
    native = preprocessing.to_native(
        probabilities[0].float(), shape, outside=1.0 if softmax else 0.0
    )
    # `predict_classes` cuts at a logit of zero, which is a probability of one half; the argmax of
    # exclusive classes does not notice the shift.
    return predict_classes(native[None] - 0.5, preprocessing.description, activation)[0].numpy()


def write_label_map(
    path: Path, classes: NDArray[np.integer], geometry: Geometry, description: Description
) -> None:
    """Write class indices as a NIfTI label map that lies on the original image."""
    values = [description.export_labels[index] for index in range(len(description.classes))]
    limits = [(kind, np.iinfo(kind)) for kind in (np.uint8, np.int16, np.int32)]
    dtype = next(kind for kind, own in limits if own.min <= min(values) <= max(values) <= own.max)
    new_image: Any = nib.Nifti1Image  # nibabel is not typed
    image = new_image(np.array(values, dtype)[classes], geometry.affine, geometry.header)
    image.set_data_dtype(dtype)
    # The header may carry the display window of the intensities.
    image.header["cal_max"] = image.header["cal_min"] = 0
    image.header["descrip"] = b"phantom" * description.phantom
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial:
        nib.save(image, partial)
