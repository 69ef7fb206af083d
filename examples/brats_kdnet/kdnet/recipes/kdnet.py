"""KD-Net: a teacher and a baseline learn from the reference, a student from the teacher as well.

Source: Hu et al. 2020, arXiv:2106.09564, whose equations are cited. To train the student with
another loss, change `student_objective`.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import nn

from kdnet.config import PAPER_TEMPERATURE, ObjectiveConfig
from privdistill import (
    Ensemble,
    GroundTruth,
    LatentKL,
    Objective,
    PrivilegedInput,
    Ramp,
    SoftTargetDiceBCE,
    Tap,
    Term,
)


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
        classes: Output channels of the networks.
        start: What a distilled network starts from, "scratch" or the weights of its "teacher".
    """

    network: nn.Module
    teachers: tuple[nn.Module, ...]
    options: ObjectiveConfig
    modalities: tuple[str, ...]
    view: tuple[str, ...]
    teacher_view: tuple[str, ...]
    classes: int
    start: Literal["scratch", "teacher"] = "scratch"

    @property
    def teacher(self) -> nn.Module | None:
        """The first teacher, None where the row has none."""
        return self.teachers[0] if self.teachers else None


@dataclass(frozen=True)
class Recipe:
    """What a `DistillationWrapper` needs to train the network of a row.

    Attributes:
        teacher: The network that is frozen and imitated, or several, or None.
        network: The network that is trained and kept.
        objective: What is minimised.
        inputs: What each of the two sees.
        taps: Layer pairs by name; empty where the library locates the bottleneck.
        start: What the network starts from.
    """

    teacher: nn.Module | Ensemble | None
    network: nn.Module
    objective: Term | Objective
    inputs: PrivilegedInput
    taps: dict[str, Tap] = field(default_factory=dict)
    start: Literal["scratch", "teacher"] = "scratch"


def supervised(setting: Setting) -> Recipe:
    """Learn from the reference segmentation alone, like the paper's teacher and its baseline."""
    inputs = PrivilegedInput(setting.modalities, student=setting.view)
    return Recipe(None, setting.network, ground_truth(setting.options), inputs)


def imitate(setting: Setting, objective: Objective, taps: dict[str, Tap]) -> Recipe:
    """Learn from one frozen teacher or several, which see more, by any objective."""
    several = len(setting.teachers) > 1
    return Recipe(
        teacher=Ensemble(setting.teachers) if several else setting.teacher,
        network=setting.network,
        objective=objective,
        inputs=PrivilegedInput(
            setting.modalities, student=setting.view, teacher=setting.teacher_view
        ),
        taps=taps,
        start=setting.start,
    )


def ground_truth(options: ObjectiveConfig) -> Term:
    """Equation (4): Dice and cross-entropy against the reference."""
    return GroundTruth(**of_dice(options))


def of_dice(options: ObjectiveConfig) -> dict[str, Any]:
    """Return the options of Dice, which are the same in all terms."""
    names = ("include_background", "squared_denominator", "batch_dice", "smoothing")
    return {name: getattr(options, name) for name in names}


def student_objective(options: ObjectiveConfig) -> Objective:
    """Equation (5): lambda L_KD + (1 - lambda) L_GT + alpha L_KL."""
    # Before there is a teacher to fit it to, while networks are only tried, it is the paper's.
    temperature = PAPER_TEMPERATURE if options.temperature == "fit" else options.temperature
    # Equations (1) and (2): the teacher's logits, softened by T, are what Dice compares with.
    soft_targets = SoftTargetDiceBCE(
        temperature=temperature,
        binarisation=None if options.binarisation == "auto" else options.binarisation,
        class_weights=options.region_weights,
        **of_dice(options),
    )
    # Equation (3): the divergence of the bottlenecks, or of the layers that share its weight.
    layers = options.latent_layers or ("bottleneck",)
    latent = [
        LatentKL(
            tap=tap_name(layer),
            normalisation=options.latent_normalisation,
            temperature=options.latent_temperature,
        )
        for layer in layers
    ]
    last, steps = options.imitation, options.imitation_steps
    first = last if options.imitation_start is None else options.imitation_start
    weighted = [
        (first, last, soft_targets),
        (1 - first, 1 - last, ground_truth(options)),
        *((share := options.latent_weight / len(layers), share, term) for term in latent),
    ]
    return Objective(
        [
            (end if start == end else Ramp(start, end, steps=steps), term)
            for start, end, term in weighted
            if start > 0 or end > 0
        ]
    )


def tap_name(layer: str) -> str:
    """Return the name of the tap at a layer: a plain word, which the layer's often is not.

    >>> tap_name("bottleneck"), tap_name("encoder.2")
    ('bottleneck', 'layer_encoder_2')
    """
    return layer if layer.isidentifier() else "layer_" + re.sub(r"\W", "_", layer)


def bottleneck(
    options: ObjectiveConfig,
    network: nn.Module,
    objective: Term | Objective,
    teacher: nn.Module | None = None,
) -> dict[str, Tap]:
    """Name the bottleneck layers where the configuration or the networks do."""
    if not objective.taps:
        return {}
    if options.latent_layers is not None:
        layers = options.latent_layers
        return {tap_name(layer): Tap(teacher=layer, student=layer) for layer in layers}
    teacher = network if teacher is None else teacher
    student_layer = _layer(network, options.bottleneck_layer)
    teacher_layer = _layer(teacher, options.teacher_bottleneck_layer)
    alike = type(uncompiled(teacher)) is type(uncompiled(network))
    if alike and options.teacher_bottleneck_layer == "auto":
        teacher_layer = student_layer
    if student_layer is None and teacher_layer is None:
        return {}
    return {"bottleneck": Tap(teacher=teacher_layer, student=student_layer)}


def _layer(network: nn.Module, option: str) -> str | None:
    """The layer that an option means; None if the library shall locate it."""
    if option != "auto":
        return option
    return "bottleneck" if "bottleneck" in dict(uncompiled(network).named_children()) else None


def uncompiled(network: nn.Module) -> nn.Module:
    """Return the network that was compiled, or the network itself."""
    return cast("nn.Module", getattr(network, "_orig_mod", network))
