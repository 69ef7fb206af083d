"""Objectives of the field, by the name that the configuration gives them."""

from typing import cast

from torch import nn

from kdnet.config import ObjectiveConfig
from kdnet.errors import UserError
from kdnet.recipes.distillation import bottleneck, ground_truth, student_objective, views
from kdnet.recipes.lesson import Lesson, Setting
from kdnet.recipes.terms import ContrastWithinBatch
from privdistill import (
    ContrastiveProjection,
    GroundTruth,
    Layer,
    Objective,
    SoftTargetDiceBCE,
    Tap,
    Term,
    generalized,
    hinton,
    pmkl,
    protokd,
    structured,
    xie,
)


def taught_by_objective(setting: Setting) -> Lesson:
    """Learn from the frozen teacher through the objective that the options name."""
    options = setting.options
    objective = objective_of(options.objective, options, classes=_classes(setting))
    if len(setting.teachers) > 1 and objective.taps:
        raise UserError(
            f"The objective {options.objective} compares features, which come from one teacher; of "
            "several, each was trained on a part of the subjects that it would teach. Set "
            "--out_of_fold 1, or an objective of predictions alone, such as --latent_weight 0."
        )
    return Lesson(
        teacher=setting.together,
        network=setting.network,
        objective=objective,
        inputs=views(setting),
        taps=taps_of(objective, setting),
    )


def objective_of(name: str, options: ObjectiveConfig, *, classes: int = 4) -> Objective:
    """Return an objective with the constants of the library's preset of that name."""
    match name:
        case "kdnet":
            return student_objective(options)
        case "hinton":
            preset = hinton()
        case "generalized":
            preset = generalized()
        case "xie":
            preset = xie()
        case "structured":
            preset = structured()
        case "pmkl":
            preset = pmkl()
        case "protokd":
            preset = protokd(classes=classes)
        case _:
            raise UserError(
                f"There is no objective {name!r}: expected kdnet, hinton, generalized, xie, "
                "structured, pmkl or protokd."
            )
    pairs = preset.named_terms.values()
    return Objective([(weight, _adjusted(term, options)) for weight, term in pairs])


def _adjusted(term: Term, options: ObjectiveConfig) -> Term:
    """The same term with the Dice and cross-entropy of all rows, and with lone subjects."""
    if isinstance(term, GroundTruth):
        return ground_truth(options)
    if isinstance(term, SoftTargetDiceBCE):
        return SoftTargetDiceBCE(
            temperature=term.temperature,
            binarisation=term.binarisation,
            include_background=options.include_background,
            squared_denominator=options.squared_denominator,
            batch_dice=options.batch_dice,
            smoothing=options.smoothing,
        )
    if isinstance(term, ContrastiveProjection):
        return ContrastWithinBatch(term.tap).named(term.name)
    return term


def taps_of(objective: Objective, setting: Setting) -> dict[str, Tap]:
    """Name the layers that an objective reads, in both networks."""
    taps = bottleneck(setting.options, setting.network, objective, setting.teacher)
    if "decoder" not in objective.taps:
        return taps
    networks = [part for part in (setting.teacher, setting.network) if part is not None]
    teacher, student = (Layer(head_of(part)[0], at="input") for part in (networks[0], networks[-1]))
    return {"decoder": Tap(teacher=teacher, student=student)}


def head_of(network: nn.Module) -> tuple[str, nn.Module]:
    """Find the layer that makes logits of the last decoder features."""
    plain = getattr(network, "_orig_mod", network)
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    convolutions = {name: part for name, part in plain.named_modules() if isinstance(part, kinds)}
    if "head" in convolutions:
        return "head", convolutions["head"]
    name, last = next(reversed(convolutions.items()), ("", None))
    if last is None or max(last.kernel_size) > 1:
        raise UserError(
            f"The last decoder features of {type(plain).__name__} cannot be told: it has no layer "
            f"called 'head', and its last convolution is {name or 'missing'}, not one of kernel 1. "
            "Take an objective that does not read them, such as hinton, or another backbone."
        )
    return name, last


def _classes(setting: Setting) -> int:
    """Channels of the logits, where the objective asks for them."""
    if setting.options.objective != "protokd":
        return 4
    return cast("int", head_of(setting.network)[1].out_channels)
