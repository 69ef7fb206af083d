"""The trainer: nnU-Net's own, with a teacher of all channels and a student of some."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, distributed, nn

from privdistill import DistillationWrapper, Objective, PrivilegedInput, SoftTargetDiceBCE, Term
from privdistill.cache.fingerprint import hashed
from privdistill.exceptions import LifecycleError, ObjectiveError
from privdistill.integrations.nnunet import export
from privdistill.integrations.nnunet import plans as files
from privdistill.losses.options import SHARE, check


class nnUNetTrainerDistillation(nnUNetTrainer):  # noqa: N801  (nnU-Net finds trainers by such names)
    """Train a student of some channels with a plain nnU-Net of all channels as its teacher.

    Plans, patches, augmentation, deep supervision and nnU-Net's own loss stay; the loss becomes
    `(1 - imitation) * nnU-Net's + build_objective()`. At imitation 0 there is no teacher, which
    trains the baseline to compare with. Images are loaded and augmented whole; validation and
    checkpoints are the student's alone. The end of the training writes a stand-alone model folder,
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
        trusted: Packages, with a dot, whose classes the teacher's plans may name.
        inputs: Which channels each network sees.
        kd: The wrapper, once initialized; None at imitation 0.

    Raises:
        ModalityError: If the channels are not those of the data set.
        ObjectiveError: If an option has no meaning, or a term reads the reference.
        LifecycleError: In several processes, for a cascade, or if the teacher does not fit.

    Source:
        Lopez-Paz et al. 2016, arXiv:1511.03643, section 4, for lambda and soft targets; T = 1 and
        equal shares are ours, after docs/results/when-it-helps.
    """

    student_channels: ClassVar[Sequence[str]] = ()
    teacher_folder: ClassVar[str | Path] = ""
    imitation: ClassVar[float | None] = None
    taps: ClassVar[Mapping[str, Any]] = {}
    trusted: ClassVar[Sequence[str]] = ("dynamic_network_architectures.", "torch.nn.")
    network: Any
    loss: Any
    dataset_class: Any

    # Exactly nnU-Net's five arguments, which it reads by name.
    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ) -> None:
        if distributed.is_initialized():
            raise LifecycleError("A distillation trains in one process. Leave -num_gpus out.")
        self._whole = PlansManager(plans).get_configuration(configuration)
        if self._whole.previous_stage_name is not None:
            raise LifecycleError(
                f"{configuration} is the second stage of a cascade, which sees what the first one "
                "predicted. Distil 2d, 3d_lowres or 3d_fullres."
            )
        resolved = self._whole.configuration
        self._facts = files.common_facts(plans, resolved, dataset_json)
        wanted = self.student_channels or os.environ.get("PRIVDISTILL_CHANNELS", "").split(",")
        self._channels = files.channel_indices(dataset_json, [name.strip() for name in wanted])
        # Numbered, as the names of channels may repeat.
        names = [f"{i}:{name}" for i, name in enumerate(self._facts["channels"])]
        self.inputs = PrivilegedInput(names, student=[names[index] for index in self._channels])
        self._share = self._imitation()
        self.kd: DistillationWrapper | None = None
        own = files.reduced_plans(plans, configuration, resolved, dataset_json, self._channels)
        # A folder of its own: a baseline and a distillation must not overwrite each other.
        own["plans_name"] += "" if self._share else "_baseline"
        dataset = files.reduced_dataset(dataset_json, self._channels)
        super().__init__(own, configuration, fold, dataset, device)

    def _imitation(self) -> float:
        """The teacher's share of the loss."""
        told = os.environ.get("PRIVDISTILL_IMITATION", "0.5")
        share: Any = told if self.imitation is None else self.imitation
        with suppress(ValueError):
            share = float(share)
        check("PRIVDISTILL_IMITATION", SHARE, imitation=share)
        return float(share)

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
        teacher, patch = self._load_teacher(), self.configuration_manager.patch_size
        self.kd = DistillationWrapper(
            teacher.to(self.device),
            self.network,
            objective=self.build_objective(),
            inputs=self.inputs,
            taps=self.taps,
            activation="sigmoid" if self.label_manager.has_regions else "softmax",
            example=torch.zeros(1, len(self.inputs.modalities), *patch, device=self.device),
            head_weights=getattr(self.loss, "weight_factors", None),
        )
        if self.kd.objective.needs_target:
            raise ObjectiveError(
                f"The objective {self.kd.objective} reads the reference, as nnU-Net's own loss "
                "does already. Leave that term out; its weight is 1 - imitation."
            )
        student = set(self.network.parameters())
        adapters = [weight for weight in self.kd.parameters() if weight not in student]
        if adapters:
            self.optimizer.add_param_group({"params": adapters})
        self.print_to_log_file(self.kd, add_timestamp=False)

    def _load_teacher(self) -> nn.Module:
        """Build the trained nnU-Net of the same fold.

        It returns its finest head alone: coarser heads are trained with little weight or none, and
        the library brings its logits to each resolution of the student's.
        """
        named = self.teacher_folder or os.environ.get("PRIVDISTILL_TEACHER", "")
        if not named:
            raise LifecycleError(
                "No teacher is given. Set PRIVDISTILL_TEACHER to the folder of a plain nnU-Net of "
                "every channel, nnUNet_results/DATASET/nnUNetTrainer__PLANS__CONFIGURATION, or "
                "PRIVDISTILL_IMITATION=0 to train the baseline without one."
            )
        folder = Path(named)
        plans, dataset = (files.read(folder / f"{name}.json") for name in ("plans", "dataset"))
        found = files.read(folder / f"fold_{self.fold}" / "checkpoint_final.pth")
        manager = PlansManager(plans)
        own = manager.get_configuration(found["init_args"]["configuration"])
        facts = files.common_facts(plans, own.configuration, dataset)
        unlike = files.differences(facts, self._facts)
        if unlike:
            raise LifecycleError(
                f"The teacher in {folder} was trained on other patches: its and the student's "
                f"{unlike}. Train both with the same plans of all channels, -p PLANS."
            )
        self._refuse_foreign(own, folder)
        kind = recursive_find_trainer_class_by_name(found["trainer_name"])
        heads = manager.get_label_manager(dataset).num_segmentation_heads
        network: nn.Module = kind.build_network_architecture(
            manager, own, len(facts["channels"]), heads, enable_deep_supervision=False
        )
        network.load_state_dict(found["network_weights"])
        self._teacher = hashed(found["network_weights"])[:16]
        return network

    def _refuse_foreign(self, configuration: ConfigurationManager, folder: Path) -> None:
        """Refuse plans of a stranger that would import and call anything but a network."""
        arguments = configuration.network_arch_init_kwargs
        named = [arguments[name] for name in configuration.network_arch_init_kwargs_req_import]
        named = [configuration.network_arch_class_name, *(str(name) for name in named if name)]
        foreign = [name for name in named if not name.startswith(tuple(self.trusted))]
        if foreign:
            raise LifecycleError(
                f"The plans in {folder} build the network from {', '.join(foreign)}, outside of "
                f"{' and '.join(self.trusted)}, and nnU-Net calls what plans name. If you trust "
                "who made them, add the package to `trusted` in a subclass."
            )

    def _seen(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch | {"data": self.inputs.for_student(batch["data"])}

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Take nnU-Net's own step, on the wrapper and the joint loss."""
        if self.kd is None:
            return dict(super().train_step(self._seen(batch)))
        network, loss = self.network, self.loss
        terms: dict[str, Tensor] = {}

        def joint(out: Any, target: Any) -> Tensor:
            reference = loss(out.student, target)
            terms.update(nnunet=reference.detach(), **out.terms)
            return (1 - self._share) * reference + out.loss

        # Lent for one call, so that scaling, clipping and autocast stay nnU-Net's own.
        self.network, self.loss = self.kd, joint
        try:
            result = dict(super().train_step(batch))
        finally:
            self.network, self.loss = network, loss
        return result | {name: value.float().cpu().numpy() for name, value in terms.items()}

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Write the mean of every term, unweighted, into the log."""
        super().on_train_epoch_end(train_outputs)
        for name in [name for name in train_outputs[0] if name != "loss"]:
            mean = sum(float(step[name]) for step in train_outputs) / len(train_outputs)
            self.print_to_log_file(f"{name} {mean:.4f}")

    def get_training_transforms(self, *arguments: Any, **more: Any) -> Any:
        """Return nnU-Net's augmentation, for images that still have every channel."""
        # nnU-Net hands over one flag per channel, of the student's alone.
        more["use_mask_for_norm"] = self._whole.use_mask_for_norm
        return super().get_training_transforms(*arguments, **more)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score the student alone, by nnU-Net's own loss."""
        return dict(super().validation_step(self._seen(batch)))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the validation cases with the student's channels."""
        every, channels = self.dataset_class, self._channels

        class StudentCases(every):  # type: ignore[misc, valid-type, unused-ignore]
            def load_case(self, identifier: str) -> tuple[Any, ...]:
                data, *rest = super().load_case(identifier)
                # Cases may be read lazily, and then take no list of indices.
                return data[:][channels], *rest

        self.dataset_class = StudentCases
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.dataset_class = every

    def _told(self) -> dict[str, Any]:
        """What a training must not change when it goes on."""
        told = {"channels": self._channels, "imitation": self._share}
        if self.kd is not None:
            told |= {"objective": str(self.kd.objective), "taps": str(dict(self.taps))}
            told["teacher"] = self._teacher
        return told

    def save_checkpoint(self, filename: str) -> None:
        """Save nnU-Net's checkpoint of the student; what is beside it goes into its `init_args`."""
        state = {} if self.kd is None else self.kd.state_dict()
        # The student is the checkpoint's own network already.
        beside = {key: value for key, value in state.items() if not key.startswith("student.")}
        self.my_init_kwargs[export.OWN] = {"told": self._told(), "state": beside}
        super().save_checkpoint(filename)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Go on from a checkpoint, if it was made with the same options."""
        super().load_checkpoint(filename_or_checkpoint)
        found = self.my_init_kwargs.get(export.OWN, {})
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
        trained = Path(self.output_folder_base)
        out = export.stand_alone_folder(trained)
        export.check_one_model(out, trained, {"this training": self._told()})
        super().on_train_start()

    def on_train_end(self) -> None:
        """End as nnU-Net does, and write the stand-alone folder of this fold."""
        super().on_train_end()
        if not self.disable_checkpointing:
            written = export.write_student_folder(Path(self.output_folder_base), fold=self.fold)
            self.print_to_log_file(f"The stand-alone model: {written}")
