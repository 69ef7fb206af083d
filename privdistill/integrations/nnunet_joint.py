"""Teacher and student of nnU-Net joined in a wrapper, and nnU-Net's loss joined with its objective.

The wrapper is told what nnU-Net knows: patches, labels or regions, the weights of the heads.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from privdistill.exceptions import ObjectiveError
from privdistill.integrations.nnunet_student import StudentTrainer
from privdistill.losses import Objective, Term
from privdistill.step import Output
from privdistill.taps import Tap
from privdistill.wrapper import DistillationWrapper


def build_wrapper(
    trainer: StudentTrainer,
    teacher: nn.Module,
    objective: Term | Objective,
    taps: Mapping[str, Tap],
) -> DistillationWrapper:
    """Put a teacher and the network of a trainer into a wrapper.

    Args:
        trainer: Initialized, with the student as its network.
        teacher: Of all channels.
        objective: What the student learns from it.
        taps: Layer pairs for terms on features.

    Returns:
        The wrapper, on the trainer's device.
    """
    channels, size = len(trainer.inputs.modalities), trainer.configuration_manager.patch_size
    return DistillationWrapper(
        teacher.to(trainer.device),
        trainer.network,
        objective=objective,
        inputs=trainer.inputs,
        taps=taps,
        activation="sigmoid" if trainer.label_manager.has_regions else "softmax",
        example=torch.zeros(1, channels, *size, device=trainer.device),
        head_weights=getattr(trainer.loss, "weight_factors", None),
    )


def refuse_reference(objective: Objective) -> None:
    """Refuse an objective that would count the reference twice.

    Args:
        objective: Of the wrapper.

    Raises:
        ObjectiveError: If one of its terms reads the reference.
    """
    if objective.needs_target:
        raise ObjectiveError(
            f"The objective {objective} reads the reference, which nnU-Net's own loss "
            "does already, with its ignore label and regions. Leave that term out; its weight "
            "is 1 - imitation."
        )


def train_adapters(kd: DistillationWrapper, optimizer: torch.optim.Optimizer) -> None:
    """Let nnU-Net's optimizer train what the wrapper has beside the student.

    Args:
        kd: The wrapper.
        optimizer: Of the student's parameters.
    """
    known = set(kd.student.parameters())
    more = [weight for weight in kd.parameters() if weight not in known]
    if more:
        optimizer.add_param_group({"params": more})


class JointLoss:
    """`(1 - imitation)` times nnU-Net's loss of the student, plus the objective of the wrapper.

    Args:
        loss: nnU-Net's, of logits and target.
        imitation: Share of the teacher, lambda in [0, 1].

    Attributes:
        terms: nnU-Net's loss, as "nnunet", and every term of the last call, unweighted, detached.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor], imitation: float) -> None:
        self.terms: dict[str, Tensor] = {}
        self._loss, self._share = loss, imitation

    def __call__(self, out: Output, target: Any) -> Tensor:
        """Return the loss to train with.

        Args:
            out: What a step of the wrapper returned.
            target: As nnU-Net's loss takes it.

        Returns:
            A scalar.
        """
        reference = self._loss(out.student, target)
        self.terms = {"nnunet": reference.detach(), **out.terms}
        return (1 - self._share) * reference + out.loss
