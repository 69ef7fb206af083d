"""Networks that end in a sigmoid or softmax are refused, and no other."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from privdistill import GroundTruth, LatentKL, ObjectiveError, SoftTargetDiceBCE

BOTH = SoftTargetDiceBCE() + GroundTruth()


def ends_in(last, channels=1, classes=3):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, stride=2, padding=1),
        nn.InstanceNorm2d(4),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(4, classes, 1),
        last,
    )


class Rising(nn.Module):
    """A sigmoid that no operator tells."""

    def forward(self, x):
        return ((20 * x).tanh() + 1) / 2


class Averaged(nn.Module):
    """A mean of two probabilities, resampled."""

    def forward(self, x):
        both = torch.stack((x.softmax(1), (2 * x).softmax(1))).mean(0)
        return nn.functional.interpolate(both, size=x.shape[2:], mode="bilinear")


class Normalised(nn.Module):
    def forward(self, x):
        return x.exp() / x.exp().sum(1, keepdim=True)


PROBABILITIES = [nn.Sigmoid(), nn.Softmax(1), nn.Hardsigmoid(), Rising(), Averaged(), Normalised()]


@pytest.mark.parametrize("last", PROBABILITIES, ids=lambda last: type(last).__name__)
def test_probabilities_of_either_network_are_refused(build, last):
    with pytest.raises(ObjectiveError, match=r"The student .*probabilities.*hook"):
        build(student=ends_in(last), objective=BOTH)
    with pytest.raises(ObjectiveError, match=r"The teacher .*probabilities.*hook"):
        build(teacher=ends_in(last, 4), objective=BOTH)


@pytest.mark.parametrize("classes", [1, 3])
def test_probabilities_are_told_where_they_are_constant(build, classes):
    net = ends_in(nn.Sigmoid(), classes=classes)
    nn.init.zeros_(net[3].weight)
    with pytest.raises(ObjectiveError, match="probabilities"):
        build(student=net, teacher=ends_in(nn.Identity(), 4, classes), objective=BOTH)


def gated():
    """Attention by a sigmoid inside, and logits outside."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return 0.1 * self.head(x * self.gate(x).sigmoid()).abs()

    return Gate()


def small_head(weight, bias):
    """Logits that lie in [0, 1] whatever the input, as instance norm takes its scale away."""
    net = ends_in(nn.Identity())
    nn.init.constant_(net[3].weight, weight)
    net[3].bias.data = torch.as_tensor(bias).expand(3).clone()
    return net


@pytest.mark.parametrize(
    "student",
    [
        small_head(0.01, 0.5),
        small_head(0.0, 0.0),
        small_head(0.0, 1 / 3),
        small_head(0.0, [0.2, 0.3, 0.5]),
        small_head(0.0, [0.0, 1.0, 0.5]),
        ends_in(nn.ReLU()),
        ends_in(gated()),
        ends_in(nn.LogSoftmax(1)),
        nn.Sequential(ends_in(nn.Sigmoid()), nn.Conv2d(3, 3, 1)),
    ],
)
def test_logits_that_lie_in_the_unit_interval_are_logits(build, student):
    build(student=student, objective=BOTH)


class ByHand(nn.Module):
    def __init__(self, logarithm):
        super().__init__()
        self.logarithm = logarithm

    def forward(self, x):
        return self.logarithm(x)


LOGARITHMS = [
    nn.LogSoftmax(1),
    ByHand(lambda x: (x.softmax(1) + 1e-8).log()),
    ByHand(lambda x: x - x.logsumexp(1, keepdim=True)),
]


@pytest.mark.parametrize("last", LOGARITHMS)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_log_probabilities_are_refused_under_a_sigmoid_alone(build, role, last):
    network = {role: ends_in(last, 4 if role == "teacher" else 1)}
    build(objective=BOTH, **network).close()
    with pytest.raises(ObjectiveError, match=f"The {role} .*log-probabilities"):
        build(objective=BOTH, activation="sigmoid", **network)


@pytest.mark.parametrize(("own", "whole"), [("sigmoid", "softmax"), ("softmax", "sigmoid")])
def test_what_log_probabilities_are_taken_for_is_what_the_terms_say(build, own, whole):
    objective = SoftTargetDiceBCE(activation=own) + GroundTruth(activation=own) + LatentKL()
    with nullcontext() if own == "softmax" else pytest.raises(ObjectiveError, match="log-prob"):
        build(student=ends_in(nn.LogSoftmax(1)), objective=objective, activation=whole)


@pytest.mark.parametrize("share", [0.01, 1 / 4])
@pytest.mark.parametrize("spread", [0.0, 1e-3])
def test_scores_that_are_not_positive_are_no_log_probabilities(build, share, spread):
    student = ends_in(nn.Identity())
    nn.init.normal_(student[3].weight, std=spread)
    # One quarter for each of three regions, and for what is none of them, sums to one in odds.
    nn.init.constant_(student[3].bias, math.log(share / (1 - share)))
    build(student=student, objective=BOTH, activation="sigmoid")


def test_the_repairs_named_work(build):
    objective = SoftTargetDiceBCE() + GroundTruth()
    teacher = ends_in(nn.Sigmoid(), 4)
    teacher.register_forward_hook(lambda *call: call[-1].logit(eps=1e-6))
    build(teacher=teacher, student=ends_in(nn.Identity()), objective=objective).close()
    both = {"teacher": ends_in(nn.Sigmoid(), 4), "student": ends_in(nn.Sigmoid())}
    build(**both, objective=objective, select_logits=lambda out: out.logit(eps=1e-6))


def test_looking_for_probabilities_leaves_the_random_state_alone(build):
    student, state = small_head(0.01, 0.5), torch.get_rng_state()
    build(student=student, objective=BOTH)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("program", [torch.jit.script, torch.compile])
def test_probabilities_of_a_program_are_refused(build, program):
    teacher = program(ends_in(nn.Sigmoid(), 4).eval())
    with pytest.raises(ObjectiveError, match=r"The teacher .*probabilities"):
        build(teacher=teacher, objective=BOTH)
