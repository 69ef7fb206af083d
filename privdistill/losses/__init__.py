"""Losses as functions and as terms, and the algebra of terms. Nothing here knows the wrapper."""

from privdistill.losses.adversarial import Critic, HolisticAdversarial, critic_loss
from privdistill.losses.features import (
    AttentionTransfer,
    ChannelWise,
    FeatureCosine,
    FeatureL2,
    Gram,
    LatentKL,
)
from privdistill.losses.learned import ContrastiveProjection, VariationalInformation
from privdistill.losses.objective import Objective, Term, as_objective
from privdistill.losses.presets import generalized, hinton, kdnet, pmkl, protokd, structured, xie
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

__all__ = [
    "AttentionTransfer",
    "CenteredKernelAlignment",
    "ChannelWise",
    "ContrastiveProjection",
    "Critic",
    "FeatureCosine",
    "FeatureL2",
    "FeatureTerm",
    "Gram",
    "GroundTruth",
    "HintonKL",
    "HolisticAdversarial",
    "LatentKL",
    "LocalConsistency",
    "LogitMSE",
    "Objective",
    "PairwiseSimilarity",
    "ProbabilityMSE",
    "PrototypeSimilarity",
    "Ramp",
    "ReliableSoftTargetCE",
    "ResponseTerm",
    "SoftTargetDiceBCE",
    "Term",
    "VariationalInformation",
    "as_objective",
    "critic_loss",
    "generalized",
    "hinton",
    "kdnet",
    "pmkl",
    "protokd",
    "structured",
    "warm_up",
    "xie",
]
