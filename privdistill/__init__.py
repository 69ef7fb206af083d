"""Distil a network that saw every modality into one that sees a single one.

Start with `DistillationWrapper`; its docstring holds a complete example.
"""

from privdistill.cache import TeacherCache, precompute
from privdistill.diagnosis import Diagnosis, diagnose
from privdistill.exceptions import (
    CacheError,
    CacheWarning,
    LayerNotFoundError,
    LifecycleError,
    ModalityError,
    ObjectiveError,
    PrivDistillError,
    ShapeMismatchError,
)
from privdistill.inherit import Inheritance, inherit
from privdistill.inputs import PrivilegedInput
from privdistill.layer_table import describe
from privdistill.leaks import assert_no_leak
from privdistill.losses import (
    AttentionTransfer,
    CenteredKernelAlignment,
    ChannelWise,
    ContrastiveProjection,
    FeatureCosine,
    FeatureL2,
    Gram,
    GroundTruth,
    HintonKL,
    HolisticAdversarial,
    LatentKL,
    LocalConsistency,
    LogitMSE,
    Objective,
    PairwiseSimilarity,
    ProbabilityMSE,
    PrototypeSimilarity,
    Ramp,
    ReliableSoftTargetCE,
    SoftTargetDiceBCE,
    Term,
    VariationalInformation,
    generalized,
    hinton,
    kdnet,
    pmkl,
    protokd,
    structured,
    warm_up,
    xie,
)
from privdistill.losses.agreement import target_agreement
from privdistill.output import Output, Step, TapPair
from privdistill.taps import Layer, Tap
from privdistill.teachers import Ensemble, JointTeacher, MovingAverage
from privdistill.temperature import fit_temperature
from privdistill.wrapper import DistillationWrapper

__all__ = [
    "AttentionTransfer",
    "CacheError",
    "CacheWarning",
    "CenteredKernelAlignment",
    "ChannelWise",
    "ContrastiveProjection",
    "Diagnosis",
    "DistillationWrapper",
    "Ensemble",
    "FeatureCosine",
    "FeatureL2",
    "Gram",
    "GroundTruth",
    "HintonKL",
    "HolisticAdversarial",
    "Inheritance",
    "JointTeacher",
    "LatentKL",
    "Layer",
    "LayerNotFoundError",
    "LifecycleError",
    "LocalConsistency",
    "LogitMSE",
    "ModalityError",
    "MovingAverage",
    "Objective",
    "ObjectiveError",
    "Output",
    "PairwiseSimilarity",
    "PrivDistillError",
    "PrivilegedInput",
    "ProbabilityMSE",
    "PrototypeSimilarity",
    "Ramp",
    "ReliableSoftTargetCE",
    "ShapeMismatchError",
    "SoftTargetDiceBCE",
    "Step",
    "Tap",
    "TapPair",
    "TeacherCache",
    "Term",
    "VariationalInformation",
    "assert_no_leak",
    "describe",
    "diagnose",
    "fit_temperature",
    "generalized",
    "hinton",
    "inherit",
    "kdnet",
    "pmkl",
    "precompute",
    "protokd",
    "structured",
    "target_agreement",
    "warm_up",
    "xie",
]
