import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privdistill.losses.functional import (
    binarise,
    binary_cross_entropy,
    latent_kl,
    mix_logits,
    probabilities,
    resize,
    soft_dice,
)

NORMALISATIONS = ["softmax", "softmax_channel", "softmax_spatial", "l1"]


def test_softmax_divides_logits_by_the_temperature():
    p = probabilities(torch.tensor([[[math.log(4.0) * 2], [0.0]]]), "softmax", temperature=2.0)
    assert p.flatten().tolist() == pytest.approx([0.8, 0.2])


def test_sigmoid_divides_logits_by_the_temperature():
    p = probabilities(torch.tensor([[[math.log(3.0) * 5]]]), "sigmoid", temperature=5.0)
    assert p.item() == pytest.approx(0.75)


def test_argmax_binarisation_survives_a_temperature_that_a_threshold_would_not():
    logits = torch.tensor([[[5.0], [0.0], [0.0], [0.0]]])
    assert probabilities(logits, "softmax", temperature=5.0).max() < 0.5
    assert binarise(logits, "softmax").flatten().tolist() == [1, 0, 0, 0]


def test_sigmoid_binarisation_is_logit_above_zero():
    logits = torch.tensor([[[0.1], [0.0], [-3.0]]])
    assert binarise(logits, "sigmoid").flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("squared", "value"), [(False, 2 * 0.9 / (1.3 + 1.0)), (True, 2 * 0.9 / (0.9**2 + 0.4**2 + 1))]
)
def test_dice_by_hand(squared, value):
    p, t = torch.tensor([[[0.9, 0.4]]]), torch.tensor([[[1.0, 0.0]]])
    dice = soft_dice(p, t, squared_denominator=squared, smoothing=1e-9)
    assert dice.item() == pytest.approx(value, abs=1e-6)


def test_dice_of_two_empty_maps_is_one():
    assert soft_dice(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)).item() == 1


def test_batch_dice_pools_voxels_of_all_samples():
    p = torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]])
    t = torch.tensor([[[1.0, 1.0]], [[1.0, 1.0]]])
    assert soft_dice(p, t).flatten().tolist() == pytest.approx([1, 0], abs=1e-4)
    assert soft_dice(p, t, batch_dice=True).item() == pytest.approx(2 * 2 / (2 + 4), abs=1e-4)


def test_softmax_cross_entropy_by_hand():
    logits = torch.tensor([[[math.log(2.0)], [0.0], [0.0]]])  # p = 1/2, 1/4, 1/4
    loss = binary_cross_entropy(logits, torch.tensor([[[1.0], [0.0], [0.0]]]), "softmax")
    expected = [math.log(2), -math.log(0.75), -math.log(0.75)]
    assert loss.flatten().tolist() == pytest.approx(expected)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=5), st.floats(0, 1))
def test_softmax_cross_entropy_equals_the_formula_in_float64(values, target):
    logits = torch.tensor(values).reshape(1, -1, 1)
    p = logits.double().softmax(1)
    rest = torch.stack(
        [p[:, [j for j in range(len(values)) if j != i]].sum(1) for i in range(len(values))], 1
    )
    expected = -(target * p.log() + (1 - target) * rest.log())
    found = binary_cross_entropy(logits, torch.full_like(logits, target), "softmax")
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_cross_entropy_is_finite_with_gradient_for_extreme_logits(dtype, activation):
    logits = torch.tensor([[[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 0]]], dtype=dtype)
    logits.requires_grad_()
    loss = binary_cross_entropy(logits, 1 - binarise(logits.detach(), activation), activation)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_cross_entropy_gradient(activation):
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: binary_cross_entropy(x, target, activation), (logits,)
    )


def test_latent_kl_by_hand():
    student = torch.zeros(1, 1, 2)  # p = 1/2, 1/2
    teacher = torch.tensor([[[math.log(3.0), 0.0]]])  # q = 3/4, 1/4
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert latent_kl(student, teacher).item() == pytest.approx(expected)


def test_latent_kl_runs_from_teacher_to_student():
    one, other = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 0.5]]])
    assert latent_kl(one, other) != latent_kl(other, one)


def test_l1_latent_kl_by_hand_with_signed_features():
    student, teacher = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[-3.0, 1.0]]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert latent_kl(student, teacher, normalisation="l1").item() == pytest.approx(expected)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_latent_kl_of_equal_features_is_zero(normalisation):
    z = torch.randn(2, 3, 4, 4)
    assert latent_kl(z, z, normalisation=normalisation).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_latent_kl_gradient_reaches_the_student_only(normalisation):
    student = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def loss(x):
        return latent_kl(x, teacher, normalisation=normalisation)

    assert torch.autograd.gradcheck(loss, (student,))
    loss(student).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latent_kl_is_finite_for_extreme_features(normalisation, dtype):
    student = (torch.randn(1, 4, 4, 4, 4) * 1e4).to(dtype).requires_grad_()
    value = latent_kl(student, -student.detach(), normalisation=normalisation)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_latent_kl_sums_over_the_vector_so_that_it_does_not_vanish():
    # facts for 30,720 LeakyReLU features, uncorrelated: about 0.55, against 1.8e-5 for a mean
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.leaky_relu(torch.randn(2, 1, 480, 4, 4, 4, generator=generator), 0.01)
    assert latent_kl(z[0], z[1]).item() == pytest.approx(0.55, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_half_precision_logits_give_float32_probabilities(dtype, activation):
    logits = torch.randn(1, 3, 5).to(dtype)
    found = probabilities(logits, activation, temperature=3.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, probabilities(logits.float(), activation, temperature=3.0))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_mixed_logits_give_the_mean_of_the_probabilities(activation, temperature):
    one, two = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    mixed = mix_logits([(one, 0.25), (two, 0.75)], activation, temperature=temperature)
    sigma = torch.sigmoid if activation == "sigmoid" else (lambda x: x.softmax(1))
    wanted = 0.25 * sigma(one / temperature) + 0.75 * sigma(two / temperature)
    assert torch.allclose(sigma(mixed / temperature), wanted)


def test_mixed_logits_are_finite_for_extreme_ones():
    far = torch.tensor([[[1e4], [-1e4]]], dtype=torch.float16)
    for activation in ("softmax", "sigmoid"):
        assert mix_logits([(far, 0.5), (-far, 0.5)], activation).isfinite().all()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_logits_are_resampled_in_every_number_of_axes(axes):
    values = torch.randn(1, 2, *[4] * axes)
    assert resize(values, [4] * axes) is values
    assert resize(values, [8] * axes).shape == (1, 2, *[8] * axes)
    coarse = resize(values, [2] * axes)
    assert torch.allclose(coarse.mean(), values.mean(), atol=1e-6)
