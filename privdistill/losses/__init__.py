"""Terms, their algebra and their mathematics. Nothing here knows the wrapper."""

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
from privdistill.losses.response import HintonKL, LogitMSE, ProbabilityMSE, ReliableSoftTargetCE
from privdistill.losses.schedules import Ramp, warm_up

__all__ = [
    "AttentionTransfer",
    "ChannelWise",
    "ContrastiveProjection",
    "FeatureCosine",
    "FeatureL2",
    "Gram",
    "GroundTruth",
    "HintonKL",
    "LatentKL",
    "LogitMSE",
    "Objective",
    "ProbabilityMSE",
    "Ramp",
    "ReliableSoftTargetCE",
    "SoftTargetDiceBCE",
    "Term",
    "VariationalInformation",
    "as_objective",
    "warm_up",
]
