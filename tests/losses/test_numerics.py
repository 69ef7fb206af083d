"""Digits that a formula can lose: near agreement, under offsets, at products of weights."""

import math

import pytest
import torch

from privdistill import (
    ChannelWise,
    GroundTruth,
    HintonKL,
    LatentKL,
    ObjectiveError,
    PrototypeSimilarity,
    ReliableSoftTargetCE,
    ShapeMismatchError,
    SoftTargetDiceBCE,
    Step,
    TapPair,
    kdnet,
    m3ae,
    mstkdnet,
    passion,
    pmkl,
    protokd,
    structured,
    xie,
)

DIVERGENCES = {
    "channels": ChannelWise(temperature=10.0),
    "latent": LatentKL(),
    "latent by voxel": LatentKL(normalisation="softmax_channel"),
    "hinton": HintonKL(temperature=10.0),
}


def reference(name, student, teacher):
    """In float64, from the formula."""
    student, teacher = student.double(), teacher.double()
    if name == "hinton":
        logs, scale = [(x / 10).log_softmax(1) for x in (student, teacher)], 100
        return scale * (logs[1].exp() * (logs[1] - logs[0])).sum(1).mean().item()
    flat = {"channels": 2, "latent": 1, "latent by voxel": 2}[name]
    temperature = 10 if name == "channels" else 1
    student, teacher = (x.flatten(flat) / temperature for x in (student, teacher))
    axis = 1 if name == "latent by voxel" else -1
    logs = [x.log_softmax(axis) for x in (student, teacher)]
    return temperature**2 * (logs[1].exp() * (logs[1] - logs[0])).sum(axis).mean().item()


@pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-4])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_keep_their_digits_on_large_maps(name, noise):
    teacher = torch.randn(1, 4, 32, 32, 32)
    student = teacher + noise * torch.randn_like(teacher)
    step = Step(student, teacher, taps={"bottleneck": TapPair(student, teacher)})
    found, exact = DIVERGENCES[name](step).item(), reference(name, student, teacher)
    assert found >= -1e-7
    assert found == pytest.approx(exact, abs=2e-6 * max(1, exact))
    if noise == 1e-3:
        assert found == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4])
def test_an_offset_of_all_logits_costs_no_digits(offset):
    # Quarters, which float32 holds at any of these sizes.
    logits = (torch.randn(1, 4, 64) * 16).round() / 16
    target = torch.randint(0, 4, (1, 64))
    plain = GroundTruth()(Step(logits, target=target)).item()
    assert GroundTruth()(Step(logits + offset, target=target)).item() == pytest.approx(plain, 1e-6)


def test_equal_logits_of_any_size_cost_what_chance_costs():
    found = GroundTruth()(Step(torch.full((1, 4, 8), 1e4), target=torch.zeros(1, 8).long())).item()
    dice = (2 * 8 / 4 / (8 / 4 + 8)) / 4
    cross_entropy = (math.log(4) + 3 * math.log(4 / 3)) / 4
    assert found == pytest.approx(1 - dice + cross_entropy, rel=1e-5)


def test_teachers_made_in_inference_mode_teach():
    with torch.inference_mode():
        teacher, target = torch.randn(2, 2, 4), torch.zeros(2, 4).long()
    student = torch.randn(2, 2, 4, requires_grad=True)
    (SoftTargetDiceBCE() + GroundTruth())(Step(student, teacher, target=target))[0].backward()
    assert student.grad.isfinite().all()


def test_a_sample_without_a_region_that_weighs_is_left_out():
    logits = torch.randn(2, 2, 4)
    target = torch.zeros(2, 2, 4)
    target[1, 1] = 255
    term = GroundTruth(activation="sigmoid", class_weights=(0, 1), ignore_index=255)
    alone = term(Step(logits[:1], target=target[:1]))
    assert term(Step(logits, target=target)) == pytest.approx(alone.item())


@pytest.mark.parametrize("term", [ReliableSoftTargetCE, PrototypeSimilarity])
def test_logits_coarser_than_the_target_are_enlarged_on_request(term):
    student, teacher, features = (torch.randn(2, 3, 4, 4) for _ in range(3))
    target = torch.arange(3).repeat(2, 8, 3)[:, :, :8]
    taps = {"decoder": TapPair(features, features + torch.randn(2, 3, 4, 4))}
    step = Step(student, teacher, target=target, taps=taps)
    with pytest.raises(ShapeMismatchError, match=r"the term's option resize='logits' enlarges"):
        term()(step)
    size = {"size": (8, 8), "mode": "bilinear"}
    large = [torch.nn.functional.interpolate(logits, **size) for logits in (student, teacher)]
    expected = term()(Step(*large, target=target, taps=taps))
    assert torch.allclose(term(resize="logits")(step), expected)


def test_an_ignored_index_that_is_a_value_of_one_hot_targets_is_refused():
    target = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    with pytest.raises(ObjectiveError, match=r"ignore_index=0 would ignore whole channels"):
        GroundTruth(ignore_index=0)(Step(torch.zeros(1, 2, 2), target=target))


@pytest.mark.parametrize("shape", [(0, 2, 4), (1, 2, 0), (1, 2)])
@pytest.mark.parametrize("term", [GroundTruth(), HintonKL(), SoftTargetDiceBCE()])
def test_logits_without_voxels_are_refused(term, shape):
    logits = torch.zeros(shape)
    with pytest.raises(
        ShapeMismatchError, match=r"the logits are .*; expected \(B, C, \*spatial\)"
    ):
        term(Step(logits, logits, target=torch.zeros(shape)))


MISTAKES = {
    "product of weights": lambda: 1e200 * (1e200 * GroundTruth()),
    "huge whole number": lambda: 10**400 * GroundTruth(),
    "sum with a number": lambda: GroundTruth() + 3,
    "temperature as text": lambda: HintonKL(temperature="4"),
    "no temperature": lambda: SoftTargetDiceBCE(temperature=None),
    "latent weight": lambda: kdnet(latent_weight=-1),
    "pixelwise": lambda: structured(pixelwise=-1),
    "no classes": lambda: protokd(classes=0),
    "reliable": lambda: pmkl(reliable=float("nan")),
    "zero order": lambda: xie(zero_order=-1),
    "features": lambda: m3ae(features=-1),
    "no classes to average": lambda: passion(classes=0),
    "prototypes": lambda: passion(prototypes=-1),
    "distance of features": lambda: mstkdnet(features=-1),
    "consistency": lambda: mstkdnet(consistency=-1),
    "name that is a number": lambda: GroundTruth().named(3),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_has_no_meaning_is_one_of_our_errors(mistake):
    with pytest.raises(ObjectiveError):
        MISTAKES[mistake]()


def test_terms_add_up_with_sum():
    total = sum([GroundTruth(), 2 * LatentKL(), HintonKL()])
    assert list(total.named_terms) == ["ground_truth", "latent_kl", "hinton_kl"]
