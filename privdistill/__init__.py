"""Distil a network that saw every modality into one that sees a single one.

Start with `DistillationWrapper`; its docstring holds a complete example.
"""

from privdistill.cache import CacheStore, TeacherCache, precompute
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
    Critic,
    FeatureCosine,
    FeatureL2,
    FeatureTerm,
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
    ResponseTerm,
    SoftTargetDiceBCE,
    Term,
    VariationalInformation,
    critic_loss,
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
from privdistill.sides.teachers import Ensemble, JointTeacher, MovingAverage
from privdistill.step import Output, Step, TapPair
from privdistill.taps import Layer, Tap
from privdistill.temperature import fit_temperature
from privdistill.wrapper import DistillationWrapper

__version__ = "0.1.0"

__all__ = [
    "AttentionTransfer",
    "CacheError",
    "CacheStore",
    "CacheWarning",
    "CenteredKernelAlignment",
    "ChannelWise",
    "ContrastiveProjection",
    "Critic",
    "Diagnosis",
    "DistillationWrapper",
    "Ensemble",
    "FeatureCosine",
    "FeatureL2",
    "FeatureTerm",
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
    "ResponseTerm",
    "ShapeMismatchError",
    "SoftTargetDiceBCE",
    "Step",
    "Tap",
    "TapPair",
    "TeacherCache",
    "Term",
    "VariationalInformation",
    "assert_no_leak",
    "critic_loss",
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
