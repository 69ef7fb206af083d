"""Share the teacher's deepest layers with the student: a negative result of the paper."""

import torch
from torch import nn

from kdnet.config import ObjectiveConfig
from kdnet.errors import UserError
from kdnet.recipes.distillation import distilled
from kdnet.recipes.lesson import Lesson, Setting


def share_deepest_layers(setting: Setting) -> Lesson:
    """Give the student the teacher's deepest layers, fixed, and distil as usual."""
    # Source: Hu et al. 2020, arXiv:2106.09564, section 3.3, "Observations": weights shared between
    # teacher and student in the deepest layers; the result was almost that of KD-Net, slightly
    # worse. Which layers, whether they went on learning, and with which loss, is not said; fixed
    # layers of the trained teacher and the whole objective are ours.
    if setting.teacher is None:
        raise UserError("The recipe shared needs a teacher: name one in the row, teacher: teacher.")
    name = deepest_layer(setting.options, setting.network)
    own, taught = _layer(setting.network, name), _layer(setting.teacher, name)
    mine, theirs = dict(own.named_parameters()), dict(taught.named_parameters())
    if _shapes(mine) != _shapes(theirs) or not mine:
        raise UserError(
            f"The recipe shared needs layer {name!r} to have the same weights in both networks; "
            f"the student's are {_shapes(mine)}, the teacher's {_shapes(theirs)}. Give both the "
            "same backbone and arguments, or name another --bottleneck_layer."
        )
    with torch.no_grad():
        for key, parameter in mine.items():
            parameter.copy_(theirs[key])
    own.requires_grad_(requires_grad=False)
    return distilled(setting)


def deepest_layer(options: ObjectiveConfig, network: nn.Module) -> str:
    """Name the layer whose output is the latent representation."""
    if options.bottleneck_layer != "auto":
        return options.bottleneck_layer
    plain = getattr(network, "_orig_mod", network)
    if "bottleneck" in dict(plain.named_children()):
        return "bottleneck"
    raise UserError(
        f"The recipe shared does not know the deepest layers of {type(plain).__name__}, which has "
        f"none called 'bottleneck'. Name them with --bottleneck_layer."
    )


def _layer(network: nn.Module, name: str) -> nn.Module:
    plain = getattr(network, "_orig_mod", network)
    try:
        found: nn.Module = plain.get_submodule(name)
    except AttributeError as error:
        raise UserError(
            f"The recipe shared finds no layer {name!r} in {type(plain).__name__}: {error}."
        ) from error
    return found


def _shapes(parameters: dict[str, nn.Parameter]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in parameters.items()}
