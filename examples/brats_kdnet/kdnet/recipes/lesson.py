"""What every recipe is given, and what it makes of it."""

from dataclasses import dataclass, field

from torch import nn

from kdnet.config import ObjectiveConfig
from privdistill import Ensemble, Objective, PrivilegedInput, Tap, Term


@dataclass(frozen=True)
class Setting:
    """What the recipe of a row is given.

    Attributes:
        network: The untrained network of the row.
        teachers: The trained networks of the row's teachers.
        options: Weights and switches of the objective.
        modalities: What the images of the subjects stack, in channel order.
        view: What the network sees.
        teacher_view: What teachers see.
    """

    network: nn.Module
    teachers: tuple[nn.Module, ...]
    options: ObjectiveConfig
    modalities: tuple[str, ...]
    view: tuple[str, ...]
    teacher_view: tuple[str, ...]

    @property
    def teacher(self) -> nn.Module | None:
        """The first teacher, None where the row has none."""
        return self.teachers[0] if self.teachers else None

    @property
    def together(self) -> nn.Module | Ensemble | None:
        """All that is imitated: the teacher, or several."""
        return Ensemble(self.teachers) if len(self.teachers) > 1 else self.teacher


@dataclass(frozen=True)
class Lesson:
    """What a `DistillationWrapper` needs to train the network of a row.

    Attributes:
        teacher: The network that is frozen and imitated, or several, or None.
        network: The network that is trained and kept.
        objective: What is minimised.
        inputs: What each of the two sees.
        taps: Layer pairs by name; empty where the library locates the bottleneck.
    """

    teacher: nn.Module | Ensemble | None
    network: nn.Module
    objective: Term | Objective
    inputs: PrivilegedInput
    taps: dict[str, Tap] = field(default_factory=dict)
