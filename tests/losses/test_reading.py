import torch

from privdistill import Step
from privdistill.losses.reading import resolve, teacher_logits

Z = torch.randn(1, 2, 3)


def test_a_terms_own_activation_wins():
    assert resolve(None, Step(Z, activation="sigmoid")) == "sigmoid"
    assert resolve("softmax", Step(Z, activation="sigmoid")) == "softmax"


def test_teacher_logits_carry_no_gradient():
    teacher = Z.clone().requires_grad_()
    assert not teacher_logits(Step(Z, teacher=teacher), "softmax", term="t").requires_grad


def test_several_teachers_are_averaged_at_the_temperature():
    step = Step(Z, teacher=Z, members=((Z, 0.5), (-Z, 0.5)))
    mixed = teacher_logits(step, "softmax", term="t", temperature=3.0)
    wanted = ((Z / 3).softmax(1) + (-Z / 3).softmax(1)) / 2
    assert torch.allclose((mixed / 3).softmax(1), wanted)
