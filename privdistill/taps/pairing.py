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
    """
    axes = len(student) - 2
    if len(student) != len(teacher) or not 1 <= axes <= 3:
        raise ShapeMismatchError(
            f"Tap '{tap}': the student gives {tuple(student)}, the teacher {tuple(teacher)}; an "
            "adapter can be built for (B, C, *spatial) features of one, two or three equal "
            "spatial axes. Choose other layers, or pass a module as Tap(adapter=...)."
        )
    # A kernel of 1 maps channels and leaves the comparison of places to the term.
    if channels and student[1] != teacher[1]:
        return _CONVOLUTIONS[axes - 1](student[1], teacher[1], kernel_size=1)
    return nn.Identity()


def resample(features: Tensor, size: Sequence[int]) -> Tensor:
    """Resample a feature map linearly; one of that size stays itself."""
    if tuple(features.shape[2:]) == tuple(size):
        return features
    mode = _LINEAR[len(size) - 1]
    return F.interpolate(features, size=tuple(size), mode=mode, align_corners=False)


def check_equal(
    tap: str, student: Shape, teacher: Shape, adapter: nn.Module | None, *, channels: bool = True
) -> None:
    """Refuse adapted student features that do not fit the teacher's, and name a remedy."""
    # Of terms that compare no channels, any two widths fit.
    compared = [axis for axis in range(len(student)) if channels or axis != 1]
    if len(student) == len(teacher) and all(student[a] == teacher[a] for a in compared):
        return
    try:
        added = build_adapter(tap, student, teacher, channels=channels)
        remedy = f", which gives the student {short(added, student, teacher)}"
    except ShapeMismatchError:
        remedy = ""
    raise ShapeMismatchError(
        f"Tap '{tap}' (adapter={adapter}): the student gives {tuple(student)}, the teacher "
        f"{tuple(teacher)}, which differ. Choose layers of equal shape, or leave "
        f'adapter="auto"{remedy}.'
    )


def short(adapter: nn.Module | None, student: Shape = (), teacher: Shape = ()) -> str:
    """Describe an adapter as the code that makes it, and whether features are resampled."""
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
        self.adapters = adapters
        self.channels = channels

    def fit(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Add the adapters that features of the example need to be compared; none without one."""
        # Other taps are for the user's own eyes; an adapter that no term trains would stall DDP.
        for tap, channels in self.channels.items():
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
                self.adapters[tap] = adapter
                if tap in student:
                    adapter.to(student[tap].device, student[tap].dtype)

    def __call__(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
    ) -> dict[str, TapPair]:
        """Adapt the student's features and pair them with the teacher's, by tap name."""
        pairs = {}
        for tap, wanted in teacher.items():
            features = student[tap]
            adapter = self.adapters[tap] if tap in self.adapters else None  # noqa: SIM401
            if adapter is not None:
                features = adapter(features)
            # To the size that the teacher has in this step, whatever it was in the dry run.
            auto = tap in self.channels and self._taps[tap].adapter == "auto"
            if auto and features.shape[2:] != wanted.shape[2:]:
                features = resample(features, wanted.shape[2:])
            if tap in self.channels and features.shape != wanted.shape:
                channels = self.channels[tap]
                check_equal(tap, features.shape, wanted.shape, adapter, channels=channels)
            # A teacher that learns does so from terms that ask for it, never from a distance.
            pairs[tap] = TapPair(features, wanted.detach())
        return pairs

    def describe(self, tap: str, student: Shape, teacher: Shape) -> str:
        """Describe the adapter of a tap, and whether features of these shapes are resampled."""
        adapter = self.adapters[tap] if tap in self.adapters else None  # noqa: SIM401
        if tap not in self.channels or self._taps[tap].adapter != "auto":
            return short(adapter)
        return short(adapter, student, teacher)
