"""Distil a network that saw every modality into one that sees a single one.

Start with `DistillationWrapper`; its docstring holds a complete example.
"""

import importlib
import typing

from privdistill.cache import CacheStore, TeacherCache, precompute
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
from privdistill.inputs import PrivilegedInput, assert_no_leak
from privdistill.losses.adversarial import Critic, HolisticAdversarial, critic_loss
from privdistill.losses.features import (
    AttentionTransfer,
    ChannelWise,
    FeatureCosine,
    FeatureL1,
    FeatureL2,
    Gram,
    LatentKL,
)
from privdistill.losses.learned import ContrastiveProjection, VariationalInformation
from privdistill.losses.objective import Objective, Term
from privdistill.losses.presets import (
    generalized,
    hinton,
    kdnet,
    m3ae,
    mstkdnet,
    passion,
    pmkl,
    protokd,
    structured,
    xie,
)
from privdistill.losses.relational import (
    CenteredKernelAlignment,
    LocalConsistency,
    PairwiseSimilarity,
    PrototypeSimilarity,
)
from privdistill.losses.response import (
    HintonKL,
    LogitMSE,
    ProbabilityMSE,
    ReliableSoftTargetCE,
    SoftTargetDiceBCE,
)
from privdistill.losses.schedules import Ramp, warm_up
from privdistill.losses.supervised import GroundTruth
from privdistill.losses.term import FeatureTerm, ResponseTerm
from privdistill.sides.teachers import Ensemble, JointTeacher, MovingAverage
from privdistill.step import Output, Step, TapPair
from privdistill.taps import Layer, Tap
from privdistill.wrapper import DistillationWrapper

if typing.TYPE_CHECKING:
    from privdistill.diagnosis import Diagnosis, diagnose, fit_temperature
    from privdistill.losses.agreement import target_agreement
    from privdistill.sides.layer_table import describe

__version__ = "0.1.0"

# By rows, as one looks for a name and not for a line.
__all__ = [
    "AttentionTransfer", "CacheError", "CacheStore", "CacheWarning", "CenteredKernelAlignment",
    "ChannelWise", "ContrastiveProjection", "Critic", "Diagnosis", "DistillationWrapper",
    "Ensemble", "FeatureCosine", "FeatureL1", "FeatureL2", "FeatureTerm", "Gram", "GroundTruth",
    "HintonKL", "HolisticAdversarial", "Inheritance", "JointTeacher", "LatentKL", "Layer",
    "LayerNotFoundError", "LifecycleError", "LocalConsistency", "LogitMSE", "ModalityError",
    "MovingAverage", "Objective", "ObjectiveError", "Output", "PairwiseSimilarity",
    "PrivDistillError", "PrivilegedInput", "ProbabilityMSE", "PrototypeSimilarity", "Ramp",
    "ReliableSoftTargetCE", "ResponseTerm", "ShapeMismatchError", "SoftTargetDiceBCE", "Step",
    "Tap", "TapPair", "TeacherCache", "Term", "VariationalInformation", "assert_no_leak",
    "critic_loss", "describe", "diagnose", "fit_temperature", "generalized", "hinton", "inherit",
    "kdnet", "m3ae", "mstkdnet", "passion", "pmkl", "precompute", "protokd", "structured",
    "target_agreement", "warm_up", "xie",
]  # fmt: skip

# What looks at networks before a training is imported when it is asked for: a fifth of the time.
_LATER = {
    "Diagnosis": "diagnosis",
    "describe": "sides.layer_table",
    "diagnose": "diagnosis",
    "fit_temperature": "diagnosis",
    "target_agreement": "losses.agreement",
}


def __getattr__(name: str) -> typing.Any:
    if name not in _LATER:
        raise AttributeError(f"module 'privdistill' has no attribute '{name}'")
    return getattr(importlib.import_module(f"privdistill.{_LATER[name]}"), name)
