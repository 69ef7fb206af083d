"""Terms, their algebra and their mathematics. Nothing here knows the wrapper."""

from privdistill.losses.base import Objective, Term, as_objective
from privdistill.losses.dice_bce import GroundTruth, SoftTargetDiceBCE
from privdistill.losses.latent import LatentKL

__all__ = ["GroundTruth", "LatentKL", "Objective", "SoftTargetDiceBCE", "Term", "as_objective"]
