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
_PARTS = ("segmenter", "generator")
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
                f"file has chosen. Nothing was imported. If you trust it: --trust_backbone {name}."
            )
        for text in _texts(given):
            if {*text} & _REACHING:
                raise UserError(
                    f"{source} builds its network {name!r} with {text!r}, which may be a path, an "
                    "address or a model of a hub. Nothing was built. If you trust it: "
                    f"--trust_backbone {name}."
                )


def _networks(backbone: Any, arguments: Any) -> Iterator[tuple[str, Any]]:
    """A network, and those that it is made of, each with its own arguments."""
    if not isinstance(arguments, Mapping):
        yield str(backbone), arguments
        return
    # The arguments of a network inside another one are looked at under its own name.
    yield str(backbone), {key: item for key, item in arguments.items() if key not in _PARTS}
    for part in _PARTS:
        if arguments.get(part) is not None:
            yield from _networks(arguments[part], arguments.get(f"{part}_arguments") or {})


def _texts(value: Any) -> Iterator[str]:
    """All words in arguments."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
