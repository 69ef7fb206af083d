"""Logits beyond any number: classes that are ruled out, and float16 that overflowed."""

import pytest
import torch
from terms import KINDS, make

from privdistill import GroundTruth, ResponseTerm, Step
from privdistill.functional import channel_wise, hinton_kl, latent_kl, reliable_soft_target_ce

INF = float("inf")
OF_LOGITS = [kind for kind in KINDS if issubclass(kind, ResponseTerm | GroundTruth)]
EVERY = pytest.mark.parametrize("kind", OF_LOGITS, ids=lambda kind: kind.__name__)


def step(student, teacher, activation):
    labels = torch.arange(8).reshape(2, 2, 2) % 3
    hot = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
    target = labels if activation == "softmax" else hot
    image = torch.zeros(2, 1, 2, 2)
    return Step(student, teacher, target=target, image=image, activation=activation)


def logits(extreme, dtype):
    """One channel of some voxels, and of one all channels, are extreme."""
    values = torch.randn(2, 3, 2, 2)
    values[:, 0, 0] = extreme
    values[1, 1, 1, 0] = extreme
    values[0, :, 1, 1] = extreme
    return values.to(dtype)


@EVERY
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("extreme", [-INF, INF, 1e4, -1e4])
@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_values_and_gradients_are_finite(kind, activation, dtype, extreme, whose):
    student = logits(extreme if whose != "teacher" else 0.0, dtype).requires_grad_()
    teacher = logits(extreme if whose != "student" else 0.0, dtype)
    value = make(kind)(step(student, teacher, activation))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@EVERY
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_of_several_teachers_one_may_rule_a_class_out(kind, activation):
    student = torch.randn(2, 3, 2, 2, requires_grad=True)
    teachers = logits(-INF, torch.float32), logits(INF, torch.float32)
    given = step(student, teachers[0], activation)
    given = Step(**vars(given) | {"members": tuple((own, 0.5) for own in teachers)})
    value = make(kind)(given)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_nothing_is_lost_of_a_class_that_the_teacher_rules_out():
    student, teacher = (
        torch.tensor([[[0.3], [1.0], [-0.5]]]),
        torch.tensor([[[2.0], [-INF], [0.0]]]),
    )
    log_p, q = student.log_softmax(1)[0, :, 0], teacher.softmax(1)[0, :, 0]
    wanted = sum(a * (a.log() - b) for a, b in zip(q, log_p, strict=True) if a > 0)
    assert hinton_kl(student, teacher, temperature=1.0).item() == pytest.approx(wanted.item())
    wanted = -(q * log_p).sum().item()
    found = reliable_soft_target_ce(student, teacher, torch.tensor([[0]]), temperature=1.0)
    assert found.item() == pytest.approx(wanted)


def test_what_is_no_number_stays_so():
    broken = torch.tensor([[[float("nan")], [0.0]]])
    assert hinton_kl(broken, torch.zeros(1, 2, 1)).isnan()


@pytest.mark.parametrize("normalisation", ["softmax", "softmax_channel", "softmax_spatial"])
def test_a_share_of_zero_costs_nothing_in_features_either(normalisation):
    student = torch.randn(1, 3, 4, requires_grad=True)
    teacher = torch.randn(1, 3, 4)
    teacher[0, 1, 2] = -INF
    found = latent_kl(student, teacher, normalisation=normalisation)
    teacher[0, 1, 2] = -1e4
    assert found.item() == pytest.approx(
        latent_kl(student, teacher, normalisation=normalisation).item()
    )
    found.backward()
    assert student.grad.isfinite().all()
    assert channel_wise(student, teacher.fill_(-INF)).isfinite()
