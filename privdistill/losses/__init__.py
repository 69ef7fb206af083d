"""Terms, their algebra and their mathematics. Nothing here knows the wrapper."""

from privdistill.losses.base import Objective, Term, as_objective
from privdistill.losses.dice_bce import GroundTruth, SoftTargetDiceBCE
from privdistill.losses.latent import LatentKL
from privdistill.losses.schedules import Ramp, warm_up

__all__ = [
    "GroundTruth",
    "LatentKL",
    "Objective",
    "Ramp",
    "SoftTargetDiceBCE",
    "Term",
    "as_objective",
    "warm_up",
]
