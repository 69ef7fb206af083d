"""Values of every term and preset, to ten digits, so that none moves unseen."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from privdistill import (
    AttentionTransfer,
    CenteredKernelAlignment,
    ChannelWise,
    ContrastiveProjection,
    FeatureCosine,
    FeatureL1,
    FeatureL2,
    Gram,
    GroundTruth,
    HintonKL,
    HolisticAdversarial,
    LatentKL,
    LocalConsistency,
    LogitMSE,
    PairwiseSimilarity,
    ProbabilityMSE,
    PrototypeSimilarity,
    ReliableSoftTargetCE,
    SoftTargetDiceBCE,
    Step,
    TapPair,
    VariationalInformation,
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


def waves(*shape, speed, size=2.0):
    """Numbers that look random and are the same on every machine."""
    count = torch.Size(shape).numel()
    numbers = torch.arange(count, dtype=torch.float64)
    return (size * torch.sin(speed * numbers + 0.3 * numbers.square() / count)).reshape(shape)


def step(**options):
    student = waves(2, 3, 4, 6, speed=1.7).requires_grad_()
    teacher = waves(2, 3, 4, 6, speed=2.9, size=4.0)
    features = waves(2, 5, 2, 3, speed=0.7).requires_grad_()
    pair = TapPair(features, waves(2, 5, 2, 3, speed=1.1))
    taps = {"bottleneck": pair, "decoder": pair}
    target = waves(2, 4, 6, speed=0.9, size=1.49).round().long() + 1
    if options.get("activation") == "sigmoid":
        target = (waves(2, 3, 4, 6, speed=0.9) > 0).double()
    image = waves(2, 1, 4, 6, speed=0.2)
    usual = {"target": target, "image": image, "taps": taps}
    return Step(student, teacher, **usual | options)


def critic():
    network = nn.Sequential(nn.Conv2d(4, 2, 3), nn.Tanh())
    return set_weights(network.double())


def set_weights(module):
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(waves(*weight.shape, speed=1.3, size=0.5))
    return module


def measured(objective, **options):
    """An objective's value and the squared length of its gradient."""
    given = step(**options)
    objective = 1.0 * objective
    for term in objective.terms:
        term.build(given)
    set_weights(objective.double())
    loss, _ = objective(given)
    leaves = (given.student, given.taps["bottleneck"].student)
    slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.item(), sum(slope.square().sum().item() for slope in slopes if slope is not None)


OF_BOTH = [
    SoftTargetDiceBCE(),
    SoftTargetDiceBCE(temperature=2.0, binarisation="soft", squared_denominator=True),
    SoftTargetDiceBCE(student_temperature=3.0, scale_by_t2=True, batch_dice=True),
    SoftTargetDiceBCE(include_background=False, smoothing=0.5),
    SoftTargetDiceBCE(class_weights=(1, 2, 3), binarisation="positive"),
    GroundTruth(),
    GroundTruth(include_background=False, squared_denominator=True),
    GroundTruth(batch_dice=True, class_weights=(1, 2, 3), smoothing=0.5),
    GroundTruth(ignore_index=2),
    HintonKL(),
    HintonKL(temperature=2.0, standardise=True),
    HintonKL(scale_by_t2=False, reduction="sum"),
    LogitMSE(),
    ProbabilityMSE(),
    ReliableSoftTargetCE(),
    ReliableSoftTargetCE(temperature=2.0),
    LocalConsistency(),
    LocalConsistency(reduction="sum"),
    HolisticAdversarial(critic()),
    PrototypeSimilarity(),
    hinton(),
    generalized(),
    kdnet(),
    pmkl(),
    protokd(),
    structured(),
    xie(),
    m3ae(),
    passion(),
    mstkdnet(),
]
OF_FEATURES = [
    LogitMSE(centre=True),
    LatentKL(),
    LatentKL(normalisation="softmax_channel", temperature=2.0),
    LatentKL(normalisation="softmax_spatial"),
    LatentKL(normalisation="l1", reduction="mean"),
    AttentionTransfer(),
    AttentionTransfer(power=3.0),
    ChannelWise(),
    FeatureCosine(),
    FeatureL1(),
    FeatureL2(),
    FeatureL2(normalise=True),
    Gram(),
    PairwiseSimilarity(),
    PairwiseSimilarity(scale=1.0),
    CenteredKernelAlignment(),
    CenteredKernelAlignment(over="samples"),
    VariationalInformation(hidden=4),
    ContrastiveProjection(margin=1.5),
]
FIELDS = {
    "softmax": {},
    "sigmoid": {"activation": "sigmoid"},
    "labelled": {"labelled": torch.tensor([True, False])},
    "weighted": {"sample_weights": torch.tensor([1.0, 3.0])},
    "several": {
        "members": (
            (waves(2, 3, 4, 6, speed=2.9, size=4.0), 0.25),
            # In float32 the share's logarithm would differ from one processor to another.
            (waves(2, 3, 4, 6, speed=0.4, size=3.0), torch.tensor([0.75, 0.75]).double()),
        )
    },
}
CASES = {f"{term!r}, softmax": (term, {}) for term in OF_FEATURES}
CASES |= {
    f"{term!r}, {field}": (term, options) for term in OF_BOTH for field, options in FIELDS.items()
}
KEPT = json.loads((Path(__file__).parent / "values.json").read_text())


def test_every_case_is_kept():
    assert CASES.keys() == KEPT.keys()


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_what_they_were(case):
    term, options = CASES[case]
    assert measured(term, **options) == pytest.approx(KEPT[case], rel=1e-9, abs=1e-12)
