"""A trainer of nnU-Net v2 that distils a plain nnU-Net of many channels into one of a few."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed

from privdistill import (
    DistillationWrapper,
    LifecycleError,
    Objective,
    ObjectiveError,
    Output,
    PrivilegedInput,
    SoftTargetDiceBCE,
    Tap,
    Term,
)

try:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from privdistill.integrations.nnunet_teacher import Whole, digest, load_teacher
except ImportError as error:
    raise ImportError(
        "privdistill.integrations.nnunet needs the package nnunetv2, which cannot be imported "
        f"({error}). Install it: pip install './privdistill[nnunet]' beside a checkout."
    ) from error

from privdistill.integrations import nnunet_folder as folder
from privdistill.integrations import nnunet_options as options
from privdistill.integrations import nnunet_plans as plans_of


class nnUNetTrainerDistillation(nnUNetTrainer):  # noqa: N801  (nnU-Net finds trainers by such names)
    """Train a student of some channels with a plain nnU-Net of all channels as its teacher.

    Plans, patches, augmentation, deep supervision and nnU-Net's own loss stay; the loss becomes
    `(1 - imitation) * nnU-Net's + build_objective()`. At imitation 0 there is no teacher, which
    trains the baseline to compare with. The end of the training writes a stand-alone model folder,
    beside this one under the name of nnU-Net's trainer.

    Options are environment variables, or attributes of a subclass, which win. The teacher is the
    `checkpoint_final.pth` of the same fold.

    Args:
        plans: As for every trainer of nnU-Net, and so are the others; of all channels.
        configuration: Name, such as "3d_fullres"; no stage of a cascade that needs another one.
        fold: Number, or "all".
        dataset_json: What `dataset.json` holds.
        device: Where to train.

    Attributes:
        student_channels: Names or numbers of the student's channels, in the order of its input;
            `PRIVDISTILL_CHANNELS`, with commas.
        teacher_folder: Model folder of the teacher; `PRIVDISTILL_TEACHER`.
        imitation: Share of the teacher, lambda in [0, 1]; `PRIVDISTILL_IMITATION`, 0.5 otherwise.
        taps: Layer pairs for terms on features, as in `DistillationWrapper`.

    Raises:
        ModalityError: If the channels are not those of the data set.
        ObjectiveError: If an option has no meaning, or a term reads the reference.
        LifecycleError: In several processes, for a cascade, or if the teacher does not fit.

    Source:
        Lopez-Paz et al. 2016, arXiv:1511.03643, section 4, for lambda and soft targets; T = 1 and
        equal shares are ours, after docs/results/when-it-helps.
    """

    network: Any
    loss: Any
    dataset_class: Any

    student_channels: ClassVar[Sequence[str]] = ()
    teacher_folder: ClassVar[str | Path] = ""
    imitation: ClassVar[float | None] = None
    taps: ClassVar[Mapping[str, Tap]] = {}

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ) -> None:
        if distributed.is_initialized():
            raise LifecycleError(
                "nnUNetTrainerDistillation trains in one process. Leave -num_gpus out, and train "
                "folds or channels on the other GPUs."
            )
        channels = options.student_channels(self.student_channels, dataset_json)
        self._share = options.imitation(self.imitation)
        every = {key: value for key, value in plans.items() if key != "continue_training"}
        whole = PlansManager(deepcopy(every)).get_configuration(configuration)
        if whole.previous_stage_name is not None:
            raise LifecycleError(
                f"{configuration} is the second stage of a cascade, whose input holds what the "
                "first one predicted. Distil 2d, 3d_lowres or 3d_fullres."
            )
        self._channels, self._whole = channels, Whole(every, whole, dataset_json)
        names = [f"{i}:{name}" for i, name in enumerate(plans_of.channel_names(dataset_json))]
        self.inputs = PrivilegedInput(names, student=[names[index] for index in channels])
        own = plans_of.plans_name(plans["plans_name"], dataset_json, channels)
        own += "" if self._share else "_baseline"
        reduced = plans_of.reduced_plans(every, configuration, whole.configuration, channels, own)
        reduced["continue_training"] = plans.get("continue_training", False)
        dataset = plans_of.reduced_dataset(dataset_json, channels)
        super().__init__(reduced, configuration, fold, dataset, device)
        self.kd: DistillationWrapper | None = None
        self._terms: dict[str, Tensor] = {}

    def build_objective(self) -> Term | Objective:
        """Return what the student learns from the teacher; a subclass may return anything else.

        Returns:
            `imitation` times soft targets at T = 1, unless overridden. nnU-Net's own loss reads the
            reference, so that no term here may.
        """
        return self._share * SoftTargetDiceBCE(temperature=1.0, binarisation="soft")

    def initialize(self) -> None:
        """Build the student as nnU-Net does, then put teacher and student into a wrapper."""
        super().initialize()
        if not self._share:
            return
        channels, size = len(self.inputs.modalities), self.configuration_manager.patch_size
        teacher = load_teacher(options.teacher_folder(self.teacher_folder), self._whole, self.fold)
        self._teacher_digest = digest(teacher)
        self.kd = DistillationWrapper(
            teacher.to(self.device),
            self.network,
            objective=self.build_objective(),
            inputs=self.inputs,
            taps=self.taps,
            activation="sigmoid" if self.label_manager.has_regions else "softmax",
            example=torch.zeros(1, channels, *size, device=self.device),
            head_weights=getattr(self.loss, "weight_factors", None),
        )
        if self.kd.objective.needs_target:
            raise ObjectiveError(
                f"The objective {self.kd.objective} reads the reference, which nnU-Net's own loss "
                "does already, with its ignore label and regions. Leave that term out; its weight "
                "is 1 - imitation."
            )
        known = set(self.network.parameters())
        more = [weight for weight in self.kd.parameters() if weight not in known]
        if more:
            self.optimizer.add_param_group({"params": more})
        self.print_to_log_file(self.kd, add_timestamp=False)

    def get_training_transforms(self, *arguments: Any, **more: Any) -> Any:
        """Return nnU-Net's augmentation, for images that still have every channel."""
        more["use_mask_for_norm"] = self._whole.configuration.use_mask_for_norm
        return super().get_training_transforms(*arguments, **more)

    def _seen(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch | {"data": self.inputs.for_student(batch["data"])}

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Take nnU-Net's own step, on the wrapper and the joint loss."""
        if self.kd is None:
            return dict(super().train_step(self._seen(batch)))
        network, loss = self.network, self.loss

        def joint(out: Output, target: Any) -> Tensor:
            reference: Tensor = loss(out.student, target)
            self._terms = {"nnunet": reference.detach(), **out.terms}
            return (1 - self._share) * reference + out.loss

        self.network, self.loss = self.kd, joint
        try:
            result = dict(super().train_step(batch))
        finally:
            self.network, self.loss = network, loss
        return result | {name: value.float().cpu().numpy() for name, value in self._terms.items()}

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Write the mean of every term, unweighted, into the log."""
        super().on_train_epoch_end(train_outputs)
        for name in self._terms:
            mean = sum(float(step[name]) for step in train_outputs) / len(train_outputs)
            self.print_to_log_file(f"{name} {mean:.4f}")

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score the student alone, by nnU-Net's own loss."""
        return dict(super().validation_step(self._seen(batch)))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the validation cases with the student's channels."""
        every, channels = self.dataset_class, self._channels

        class StudentCases(every):  # type: ignore[misc, valid-type, unused-ignore]
            def load_case(self, identifier: str) -> tuple[Any, ...]:
                data, *rest = super().load_case(identifier)
                return data[:][channels], *rest

        self.dataset_class = StudentCases
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.dataset_class = every

    def _told(self) -> dict[str, Any]:
        """What a training must not change when it goes on."""
        objective = None if self.kd is None else str(self.kd.objective)
        told = {"channels": self._channels, "imitation": self._share, "objective": objective}
        if self.kd is not None:
            told |= {"teacher": self._teacher_digest, "taps": str(dict(self.taps))}
        return told

    def save_checkpoint(self, filename: str) -> None:
        """Save nnU-Net's checkpoint of the student; adapters and counts go into its `init_args`."""
        state = {} if self.kd is None else self.kd.state_dict()
        rest = {key: value for key, value in state.items() if not key.startswith("student.")}
        self.my_init_kwargs[folder.OWN] = {"told": self._told(), "state": rest}
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
        if self.kd is not None:
            self.kd.load_state_dict(self.kd.state_dict() | found["state"])

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
