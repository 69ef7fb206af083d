"""What is trained and where its files go."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from kdnet.config import TrainingConfig
from kdnet.data.preprocessing import Sample
from kdnet.training.checkpoint import ModelMetadata
from kdnet.training.performance import MemoryFormat


@dataclass(frozen=True)
class Task:
    """What is trained and where its files go.

    Attributes:
        metadata: Describes the network; its role names the training.
        settings: Optimizer, schedule, selection.
        folder: Folder of this network's files.
        scalars: Folder of its TensorBoard events.
        memory_format: Layout of images and weights.
        console: Where progress is shown.
        volumes: Whole validation subjects, where a sample is a part of one: their Dice is that of
            whole volumes.
        seen_by_teachers: Subjects that each teacher was trained or selected on.
    """

    metadata: ModelMetadata
    settings: TrainingConfig
    folder: Path
    scalars: Path
    memory_format: MemoryFormat
    console: Console
    volumes: Sequence[Sample] | None = None
    seen_by_teachers: tuple[frozenset[str], ...] = ()

    def teacher_weights(self, names: Sequence[str]) -> Tensor | None:
        """Say which teachers teach which samples: those that were not trained on them."""
        if len(self.seen_by_teachers) < 2:
            return None
        cases = [name.partition("/")[0] for name in names]
        new = torch.tensor([[c not in seen for seen in self.seen_by_teachers] for c in cases])
        return (new | ~new.any(dim=1, keepdim=True)).float()

    @property
    def role(self) -> str:
        """The network's role."""
        return self.metadata.role

    @property
    def model_file(self) -> Path:
        """The selected weights."""
        return self.folder / "model.safetensors"

    @property
    def last_file(self) -> Path:
        """The weights after the last finished epoch."""
        return self.folder / "last.safetensors"

    @property
    def state_file(self) -> Path:
        """What goes on after an epoch; written last, so that it vouches for the other files."""
        return self.folder / "state.pt"

    @property
    def pause_file(self) -> Path:
        """What goes on in the middle of an epoch; there only after an interruption."""
        return self.folder / "pause.pt"
