"""Give student features the shape of teacher features."""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from privdistill.exceptions import ObjectiveError, ShapeMismatchError
from privdistill.step import TapPair
from privdistill.taps.tap import Tap

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


class Pairing:
    """Bring the features of both networks together, tap by tap.

    Args:
        taps: Layer pairs by name.
        adapters: Where adapters are kept, so that an optimizer finds them.
        channels: Of taps whose features terms compare, whether channel by channel.
    """

    def __init__(
        self, taps: Mapping[str, Tap], adapters: nn.ModuleDict, channels: Mapping[str, bool]
    ) -> None:
        self._taps = taps
        self._adapters = adapters
        self._channels = channels

    def fit(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Add the adapters that features need to be compared.

        Args:
            student: Features of the example by tap name, none without an example.
            teacher: Those of the teacher.

        Raises:
            ObjectiveError: If an adapter is to be built without an example.
            ShapeMismatchError: If none can be built.
        """
        # Other taps are for the user's own eyes; an adapter that no term trains would stall DDP.
        for tap, channels in self._channels.items():
            adapter = self._taps[tap].adapter
            if adapter == "auto" and tap not in teacher:
                raise ObjectiveError(
                    f"Tap '{tap}': whether an adapter is needed cannot be told without an "
                    "example. Pass example=torch.zeros(1, C, *spatial) to the wrapper, or "
                    "Tap(..., adapter=None) where both layers have the same shape."
                )
            if adapter == "auto":
                shapes = student[tap].shape, teacher[tap].shape
                adapter = build_adapter(tap, *shapes, channels=channels)
            # An identity is kept out of the tree, so that equal networks add no key to checkpoints.
            if adapter is not None and not isinstance(adapter, nn.Identity):
                self._adapters[tap] = adapter
                if tap in student:
                    adapter.to(student[tap].device, student[tap].dtype)

    def __call__(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
    ) -> dict[str, TapPair]:
        """Adapt the student's features and pair them with the teacher's.

        Args:
            student: Features by tap name.
            teacher: Those of the teacher.

        Returns:
            Pairs by tap name.

        Raises:
            ShapeMismatchError: If features that terms compare differ in shape.
        """
        pairs = {}
        for tap, wanted in teacher.items():
            features = student[tap]
            adapter = self._adapters[tap] if tap in self._adapters else None  # noqa: SIM401
            if adapter is not None:
                features = adapter(features)
            auto = tap in self._channels and self._taps[tap].adapter == "auto"
            if auto and features.shape[2:] != wanted.shape[2:]:
                features = resample(features, wanted.shape[2:])
            if tap in self._channels and features.shape != wanted.shape:
                channels = self._channels[tap]
                check_equal(tap, features.shape, wanted.shape, adapter, channels=channels)
            # A teacher that learns does so from terms that ask for it, never from a distance.
            pairs[tap] = TapPair(features, wanted.detach())
        return pairs

    def describe(self, tap: str, student: Shape, teacher: Shape) -> str:
        """Describe the adapter of a tap, and whether features of these shapes are resampled."""
        adapter = self._adapters[tap] if tap in self._adapters else None  # noqa: SIM401
        if tap not in self._channels or self._taps[tap].adapter != "auto":
            return short(adapter)
        return short(adapter, student, teacher)
