"""The recipes of the paper: learn from the reference alone, or from a frozen teacher as well."""

import re
from typing import cast

from torch import nn

from kdnet.config import ObjectiveConfig
from kdnet.recipes.lesson import Lesson, Setting
from privdistill import (
    GroundTruth,
    LatentKL,
    Objective,
    PrivilegedInput,
    Ramp,
    SoftTargetDiceBCE,
    Tap,
    Term,
)


def supervised(setting: Setting) -> Lesson:
    """Learn from the reference segmentation alone, like the paper's teacher and its baseline."""
    return Lesson(
        teacher=None,
        network=setting.network,
        objective=ground_truth(setting.options),
        inputs=views(setting),
    )


def distilled(setting: Setting) -> Lesson:
    """Learn from the frozen teacher's predictions and bottleneck too, like the paper's student."""
    objective = student_objective(setting.options)
    return Lesson(
        teacher=setting.together,
        network=setting.network,
        objective=objective,
        inputs=views(setting),
        taps=bottleneck(setting.options, setting.network, objective, setting.teacher),
    )


def views(setting: Setting) -> PrivilegedInput:
    """Give the network its modalities, and the teacher its own."""
    return PrivilegedInput(setting.modalities, student=setting.view, teacher=setting.teacher_view)


def ground_truth(options: ObjectiveConfig) -> Term:
    """Equation (4): Dice and cross-entropy against the reference."""
    return GroundTruth(
        include_background=options.include_background,
        squared_denominator=options.squared_denominator,
        batch_dice=options.batch_dice,
        smoothing=options.smoothing,
    )


def student_objective(options: ObjectiveConfig) -> Objective:
    """Equation (5): lambda L_KD + (1 - lambda) L_GT + alpha L_KL."""
    soft_targets = SoftTargetDiceBCE(
        temperature=options.temperature,
        binarisation=None if options.binarisation == "auto" else options.binarisation,
        class_weights=options.region_weights,
        include_background=options.include_background,
        squared_denominator=options.squared_denominator,
        batch_dice=options.batch_dice,
        smoothing=options.smoothing,
    )
    first = options.imitation if options.imitation_start is None else options.imitation_start
    last, steps = options.imitation, options.imitation_steps
    layers = options.latent_layers or ("bottleneck",)
    latent = [
        LatentKL(
            tap=tap_name(layer),
            normalisation=options.latent_normalisation,
            temperature=options.latent_temperature,
        )
        for layer in layers
    ]
    weighted = (
        (first, last, soft_targets),
        (1 - first, 1 - last, ground_truth(options)),
        *((share := options.latent_weight / len(layers), share, term) for term in latent),
    )
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
        return {
            tap_name(layer): Tap(teacher=layer, student=layer) for layer in options.latent_layers
        }
    teacher = network if teacher is None else teacher
    mine = _layer(network, options.bottleneck_layer)
    theirs = _layer(teacher, options.teacher_bottleneck_layer)
    alike = type(_plain(teacher)) is type(_plain(network))
    if alike and options.teacher_bottleneck_layer == "auto":
        theirs = mine
    return {"bottleneck": Tap(teacher=theirs, student=mine)} if mine or theirs else {}


def _layer(network: nn.Module, option: str) -> str | None:
    """The layer that an option means; None if the library shall locate it."""
    if option != "auto":
        return option
    return "bottleneck" if "bottleneck" in dict(_plain(network).named_children()) else None


def _plain(network: nn.Module) -> nn.Module:
    """The network that was compiled, or the network itself."""
    return cast("nn.Module", getattr(network, "_orig_mod", network))
