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
from privdistill.layer_table import describe
from privdistill.leaks import assert_no_leak
from privdistill.losses import (
    GroundTruth,
    LatentKL,
    Objective,
    Ramp,
    SoftTargetDiceBCE,
    Term,
    warm_up,
)
from privdistill.output import Output, Step, TapPair
from privdistill.taps import Layer, Tap
from privdistill.teachers import Ensemble, JointTeacher, MovingAverage
from privdistill.wrapper import DistillationWrapper

__all__ = [
    "DistillationWrapper",
    "Ensemble",
    "GroundTruth",
    "JointTeacher",
    "LatentKL",
    "Layer",
    "LayerNotFoundError",
    "LifecycleError",
    "ModalityError",
    "MovingAverage",
    "Objective",
    "ObjectiveError",
    "Output",
    "PrivDistillError",
    "PrivilegedInput",
    "Ramp",
    "ShapeMismatchError",
    "SoftTargetDiceBCE",
    "Step",
    "Tap",
    "TapPair",
    "Term",
    "assert_no_leak",
    "describe",
    "warm_up",
]
