"""Objectives of the field beside KD-Net's, by the name that the configuration gives them."""

import inspect

from torch import nn

import privdistill
from kdnet.errors import UserError
from kdnet.recipes.kdnet import (
    Recipe,
    Setting,
    bottleneck,
    ground_truth,
    imitate,
    of_dice,
    student_objective,
    uncompiled,
)
from kdnet.recipes.terms import ContrastWithinBatch
from privdistill import (
    ContrastiveProjection,
    GroundTruth,
    Layer,
    Objective,
    SoftTargetDiceBCE,
    Tap,
    Term,
)


def distilled(setting: Setting) -> Recipe:
    """Learn from the frozen teacher through the objective that the options name."""
    objective = objective_of(setting)
    # Each was trained on a part of the subjects, so that none teaches those it has seen.
    if len(setting.teachers) > 1 and objective.taps:
        raise UserError(
            f"The objective {setting.options.objective} compares features, which come from one "
            "teacher. Set --out-of-fold 1, or compare predictions alone, as --latent-weight 0 does."
        )
    taps = bottleneck(setting.options, setting.network, objective, setting.teacher)
    # Names of last decoder layers differ from network to network: what enters the head is read.
    if "decoder" in objective.taps:
        teacher, student = (
            Layer(head_of(network), at="input")
            for network in (setting.teacher or setting.network, setting.network)
        )
        taps["decoder"] = Tap(teacher=teacher, student=student)
    return imitate(setting, objective, taps)


def objective_of(setting: Setting) -> Objective:
    """Return the objective that the options name, with the constants of the library's preset."""
    name = setting.options.objective
    if name == "kdnet":
        return student_objective(setting.options)
    if name == "mstkdnet" and setting.classes < 3:
        raise UserError(
            f"mstkdnet needs 3 output channels or more, found {setting.classes}. Take hinton."
        )
    preset = getattr(privdistill, name)
    # Some divide a weight by the number of classes.
    per_class = "classes" in inspect.signature(preset).parameters
    pairs = preset(**{"classes": setting.classes} if per_class else {}).named_terms.values()
    return Objective([(weight, _adjusted(term, setting)) for weight, term in pairs])


def _adjusted(term: Term, setting: Setting) -> Term:
    """The same term with the Dice and cross-entropy of all rows, and with lone subjects."""
    options = setting.options
    # Rows of a table differ in how they distil, not in how they compare with the reference.
    if isinstance(term, GroundTruth) and term.loss is None:
        return ground_truth(options)
    if isinstance(term, SoftTargetDiceBCE):
        return SoftTargetDiceBCE(
            temperature=term.temperature, binarisation=term.binarisation, **of_dice(options)
        )
    if isinstance(term, ContrastiveProjection):
        return ContrastWithinBatch(tap=term.tap).named(term.name)
    return term


def head_of(network: nn.Module) -> str:
    """Find the layer that makes logits of the last decoder features."""
    plain, kinds = uncompiled(network), nn.Conv1d | nn.Conv2d | nn.Conv3d
    found = {name: part for name, part in plain.named_modules() if isinstance(part, kinds)}
    # Networks of the application call it so.
    if "head" in found:
        return "head"
    name, last = next(reversed(found.items()), ("", None))
    if last is None or max(last.kernel_size) > 1:
        raise UserError(
            f"{type(plain).__name__} has no layer called 'head', and its last convolution, "
            f"{name or 'missing'}, is not one of kernel 1. Take an objective that does not read "
            "the last decoder features, such as hinton, or another backbone."
        )
    return name
