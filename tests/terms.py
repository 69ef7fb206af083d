"""Every term of the library, ready to be made."""

import inspect

import torch
from torch import nn

from privdistill import losses
from privdistill.losses import FeatureTerm, ResponseTerm, Term

KINDS = [getattr(losses, name) for name in losses.__all__]
KINDS = [kind for kind in KINDS if inspect.isclass(kind) and issubclass(kind, Term)]
KINDS = [kind for kind in KINDS if kind not in (Term, FeatureTerm, ResponseTerm)]


class MeanCritic(nn.Module):
    """A critic that takes any number of channels and axes."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (self.scale * x).square().flatten(1).mean(1)


def make(kind, **options):
    """A term with the options given, and with a critic where it needs one."""
    critic = {"critic": MeanCritic()} if kind is losses.HolisticAdversarial else {}
    return kind(**critic | options)
