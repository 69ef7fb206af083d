"""Everything that determines a run."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kdnet.configuration.data import DataConfig
from kdnet.configuration.network import NetworkConfig
from kdnet.configuration.objective import ObjectiveConfig
from kdnet.configuration.training import TrainingConfig


@dataclass(frozen=True)
class RunConfig:
    """Where results go.

    Args:
        preset: Values to start from: "demo" (phantoms, minutes), "cpu" (small real run), "paper",
            "native" (patches at full resolution). "demo" if there is no data_root, otherwise
            "cpu".
        out: Run folder; runs/PRESET if none is given.
        predictions: Write the label maps of the held-out subjects.
    """

    preset: str = "demo"
    out: Path | None = None
    predictions: bool = True


@dataclass(frozen=True)
class Config:
    """Everything that determines a run.

    Args:
        data: Subjects, preprocessing, split.
        network: The networks.
        objective: The student's objective.
        training: The three trainings.
        run: Where results go.
    """

    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return the flat form, plain values only, as it is written to config.yaml."""
        flat: dict[str, Any] = {}
        for group in fields(self):
            flat |= asdict(getattr(self, group.name))
        return {name: _plain(value) for name, value in flat.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
