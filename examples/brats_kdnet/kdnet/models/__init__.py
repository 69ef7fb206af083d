"""The networks of the application, and any other by its import path."""

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kdnet.errors import UserError
from kdnet.models.gated_fusion import GatedFusionNet
from kdnet.models.hemis import HeMIS
from kdnet.models.kdnet import KDNet
from kdnet.models.multiresunet import MultiResUNet
from kdnet.models.timm_unet import TimmUNet
from kdnet.models.uhved import UHVED

#: Networks that have a name. KD-Net's is No New-Net's: widths, two convolutions with instance norm
#: and leaky ReLU of slope 0.01 at each resolution, trilinear upsampling, halved channels before it
#: (Isensee et al. 2018). What differs is how they are trained: No New-Net on regions, which is
#: --activation sigmoid.
NETWORKS: dict[str, type[nn.Module] | str] = {
    "kdnet": KDNet,
    "multiresunet": MultiResUNet,
    "no_new_net": KDNet,
    "hemis": HeMIS,
    "uhved": UHVED,
    "gated_fusion": GatedFusionNet,
    # By its path, since it is built of the networks here.
    "synthesis": "kdnet.models.synthesis.SynthesisNetwork",
    "timm_unet": TimmUNet,
}

_IN_CHANNELS = ("in_channels", "n_channels", "input_channels", "in_chans", "num_channels")
_OUT_CHANNELS = ("out_channels", "classes", "n_classes", "num_classes", "out_chans")


def build_network(
    name: str, arguments: Mapping[str, Any], *, in_channels: int, out_channels: int
) -> nn.Module:
    """Build a network by name or by import path."""
    backbone = _find_class(name)
    if reserved := sorted({*_IN_CHANNELS, *_OUT_CHANNELS} & arguments.keys()):
        raise UserError(
            f"--backbone-arguments: {', '.join(reserved)} follow from the modalities and classes "
            "of the data set; leave them out."
        )
    # Read from the signature, as nothing else says what a class of somebody else takes.
    keywords = inspect.signature(backbone).parameters
    # Networks of others call them otherwise; the first name that fits is taken.
    channels = {
        candidate: number
        for candidates, number in ((_IN_CHANNELS, in_channels), (_OUT_CHANNELS, out_channels))
        for candidate in [own for own in candidates if own in keywords][:1]
    }
    if len(channels) < 2:
        raise UserError(
            f"Network {name!r} has no argument for its channels, such as {_IN_CHANNELS[0]} and "
            f"{_OUT_CHANNELS[0]}; it takes {', '.join(keywords) or 'none'}."
        )
    try:
        return backbone(**channels, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, LookupError) as error:
        raise UserError(
            f"Network {name!r} cannot be built with {channels | dict(arguments)}: {error}\n"
            f"Its arguments are: {', '.join(keywords)}. Set them with --backbone-arguments."
        ) from error


def with_known(name: str, arguments: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Add those arguments that a network knows and was not told."""
    known = inspect.signature(_find_class(name)).parameters
    return {key: value for key, value in more.items() if key in known} | dict(arguments)


def chosen_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of a network that are not its defaults."""
    known = inspect.signature(_find_class(name)).parameters
    defaults = {key: known[key].default for key in arguments if key in known}
    # Files have lists for tuples.
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in defaults.items()}
    return {key: v for key, v in arguments.items() if key not in plain or plain[key] != v}


def check_axes(name: str, network: nn.Module, axes: int) -> None:
    """Refuse a network whose convolutions are made for another number of axes."""
    kinds = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    found = {n for m in network.modules() for kind, n in kinds.items() if isinstance(m, kind)}
    # Some networks have no convolution, and some have those of several numbers of axes.
    if found and axes not in found:
        raise UserError(
            f"Network {name!r} has {min(found)}-D convolutions, and would see {axes}-D images. "
            "Slices are for 2-D networks, --slices axial: kdnet, multiresunet, timm_unet, or one "
            "whose class takes --backbone-arguments '{\"spatial_dims\": 2}'."
        )


def _find_class(name: str) -> type[nn.Module]:
    known = NETWORKS.get(name, name)
    if not isinstance(known, str):
        return known
    module, _, class_name = known.rpartition(".")
    if not module:
        raise UserError(
            f"Unknown network {name!r}: expected one of {', '.join(NETWORKS)}, or the import "
            "path of a class, such as monai.networks.nets.SegResNet."
        )
    # Programs look beside themselves; a network of the user's own lies in the current folder.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"Network {name!r} cannot be imported: {error}.") from error
    # Model files carry this name: only network classes, so that a file can call nothing else.
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise UserError(f"Network {name!r} is not a subclass of torch.nn.Module.")
    return found
