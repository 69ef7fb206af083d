"""KD-Net for the configurations."""

import scripts  # noqa: F401  # makes the application's modules known
from kdnet.models.kdnet import KDNet

__all__ = ["KDNet"]
