"""What every recipe is given, and what it makes of it."""

from dataclasses import dataclass, field

from torch import nn

from config import ObjectiveConfig
from privdistill import Objective, PrivilegedInput, Tap, Term


@dataclass(frozen=True)
class Setting:
    """What the recipe of a row is given.

    Attributes:
        network: The untrained network of the row.
        teacher: The trained network of the row's teacher; None where the row has none.
        options: Weights and switches of the objective.
        modalities: What the images of the subjects stack, in channel order.
        view: What the network sees.
        teacher_view: What teachers see.
    """

    network: nn.Module
    teacher: nn.Module | None
    options: ObjectiveConfig
    modalities: tuple[str, ...]
    view: tuple[str, ...]
    teacher_view: tuple[str, ...]


@dataclass(frozen=True)
class Lesson:
    """What a `DistillationWrapper` needs to train the network of a row.

    Attributes:
        teacher: The network that is frozen and imitated, or None.
        network: The network that is trained and kept.
        objective: What is minimised.
        inputs: What each of the two sees.
        taps: Layer pairs by name; empty where the library locates the bottleneck.
    """

    teacher: nn.Module | None
    network: nn.Module
    objective: Term | Objective
    inputs: PrivilegedInput
    taps: dict[str, Tap] = field(default_factory=dict)
