"""The recipes of the paper: learn from the reference alone, or from a frozen teacher as well."""

from torch import nn

from config import ObjectiveConfig
from privdistill import (
    GroundTruth,
    LatentKL,
    Objective,
    PrivilegedInput,
    SoftTargetDiceBCE,
    Tap,
    Term,
)
from recipes.lesson import Lesson, Setting


def supervised(setting: Setting) -> Lesson:
    """Learn from the reference segmentation alone, like the paper's teacher and its baseline.

    Args:
        setting: Its teacher, if any, is not used.

    Returns:
        The lesson.
    """
    return Lesson(
        teacher=None,
        network=setting.network,
        objective=ground_truth(setting.options),
        inputs=views(setting),
    )


def distilled(setting: Setting) -> Lesson:
    """Learn from the frozen teacher's predictions and bottleneck too, like the paper's student.

    Args:
        setting: With a trained teacher.

    Returns:
        The lesson.
    """
    objective = student_objective(setting.options)
    return Lesson(
        teacher=setting.teacher,
        network=setting.network,
        objective=objective,
        inputs=views(setting),
        taps=bottleneck(setting.options, setting.network, objective),
    )


def views(setting: Setting) -> PrivilegedInput:
    """Give the network its modalities, and the teacher its own.

    Args:
        setting: Names them.

    Returns:
        The two views of a subject's image.
    """
    return PrivilegedInput(setting.modalities, student=setting.view, teacher=setting.teacher_view)


def ground_truth(options: ObjectiveConfig) -> Term:
    """Equation (4): Dice and cross-entropy against the reference.

    Args:
        options: What the paper leaves open about Dice and cross-entropy.

    Returns:
        L_GT.
    """
    return GroundTruth(
        include_background=options.include_background,
        squared_denominator=options.squared_denominator,
        batch_dice=options.batch_dice,
        smoothing=options.smoothing,
    )


def student_objective(options: ObjectiveConfig) -> Objective:
    """Equation (5): lambda L_KD + (1 - lambda) L_GT + alpha L_KL.

    Args:
        options: lambda, T, alpha, and what the paper leaves open.

    Returns:
        The objective; a term of weight zero is left out, and with it its cost.
    """
    soft_targets = SoftTargetDiceBCE(
        temperature=options.temperature,
        include_background=options.include_background,
        squared_denominator=options.squared_denominator,
        batch_dice=options.batch_dice,
        smoothing=options.smoothing,
    )
    latent = LatentKL(
        normalisation=options.latent_normalisation, temperature=options.latent_temperature
    )
    weighted = (
        (options.imitation, soft_targets),
        (1 - options.imitation, ground_truth(options)),
        (options.latent_weight, latent),
    )
    return Objective([(weight, term) for weight, term in weighted if weight > 0])


def bottleneck(
    options: ObjectiveConfig, network: nn.Module, objective: Term | Objective
) -> dict[str, Tap]:
    """Name the bottleneck layer where the configuration or the network does.

    Args:
        options: May name a layer.
        network: May have a layer called "bottleneck".
        objective: May not need one.

    Returns:
        The tap; empty if the library shall locate the bottleneck, or no term reads it.
    """
    layer = options.bottleneck_layer
    plain = getattr(network, "_orig_mod", network)
    if layer == "auto" and "bottleneck" in dict(plain.named_children()):
        layer = "bottleneck"
    if layer == "auto" or not objective.taps:
        return {}
    return {"bottleneck": Tap(teacher=layer, student=layer)}
