import math

import pytest
import torch

from privdistill.functional import binarise, latent_kl, mix_logits, probabilities, resize

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
    assert binarise(logits, "argmax").flatten().tolist() == [1, 0, 0, 0]


def test_sigmoid_binarisation_is_logit_above_zero():
    logits = torch.tensor([[[0.1], [0.0], [-3.0]]])
    assert binarise(logits, "positive").flatten().tolist() == [1, 0, 0]


def test_of_equal_logits_the_first_is_the_largest():
    logits = torch.tensor([[[2.0, 0.0], [2.0, 1.0], [1.0, 1.0]]])
    assert binarise(logits, "argmax").tolist() == [[[1, 0], [0, 1], [0, 0]]]
    grid = torch.randint(0, 3, (2, 5, 50)).half()
    hot = torch.nn.functional.one_hot(grid.argmax(1), 5).movedim(-1, 1)
    assert torch.equal(binarise(grid, "argmax"), hot.float())


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
