"""Files of values to start from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from kdnet.configuration.network import NetworkConfig
from kdnet.errors import UserError
from kdnet.files import UnreadableError, read_yaml

_FOLDER = Path(__file__).parents[2] / "configs"
PRESETS = ("demo", "cpu", "paper", "native")
#: What --recipe auto sets.
RECIPE_FILE = _FOLDER / "recipes" / "auto.yaml"


def read_values(path: Path) -> dict[str, Any]:
    """Return the options of a preset, a recipe or a configuration file."""
    try:
        values = read_yaml(path)
    except UnreadableError as error:
        raise UserError(f"--config: {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config: {path} must hold keys and values, such as 'epochs: 40'.")
    return values


def preset_file(preset: str) -> Path:
    """Return the file of a preset."""
    if preset not in PRESETS:
        raise UserError(f"Unknown preset {preset!r}: expected one of {', '.join(PRESETS)}.")
    return _FOLDER / f"{preset}.yaml"


def without_foreign(network: NetworkConfig, preset: str) -> NetworkConfig:
    """Give the arguments of a preset to its own backbone and to no other."""
    values = read_values(preset_file(preset))
    own = values["backbone_arguments"]
    if network.backbone == values["backbone"]:
        return network
    if network.teacher_backbone == values["backbone"] and (
        network.teacher_backbone_arguments is None
    ):
        network = replace(network, teacher_backbone_arguments=own)
    kept = {
        name: value
        for name, value in network.backbone_arguments.items()
        if name not in own or own[name] != value
    }
    return replace(network, backbone_arguments=kept)
