"""The student alone, on images that are larger than what it sees at a time."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from privdistill.exceptions import ModalityError
from privdistill.wrapper import DistillationWrapper


def unwrapped(network: nn.Module) -> Any:
    """Look through DistributedDataParallel and torch.compile.

    Args:
        network: The wrapper, or something that holds it as `module` or `_orig_mod`.

    Returns:
        The wrapper.
    """
    while not isinstance(network, DistillationWrapper):
        inner = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        if inner is None:
            break
        network = inner
    return network


def predict_windows(
    inferer: Callable[..., Any],
    image: Tensor,
    network: nn.Module,
    *,
    present: Tensor | None = None,
    **_: Any,
) -> Any:
    """Let an inferer, such as MONAI's SlidingWindowInferer, call the student.

    Args:
        inferer: Called with the image and a function from windows to logits.
        image: (B, C, *spatial), the full stack or the student's view.
        network: The wrapper, or DistributedDataParallel around it.
        present: (B, modalities), which of them each sample has.
        _: Other arguments of a step, which a student alone does not need.

    Returns:
        What the inferer returns.

    Raises:
        ModalityError: If there is `present`, and more than one image, whose windows mix.
    """
    kd = unwrapped(network)
    if present is None:
        return inferer(image, kd.predict)
    if len(image) > 1:
        raise ModalityError(
            f"An inferer mixes windows of a batch, here of {len(image)} images, which `present` "
            "cannot follow. Load one image at a time, or leave the inferer out."
        )
    return inferer(image, lambda part: kd.predict(part, present=present.expand(len(part), -1)))
