"""A pair of layers, one in each network, captured under one name."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from privdistill.exceptions import LayerNotFoundError


@dataclass(frozen=True)
class Tap:
    """Which layer's output is captured in each network.

    Args:
        teacher: Layer of the teacher: a dotted name from `named_modules()`, or the module. None
            lets the wrapper locate the bottleneck.
        student: Layer of the student, likewise.
        adapter: How student features get the teacher's shape. "auto" adds what is needed
            (nothing, a 1x1 convolution, resampling); None demands equal shapes; a module is used
            as it is and trained with the student.

    Raises:
        LayerNotFoundError: If `adapter` is none of these.

    Example:
        >>> Tap(teacher="encoder.stages.5", student="down4")
        Tap(teacher='encoder.stages.5', student='down4', adapter='auto')
    """

    teacher: str | nn.Module | None = None
    student: str | nn.Module | None = None
    adapter: Literal["auto"] | nn.Module | None = "auto"

    def __post_init__(self) -> None:
        if not (self.adapter in (None, "auto") or isinstance(self.adapter, nn.Module)):
            raise LayerNotFoundError(
                f"Tap: `adapter` must be 'auto', None or a module; got {self.adapter!r}."
            )
