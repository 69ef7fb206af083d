"""Trainers that nnU-Net finds where `nnUNet_extTrainer` names this folder.

The short ones are for trials on phantoms; for real training take `nnUNetTrainer` for the teacher
and `nnUNetTrainerDistillation` for the student.
"""

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from privdistill.integrations.nnunet import nnUNetTrainerDistillation

__all__ = ["nnUNetTrainerDistillation", "nnUNetTrainerDistillationShort", "nnUNetTrainerShort"]


class nnUNetTrainerShort(nnUNetTrainer):  # noqa: N801
    """nnU-Net's trainer with 4 epochs of 60 steps instead of 1,000 of 250."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch = 4, 60
        self.num_val_iterations_per_epoch = 5


class nnUNetTrainerDistillationShort(nnUNetTrainerDistillation, nnUNetTrainerShort):  # noqa: N801
    """The student's trainer, as short as the teacher's."""
