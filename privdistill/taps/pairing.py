"""Give student features the shape of teacher features."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from privdistill.exceptions import ShapeMismatchError

Shape = Sequence[int]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LINEAR = ("linear", "bilinear", "trilinear")


def build_adapter(tap: str, student: Shape, teacher: Shape, *, channels: bool = True) -> nn.Module:
    """Return the smallest module that gives student features the teacher's channels.

    Sizes need no module: `resample` brings each step's features to the size that the teacher has
    in that step, whatever it was in the dry run.

    Args:
        tap: Name of the tap, for the message.
        student: Shape of the student's features, `(B, C, *spatial)`.
        teacher: Shape of the teacher's features.
        channels: Whether the channel counts must become equal.

    Returns:
        `nn.Identity` or a 1x1 convolution.

    Raises:
        ShapeMismatchError: If the features have another number of axes.

    Example:
        >>> build_adapter("bottleneck", (1, 8, 4, 4), (1, 16, 4, 4))
        Conv2d(8, 16, kernel_size=(1, 1), stride=(1, 1))
    """
    axes = len(student) - 2
    if len(student) != len(teacher) or not 1 <= axes <= 3:
        raise ShapeMismatchError(
            f"Tap '{tap}': the student gives {tuple(student)}, the teacher {tuple(teacher)}; an "
            "adapter can be built for (B, C, *spatial) features of one, two or three equal "
            "spatial axes. Choose other layers, or pass a module as Tap(adapter=...)."
        )
    if channels and student[1] != teacher[1]:
        return _CONVOLUTIONS[axes - 1](student[1], teacher[1], kernel_size=1)
    return nn.Identity()


def resample(features: Tensor, size: Sequence[int]) -> Tensor:
    """Resample a feature map linearly.

    Args:
        features: `(B, C, *spatial)` with one, two or three spatial axes.
        size: Spatial size wanted.

    Returns:
        `(B, C, *size)`; the features themselves where they have that size.

    Example:
        >>> import torch
        >>> resample(torch.zeros(1, 3, 4, 4), (5, 8)).shape
        torch.Size([1, 3, 5, 8])
    """
    if tuple(features.shape[2:]) == tuple(size):
        return features
    mode = _LINEAR[len(size) - 1]
    return F.interpolate(features, size=tuple(size), mode=mode, align_corners=False)


def check_equal(
    tap: str, student: Shape, teacher: Shape, adapter: nn.Module | None, *, channels: bool = True
) -> None:
    """Check that adapted student features fit the teacher's.

    Args:
        tap: Name of the tap.
        student: Shape after the adapter.
        teacher: Shape of the teacher's features.
        adapter: What produced the student's shape, for the message.
        channels: Whether the channel counts must be equal too.

    Raises:
        ShapeMismatchError: If the shapes differ; the message names a remedy.
    """
    different = _difference(student, teacher, channels)
    if not different:
        return
    try:
        added = build_adapter(tap, student, teacher, channels=channels)
        remedy = f", which gives the student {short(added, student, teacher)}"
    except ShapeMismatchError:
        remedy = ""
    raise ShapeMismatchError(
        f"Tap '{tap}' (adapter={adapter}): the student gives {tuple(student)}, the teacher\n"
        f"{tuple(teacher)}; {different} differ. Choose layers of equal shape, or leave\n"
        f'adapter="auto"{remedy}.'
    )


def _difference(student: Shape, teacher: Shape, channels: bool) -> str:
    if len(student) != len(teacher):
        return "numbers of axes"
    if student[0] != teacher[0]:
        return "batch sizes"
    parts = ["channels"] if channels and student[1] != teacher[1] else []
    parts += ["sizes"] if tuple(student[2:]) != tuple(teacher[2:]) else []
    return " and ".join(parts)


def short(adapter: nn.Module | None, student: Shape = (), teacher: Shape = ()) -> str:
    """Describe an adapter as the code that makes it, and whether features are resampled.

    Args:
        adapter: Any module, or None.
        student: Shape of the student's features.
        teacher: Shape of the teacher's features, behind an adapter built for them.

    Returns:
        For instance "nn.Conv3d(256, 320, kernel_size=1), resampled".
    """
    parts = [] if adapter is None or isinstance(adapter, nn.Identity) else [type(adapter).__name__]
    if isinstance(adapter, _CONVOLUTIONS):
        size = adapter.kernel_size[0]
        channels = f"{adapter.in_channels}, {adapter.out_channels}"
        parts = [f"nn.{type(adapter).__name__}({channels}, kernel_size={size})"]
    if tuple(student[2:]) != tuple(teacher[2:]):
        parts.append("resampled")
    return ", ".join(parts) or "none"
