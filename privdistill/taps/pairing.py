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


class Resample(nn.Module):
    """Resample a feature map by a fixed factor per axis, with linear interpolation.

    The factor rather than the size is kept, so that patches of another size than the dry run's
    still fit.

    Args:
        factors: Teacher size over student size for each spatial axis.

    Shape:
        `(B, C, *spatial)` to `(B, C, *(factor * size))`.

    Example:
        >>> import torch
        >>> Resample((2.0, 2.0))(torch.zeros(1, 3, 4, 4)).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(self, factors: Sequence[float]) -> None:
        super().__init__()
        self.factors = tuple(factors)

    def forward(self, features: Tensor) -> Tensor:
        """Resample `(B, C, *spatial)`."""
        size = [
            max(1, round(factor * length))
            for factor, length in zip(self.factors, features.shape[2:], strict=True)
        ]
        return F.interpolate(features, size=size, mode=_LINEAR[len(size) - 1], align_corners=False)

    def extra_repr(self) -> str:
        """Show the factors in `print`."""
        return f"factors={self.factors}"


def build_adapter(tap: str, student: Shape, teacher: Shape, *, channels: bool = True) -> nn.Module:
    """Return the smallest module that turns the student's shape into the teacher's.

    Args:
        tap: Name of the tap, for the message.
        student: Shape of the student's features, `(B, C, *spatial)`.
        teacher: Shape of the teacher's features.
        channels: Whether the channel counts must become equal too.

    Returns:
        `nn.Identity`, a 1x1 convolution, `Resample`, or convolution and `Resample` in turn.

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
    steps: list[nn.Module] = []
    if channels and student[1] != teacher[1]:
        steps.append(_CONVOLUTIONS[axes - 1](student[1], teacher[1], kernel_size=1))
    if tuple(student[2:]) != tuple(teacher[2:]):
        factors = [t / s for s, t in zip(student[2:], teacher[2:], strict=True)]
        steps.append(Resample(factors))
    if not steps:
        return nn.Identity()
    return steps[0] if len(steps) == 1 else nn.Sequential(*steps)


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
        added = short(build_adapter(tap, student, teacher, channels=channels))
        remedy = f", which adds {added} to the student"
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


def short(adapter: nn.Module) -> str:
    """Describe an adapter as the code that makes it.

    Args:
        adapter: Any module.

    Returns:
        For instance "nn.Conv3d(256, 320, kernel_size=1)".
    """
    if isinstance(adapter, nn.Sequential):
        return " and ".join(short(step) for step in adapter)
    if isinstance(adapter, Resample):
        return f"Resample({adapter.factors})"
    if isinstance(adapter, _CONVOLUTIONS):
        size = adapter.kernel_size[0]
        name = type(adapter).__name__
        return f"nn.{name}({adapter.in_channels}, {adapter.out_channels}, kernel_size={size})"
    return type(adapter).__name__


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
            if tap in self._channels and features.shape != wanted.shape:
                channels = self._channels[tap]
                check_equal(tap, features.shape, wanted.shape, adapter, channels=channels)
            # A teacher that learns does so from terms that ask for it, never from a distance.
            pairs[tap] = TapPair(features, wanted.detach())
        return pairs
