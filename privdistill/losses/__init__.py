"""Terms, their algebra and their mathematics. Nothing here knows the wrapper."""

from privdistill.losses.adversarial import HolisticAdversarial
from privdistill.losses.base import Objective, Term, as_objective
from privdistill.losses.dice_bce import GroundTruth, SoftTargetDiceBCE
from privdistill.losses.features import (
    AttentionTransfer,
    ChannelWise,
    ContrastiveProjection,
    FeatureCosine,
    FeatureL2,
    Gram,
    VariationalInformation,
)
from privdistill.losses.latent import LatentKL
from privdistill.losses.presets import generalized, hinton, kdnet, pmkl, protokd, structured, xie
from privdistill.losses.relational import (
    CenteredKernelAlignment,
    LocalConsistency,
    PairwiseSimilarity,
    PrototypeSimilarity,
)
from privdistill.losses.response import HintonKL, LogitMSE, ProbabilityMSE, ReliableSoftTargetCE
from privdistill.losses.schedules import Ramp, warm_up

__all__ = [
    "AttentionTransfer",
    "CenteredKernelAlignment",
    "ChannelWise",
    "ContrastiveProjection",
    "FeatureCosine",
    "FeatureL2",
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
    "SoftTargetDiceBCE",
    "Term",
    "VariationalInformation",
    "as_objective",
    "generalized",
    "hinton",
    "kdnet",
    "pmkl",
    "protokd",
    "structured",
    "warm_up",
    "xie",
]
