"""Which networks a file of somebody else may ask for.

A model file names the class of its network and the arguments it is built with. Importing a module
runs it, and some arguments have networks fetch files, so a file decides neither on its own.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from kdnet.errors import UserError
from kdnet.models import NETWORKS

#: Classes of MONAI that only build layers from numbers and words; importing them runs MONAI alone.
_MONAI = (
    *("AttentionUnet", "BasicUNet", "BasicUNetPlusPlus", "DynUNet", "SegResNet", "SegResNetDS"),
    *("SwinUNETR", "UNet", "UNETR", "VNet"),
)
HARMLESS = frozenset({*NETWORKS, *(f"monai.networks.nets.{name}" for name in _MONAI)})
#: Paths, addresses and the names of hubs hold one of them.
_REACHING = frozenset("/\\:")


def check_trusted(
    source: str, backbone: str, arguments: Mapping[str, Any], trusted: Collection[str] = ()
) -> None:
    """Refuse a network that its file alone asks for, before anything is imported."""
    for name, given in _networks(backbone, arguments):
        if name in trusted:
            continue
        if name not in HARMLESS:
            raise UserError(
                f"{source} asks for the network {name!r}, which runs code that the author of the "
                f"file has chosen. Nothing was imported. If you trust it: --trust-backbone {name}."
            )
        for text in _texts(given):
            if {*text} & _REACHING:
                raise UserError(
                    f"{source} builds its network {name!r} with {text!r}, which may be a path, an "
                    "address or a model of a hub. Nothing was built. If you trust it: "
                    f"--trust-backbone {name}."
                )


def _networks(backbone: Any, arguments: Any) -> Iterator[tuple[str, Any]]:
    """A network, and the one that a synthesis is made of, each with its own arguments."""
    inside = arguments.get("segmenter") if isinstance(arguments, Mapping) else None
    if inside is None:
        yield str(backbone), arguments
        return
    # Its name is no path, whatever it looks like.
    yield str(backbone), {key: item for key, item in arguments.items() if key != "segmenter"}
    yield from _networks(inside, arguments.get("segmenter_arguments") or {})


def _texts(value: Any) -> Iterator[str]:
    """All words in arguments."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
