"""A trainer of nnU-Net v2 that distils a plain nnU-Net of many channels into one of a few."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from privdistill import DistillationWrapper, Objective, SoftTargetDiceBCE, Tap, Term

try:
    from privdistill.integrations import nnunet_joint as joint
    from privdistill.integrations.nnunet_student import StudentTrainer, refuse_processes
    from privdistill.integrations.nnunet_teacher import digest, load_teacher
except ImportError as error:
    raise ImportError(
        "privdistill.integrations.nnunet needs the package nnunetv2, which cannot be imported "
        f"({error}). Install it: pip install './privdistill[nnunet]' beside a checkout."
    ) from error

from privdistill.integrations import nnunet_options as options


class nnUNetTrainerDistillation(StudentTrainer):  # noqa: N801  (nnU-Net finds trainers by such names)
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
        refuse_processes()
        channels = options.student_channels(self.student_channels, dataset_json)
        self._share = options.imitation(self.imitation)
        own = "" if self._share else "_baseline"
        super().__init__(
            plans, configuration, fold, dataset_json, device, channels=channels, suffix=own
        )
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
        teacher = load_teacher(options.teacher_folder(self.teacher_folder), self._whole, self.fold)
        self._teacher_digest = digest(teacher)
        self.kd = joint.build_wrapper(self, teacher, self.build_objective(), self.taps)
        joint.refuse_reference(self.kd.objective)
        joint.train_adapters(self.kd, self.optimizer)
        self.print_to_log_file(self.kd, add_timestamp=False)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Take nnU-Net's own step, on the wrapper and the joint loss."""
        if self.kd is None:
            return dict(super().train_step(self._seen(batch)))
        network, loss = self.network, self.loss
        both = joint.JointLoss(loss, self._share)
        self.network, self.loss = self.kd, both
        try:
            result = dict(super().train_step(batch))
        finally:
            self.network, self.loss = network, loss
        self._terms = both.terms
        return result | {name: value.float().cpu().numpy() for name, value in self._terms.items()}

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Write the mean of every term, unweighted, into the log."""
        super().on_train_epoch_end(train_outputs)
        for name in self._terms:
            mean = sum(float(step[name]) for step in train_outputs) / len(train_outputs)
            self.print_to_log_file(f"{name} {mean:.4f}")

    def _told(self) -> dict[str, Any]:
        objective = None if self.kd is None else str(self.kd.objective)
        told = super()._told() | {"imitation": self._share, "objective": objective}
        if self.kd is not None:
            told |= {"teacher": self._teacher_digest, "taps": str(dict(self.taps))}
        return told

    def _state(self) -> dict[str, Any]:
        """Of adapters and counts."""
        state = {} if self.kd is None else self.kd.state_dict()
        return {key: value for key, value in state.items() if not key.startswith("student.")}

    def _set_state(self, state: dict[str, Any]) -> None:
        if self.kd is not None:
            self.kd.load_state_dict(self.kd.state_dict() | state)
