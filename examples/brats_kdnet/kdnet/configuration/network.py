"""Options of the networks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kdnet.configuration.arguments import Arguments


@dataclass(frozen=True)
class NetworkConfig:
    """The networks: one for baseline and student, and for the teacher unless it has its own.

    Args:
        backbone: "kdnet" (the paper, Fig. 1), "multiresunet", or the import path of a class.
        backbone_arguments: Arguments of its class, such as {channels: [8, 16, 32]}.
        teacher_backbone: The teacher's; that of the student if none is given, as in the paper,
            section 2.
        teacher_backbone_arguments: Arguments of its class; those of the student if neither they
            nor another teacher_backbone are given.
        activation: "softmax" for exclusive classes (the paper, section 2.1), "sigmoid" for
            overlapping regions.
        teacher_model: model.safetensors of a trained teacher, instead of training one. One
            that has seen a subject of the held-out fold is refused.
        trust_backbone: Import paths of networks that the file of teacher_model may name. Importing
            a module runs it, so a file alone gets networks of this application and some of MONAI.
    """

    backbone: str = "kdnet"
    backbone_arguments: Arguments = field(default_factory=dict)
    teacher_backbone: str | None = None
    teacher_backbone_arguments: Arguments | None = None
    activation: Literal["softmax", "sigmoid"] = "softmax"
    teacher_model: Path | None = None
    trust_backbone: tuple[str, ...] = ()

    def vouched(self, *, own: bool) -> frozenset[str]:
        """Return the networks that the user, not a file, has named."""
        arguments = (self.backbone_arguments, self.teacher_backbone_arguments or {})
        parts = [given.get(part) for given in arguments for part in ("segmenter", "generator")]
        named = {str(name) for name in (self.backbone, self.teacher_backbone, *parts) if name}
        return frozenset({*self.trust_backbone, *(name for name in named if own or "." in name)})

    def of(self, role: str) -> tuple[str, dict[str, Any]]:
        """Return backbone and arguments of a role's network."""
        if role != "teacher":
            return self.backbone, self.backbone_arguments
        backbone = self.teacher_backbone or self.backbone
        shared = self.backbone_arguments if backbone == self.backbone else {}
        own = self.teacher_backbone_arguments
        return backbone, shared if own is None else own
