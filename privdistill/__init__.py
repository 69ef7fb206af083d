"""Distil a network that saw every modality into one that sees a single one.

Start with `DistillationWrapper`; its docstring holds a complete example.
"""

from privdistill.exceptions import (
    LayerNotFoundError,
    LifecycleError,
    ModalityError,
    ObjectiveError,
    PrivDistillError,
    ShapeMismatchError,
)
from privdistill.inputs import PrivilegedInput
from privdistill.losses import GroundTruth, LatentKL, Objective, SoftTargetDiceBCE, Term
from privdistill.output import Output, Step, TapPair
from privdistill.taps import Tap
from privdistill.wrapper import DistillationWrapper

__all__ = [
    "DistillationWrapper",
    "GroundTruth",
    "LatentKL",
    "LayerNotFoundError",
    "LifecycleError",
    "ModalityError",
    "Objective",
    "ObjectiveError",
    "Output",
    "PrivDistillError",
    "PrivilegedInput",
    "ShapeMismatchError",
    "SoftTargetDiceBCE",
    "Step",
    "Tap",
    "TapPair",
    "Term",
]
