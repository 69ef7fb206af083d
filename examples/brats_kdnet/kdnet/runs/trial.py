"""How training steps are taken: what is refused, and what is recorded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from kdnet.configuration.config import Config
from kdnet.configuration.training import TrainingConfig
from kdnet.errors import UserError
from kdnet.runs.folders import out_folder
from kdnet.runs.networks import build, describe_network
from kdnet.runs.run_folder import RunFolder
from kdnet.runs.subjects import find_description
from kdnet.training.runtime import MemoryFormat, check_precision, device_type


@dataclass(frozen=True)
class Performance:
    """One way to take a training step.

    Attributes:
        precision: "32-true", "bf16-mixed" or "16-mixed".
        memory_format: Layout of images and weights.
        compile: Whether networks go through torch.compile.
    """

    precision: str = "32-true"
    memory_format: MemoryFormat = "contiguous"
    compile: bool = False

    def __str__(self) -> str:
        compiled = ", compiled" if self.compile else ""
        return f"{self.precision}, {self.memory_format}{compiled}"


def performance_asked(training: TrainingConfig) -> Performance:
    """Return what the options say; a clock decides nothing."""
    return Performance(
        "32-true" if training.precision == "auto" else training.precision,
        "contiguous" if training.memory_format == "auto" else training.memory_format,
        training.compile is True,
    )


def performance_of(resolved: Mapping[str, Any], path: Path) -> Performance:
    """Return the choice with which a run began."""
    allowed = {
        "precision": ("32-true", "bf16-mixed", "16-mixed"),
        "memory_format": ("contiguous", "channels_last"),
        "compile": (False, True),
    }
    for name, values in allowed.items():
        found = resolved.get(name)
        if not isinstance(found, str | bool) or found not in values:
            raise UserError(
                f"{path} is damaged: expected '{name}' of 'resolved' to be one of "
                f"{', '.join(map(str, values))}; found {found!r}. Restore it from a copy; what a "
                "run began with must not change."
            )
    return Performance(**{name: resolved[name] for name in allowed})


def refuse_wrong_gradients(config: Config) -> None:
    """Refuse a precision whose gradients would be wrong, before anything is started or written."""
    training, description = config.training, find_description(config)
    for role in ("teacher", "student"):
        metadata = describe_network(role, config, description)
        check_precision(
            training.precision,
            device_type(training.accelerator),
            build(metadata),
            (1, metadata.in_channels, *metadata.input_size),
        )


def settle(config: Config, *, fabric: Fabric) -> Performance:
    """Return how steps are taken, which a run records when it begins."""
    run = RunFolder(out_folder(config))
    resolved = run.resolved() or asdict(performance_asked(config.training))
    resolved = fabric.broadcast(resolved)
    resolved |= {"device": str(fabric.device), "world_size": fabric.world_size}
    performance = performance_of(resolved, run.environment)
    if fabric.is_global_zero:
        run.write_environment(seed=config.training.seed, resolved=resolved)
    return performance
