"""A trainer of nnU-Net v2 for a student of some channels, from its plans to its own folder."""

from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed

from privdistill.exceptions import LifecycleError
from privdistill.inputs import PrivilegedInput
from privdistill.integrations import nnunet_folder as folder
from privdistill.integrations import nnunet_plans as plans_of
from privdistill.integrations.nnunet_data import student_cases, whole_data


def refuse_processes() -> None:
    """Refuse to train in several processes.

    Raises:
        LifecycleError: If this is one of them.
    """
    if distributed.is_initialized():
        raise LifecycleError(
            "nnUNetTrainerDistillation trains in one process. Leave -num_gpus out, and train "
            "folds or channels on the other GPUs."
        )


class StudentTrainer(nnUNetTrainer):
    """Train on images of every channel a network that has some of them.

    Images are loaded and augmented whole, so that a teacher may see them; what a step does with
    them is a subclass's, whose constructor takes the five arguments of nnU-Net's alone, as nnU-Net
    reads them by name. Validation, checkpoints and the stand-alone folder that the end of a
    training writes are the student's alone.

    Args:
        plans: As for every trainer of nnU-Net, and so are the next ones; of all channels.
        configuration: Name; no stage of a cascade that needs another one.
        fold: Number, or "all".
        dataset_json: What `dataset.json` holds.
        device: Where to train.
        channels: Positions of the student's.
        suffix: End of the name of the student's plans.

    Attributes:
        inputs: Which channels the student sees.

    Raises:
        LifecycleError: For a cascade.
    """

    network: Any
    loss: Any
    dataset_class: Any

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device,
        *,
        channels: list[int],
        suffix: str = "",
    ) -> None:
        every = {key: value for key, value in plans.items() if key != "continue_training"}
        self._channels, self._whole = channels, whole_data(every, configuration, dataset_json)
        names = [f"{i}:{name}" for i, name in enumerate(plans_of.channel_names(dataset_json))]
        self.inputs = PrivilegedInput(names, student=[names[index] for index in channels])
        own = plans_of.plans_name(plans["plans_name"], dataset_json, channels) + suffix
        resolved = self._whole.configuration.configuration
        reduced = plans_of.reduced_plans(every, configuration, resolved, channels, own)
        reduced["continue_training"] = plans.get("continue_training", False)
        dataset = plans_of.reduced_dataset(dataset_json, channels)
        super().__init__(reduced, configuration, fold, dataset, device)

    def _seen(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch | {"data": self.inputs.for_student(batch["data"])}

    def get_training_transforms(self, *arguments: Any, **more: Any) -> Any:
        """Return nnU-Net's augmentation, for images that still have every channel."""
        more["use_mask_for_norm"] = self._whole.configuration.use_mask_for_norm
        return super().get_training_transforms(*arguments, **more)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score the student alone, by nnU-Net's own loss."""
        return dict(super().validation_step(self._seen(batch)))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the validation cases with the student's channels."""
        every = self.dataset_class
        self.dataset_class = student_cases(every, self._channels)
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.dataset_class = every

    def _told(self) -> dict[str, Any]:
        """What a training must not change when it goes on."""
        return {"channels": self._channels}

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the student."""
        return {}

    def _set_state(self, state: dict[str, Any]) -> None:
        """Take back what `_state` gave."""

    def save_checkpoint(self, filename: str) -> None:
        """Save nnU-Net's checkpoint of the student; what is beside it goes into its `init_args`."""
        self.my_init_kwargs[folder.OWN] = {"told": self._told(), "state": self._state()}
        super().save_checkpoint(filename)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Go on from a checkpoint, if it was made with the same options."""
        super().load_checkpoint(filename_or_checkpoint)
        found = self.my_init_kwargs.get(folder.OWN, {})
        if found.get("told") != self._told():
            raise LifecycleError(
                f"{filename_or_checkpoint} was trained with {found.get('told')}, and this training "
                f"is asked for {self._told()}. Set the options of then, or train anew without --c."
            )
        self._set_state(found["state"])

    def on_train_start(self) -> None:
        """Begin, unless the stand-alone folder could not be written in the end."""
        if not self.was_initialized:
            self.initialize()
        folder.student_folder(Path(self.output_folder_base), self._told())
        super().on_train_start()

    def on_train_end(self) -> None:
        """End as nnU-Net does, and write the stand-alone folder of this fold."""
        super().on_train_end()
        if not self.disable_checkpointing:
            written = folder.write_student_folder(Path(self.output_folder_base), fold=self.fold)
            self.print_to_log_file(f"The stand-alone model: {written}")
