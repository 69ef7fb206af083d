"""Sums of Dice and cross-entropy, and their gradient, against float64 and values by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from privdistill.losses import fused
from privdistill.losses.fused import Comparison, dice_bce_sums

ACTIVATIONS = ["softmax", "sigmoid"]


def expected(logits, target, binary, activation, *, squared=False, mask=None):
    """The sums by the operators in float64, `1 - p` as the sum of the others."""
    z = logits.double()
    if activation == "sigmoid":
        p, log_p, log_rest = z.sigmoid(), F.logsigmoid(z), F.logsigmoid(-z)
    else:
        p, log_p = z.softmax(1), z.log_softmax(1)
        others = [[j for j in range(z.shape[1]) if j != c] for c in range(z.shape[1])]
        log_rest = torch.stack([log_p[:, js].logsumexp(1) for js in others], 1)
    target, binary = target.double(), binary.double()
    cost = -(binary * log_p + (1 - binary) * log_rest)
    if mask is not None:
        p, target, cost = p * mask, target * mask, cost * mask
    size = p.square() + target.square() if squared else p + target
    return [values.flatten(2).sum(2) for values in (p * target, size, cost)]


def total(sums):
    """A scalar in which every sum has another slope."""
    weights = torch.linspace(-1, 2, sums[0].numel()).double().reshape(sums[0].shape)
    return sum(((k + 1) * weights * values).sum() for k, values in enumerate(sums))


@pytest.mark.parametrize(
    ("squared", "size"), [(False, [1.3 + 1.0, 0.7]), (True, [0.9**2 + 0.4**2 + 1, 0.25 + 0.01])]
)
def test_overlap_and_size_by_hand(squared, size):
    p, t = torch.tensor([[[0.9, 0.4], [0.5, 0.1]]]), torch.tensor([[[1.0, 0.0], [0.0, 0.1]]])
    sums = dice_bce_sums(p.logit(), Comparison(t), "sigmoid", squared=squared)
    assert sums.overlap.flatten().tolist() == pytest.approx([0.9, 0.01])
    size[1] += 0.01 if squared else 0
    assert sums.size.flatten().tolist() == pytest.approx(size)


def test_softmax_cross_entropy_by_hand():
    logits = torch.tensor([[[math.log(2.0)], [0.0], [0.0]]])  # p = 1/2, 1/4, 1/4
    sums = dice_bce_sums(logits, Comparison(torch.tensor([[[1.0], [0.0], [0.0]]])), "softmax")
    wanted = [math.log(2), -math.log(0.75), -math.log(0.75)]
    assert sums.cross_entropy.flatten().tolist() == pytest.approx(wanted)
    assert sums.overlap.flatten().tolist() == pytest.approx([0.5, 0, 0])


def test_of_two_winners_neither_is_one():
    logits = torch.tensor([[[7.0], [7.0], [-1e4]]])
    sums = dice_bce_sums(logits, Comparison(torch.tensor([[[0.0], [0.0], [1.0]]])), "softmax")
    log2 = math.log(2)
    assert sums.cross_entropy.flatten().tolist() == pytest.approx([log2, log2, 1e4 + 7 + log2])


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=5), st.floats(0, 1))
def test_softmax_cross_entropy_equals_the_formula_in_float64(values, target):
    logits = torch.tensor(values).reshape(1, -1, 1)
    targets = torch.full_like(logits, target)
    found = dice_bce_sums(logits, Comparison(targets), "softmax").cross_entropy
    wanted = expected(logits, targets, targets, "softmax")[2]
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gap", [0.0, 1e-3, 1.0, 20.0, 80.0, 200.0, 2e4])
@pytest.mark.parametrize("winner", [0, 1, 2])
def test_gradient_of_every_gap_equals_that_of_float64(gap, winner):
    logits = torch.tensor([0.3, -1.0, 0.0])
    logits[winner] = logits.max() + gap
    logits = logits.reshape(1, 3, 1)
    for binary in torch.eye(3).reshape(3, 1, 3, 1).unbind():
        found, wanted = logits.clone().requires_grad_(), logits.double().requires_grad_()
        total(dice_bce_sums(found, Comparison(binary), "softmax")).backward()
        total(expected(wanted, binary, binary, "softmax")).backward()
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sums_are_finite_with_gradient_for_extreme_logits(dtype, activation):
    logits = torch.tensor([[[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 0]]], dtype=dtype)
    wrong = (logits <= 0).float()
    logits.requires_grad_()
    sums = dice_bce_sums(logits, Comparison(wrong), activation)
    sum(values.sum() for values in sums).backward()
    assert all(values.dtype == torch.float32 for values in sums)
    assert all(torch.isfinite(values).all() for values in (*sums, logits.grad))
    assert logits.grad.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "slice"])
@pytest.mark.parametrize("masked", [0, 1, 3])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradient_equal_those_of_the_operators(
    monkeypatch, activation, squared, masked, layout
):
    monkeypatch.setattr(fused, "_IN_CACHE", 64)
    logits = torch.randn(3, 3, 5, 4, 8, dtype=torch.float64)
    if layout == "channels last":
        logits = logits.to(memory_format=torch.channels_last_3d)
    logits = logits[..., ::2] if layout == "slice" else logits
    soft, teacher = torch.rand(logits.shape), torch.randn(logits.shape)
    mask = (torch.rand(3, masked, *logits.shape[2:]) > 0.3).float() if masked else None
    hard = (teacher > 0).float()
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    comparison = Comparison(soft, None, "positive", teacher, mask)
    found = dice_bce_sums(one, comparison, activation, squared=squared)
    wanted = expected(other, soft, hard, activation, squared=squared, mask=mask)
    torch.testing.assert_close(list(found), wanted)
    total(found).backward()
    total(wanted).backward()
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_agrees_with_finite_differences(activation):
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: torch.stack(dice_bce_sums(x, Comparison(target), activation)), (logits,)
    )


@pytest.mark.parametrize("size", [32, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["random", "constant"])
def test_means_over_a_patch_are_exact_to_a_millionth(size, activation, kind):
    shape = (1, 3, size, size, size)
    logits, teacher = 4 * torch.randn(shape), torch.randn(shape)
    if kind == "constant":
        logits = torch.tensor([0.1, -0.7, -3.3]).reshape(1, 3, 1, 1, 1).expand(shape).contiguous()
    rule = "argmax" if activation == "softmax" else "positive"
    found = dice_bce_sums(logits, Comparison(teacher, 5.0, rule), activation)
    tempered = teacher.double() / 5
    if activation == "softmax":
        soft = tempered.softmax(1)
        hard = F.one_hot(teacher.argmax(1), 3).movedim(-1, 1)
    else:
        soft, hard = tempered.sigmoid(), teacher > 0
    wanted = expected(logits, soft, hard, activation)
    for mine, exact in zip(found, wanted, strict=True):
        error = (mine.double() - exact).abs() / size**3
        assert (error <= 1e-6 * (exact / size**3).clamp(min=1)).all()


def test_gradient_keeps_the_layout_of_the_logits():
    logits = torch.randn(2, 3, 4, 4, 4).to(memory_format=torch.channels_last_3d).requires_grad_()
    sums = dice_bce_sums(logits, Comparison(torch.rand(2, 3, 4, 4, 4)), "softmax")
    (gradient,) = torch.autograd.grad(sums.cross_entropy.sum(), logits)
    assert gradient.is_contiguous(memory_format=torch.channels_last_3d)


def test_no_map_is_kept_for_the_gradient_but_what_came_in():
    logits, teacher = torch.randn(2, 3, 50, requires_grad=True), torch.randn(2, 3, 50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        dice_bce_sums(logits, Comparison(teacher, 5.0, "argmax"), "softmax")
    came_in = {logits.data_ptr(), teacher.data_ptr()}
    assert {values.data_ptr() for values in kept} == came_in
