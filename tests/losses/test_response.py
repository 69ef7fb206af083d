import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from privdistill import (
    HintonKL,
    LogitMSE,
    ObjectiveError,
    ProbabilityMSE,
    ReliableSoftTargetCE,
    ShapeMismatchError,
    SoftTargetDiceBCE,
    Step,
)
from privdistill.functional import hinton_kl, mix_logits

SHAPES = [(2, 3, 5), (2, 3, 4, 5), (2, 3, 3, 4, 2)]
TERMS = [
    HintonKL(),
    HintonKL(temperature=2.0, standardise=True),
    LogitMSE(),
    ProbabilityMSE(),
    ReliableSoftTargetCE(),
]


def pair(shape=SHAPES[1], activation="softmax", dtype=torch.float32, **options):
    student, teacher = 2 * torch.randn(shape), 3 * torch.randn(shape)
    if activation == "softmax":
        target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    else:
        target = torch.rand(shape) > 0.5
    student, teacher = student.to(dtype), teacher.to(dtype)
    return Step(student=student, teacher=teacher, target=target, activation=activation, **options)


def voxels(logits):
    """Vectors over channels, one row per voxel."""
    return logits.double().flatten(2).transpose(1, 2).flatten(0, 1).numpy()


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def kl(q, p):
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def z_score(z):
    return (z - z.mean()) / math.sqrt(z.var() + 1e-5)


def hinton(step, temperature, prepare=lambda z: z):
    total, rows = 0.0, list(zip(voxels(step.student), voxels(step.teacher), strict=True))
    for student, teacher in rows:
        s, t = prepare(student) / temperature, prepare(teacher) / temperature
        if step.activation == "softmax":
            total += kl(softmax(t), softmax(s))
        else:
            bits = zip(sigmoid(t), sigmoid(s), strict=True)
            total += np.mean([kl((q, 1 - q), (p, 1 - p)) for q, p in bits])
    return temperature**2 * total / len(rows)


def reliable(step, temperature):
    sums, weights = 0.0, 0.0
    softly = step.activation == "softmax"
    target = (
        torch.nn.functional.one_hot(step.target, 3).movedim(-1, 1)
        if softly
        else step.target.float()
    )
    rows = zip(voxels(step.student), voxels(step.teacher), voxels(target), strict=True)
    for student, teacher, y in rows:
        if softly:
            entries = [
                (
                    -math.log(softmax(student)[y.argmax()]),
                    -math.log(softmax(teacher)[y.argmax()]),
                    teacher.argmax() == y.argmax(),
                    -(softmax(teacher / temperature) @ np.log(softmax(student / temperature))),
                )
            ]
        else:
            entries = []
            for s, t, label in zip(student, teacher, y, strict=True):
                q, p = sigmoid(t / temperature), sigmoid(s / temperature)
                own, other = (sigmoid(v if label else -v) for v in (s, t))
                soft = -q * math.log(p) - (1 - q) * math.log(1 - p)
                entries.append((-math.log(own), -math.log(other), (t > 0) == bool(label), soft))
        for own, other, right, soft in entries:
            m = max(0.0, own - other) * right
            sums, weights = sums + m * soft, weights + m
    return sums / weights


def close(found, expected):
    return abs(found.item() - expected) <= 1e-6 * max(1.0, abs(expected))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_equals_the_formula(shape, activation, temperature):
    step = pair(shape, activation)
    assert close(HintonKL(temperature=temperature)(step), hinton(step, temperature))


def test_divergence_without_the_factor_and_as_a_sum():
    step = pair()
    mean = HintonKL(temperature=3.0)(step).item()
    plain = HintonKL(temperature=3.0, scale_by_t2=False)(step).item()
    assert plain == pytest.approx(mean / 9, rel=1e-6)
    summed = HintonKL(temperature=3.0, reduction="sum")(step).item()
    assert summed == pytest.approx(20 * mean, rel=1e-6)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_standardised_divergence_equals_the_formula(activation):
    step = pair(activation=activation)
    found = HintonKL(temperature=2.0, standardise=True)(step)
    assert close(found, hinton(step, 2.0, z_score))


def test_the_standardised_divergence_is_that_of_the_published_example():
    # Sun et al. 2024, figure 2: a cat, a dog, a bird, a frog; they divide by the sample's deviation
    teacher, student = [-1.162, 1.162, 0.387, -0.387], [-1.320, 0.660, 0.880, -0.220]
    step = Step(*(torch.tensor(z).reshape(1, 4, 1) for z in (student, teacher)))
    term = HintonKL(temperature=math.sqrt(4 / 3), scale_by_t2=False, standardise=True)
    assert term(step).item() == pytest.approx(0.0995, abs=2e-4)


def test_standardised_logits_may_have_another_size():
    step = pair()
    scaled = Step(student=7 * step.teacher + 2, teacher=step.teacher)
    assert HintonKL(standardise=True)(scaled) < 1e-4
    assert HintonKL()(scaled) > 1


@pytest.mark.parametrize("shape", SHAPES)
def test_logit_distance_equals_the_formula(shape):
    step = pair(shape)
    difference = voxels(step.student) - voxels(step.teacher)
    assert close(LogitMSE()(step), (difference**2).mean())
    centred = difference - difference.mean(1, keepdims=True)
    assert close(LogitMSE(centre=True)(step), (centred**2).mean())


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES)
def test_probability_distance_equals_the_formula(shape, activation):
    step = pair(shape, activation)
    sigma = softmax if activation == "softmax" else sigmoid
    rows = zip(voxels(step.student), voxels(step.teacher), strict=True)
    expected = np.mean([((sigma(s) - sigma(t)) ** 2).sum() for s, t in rows])
    assert close(ProbabilityMSE()(step), expected)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES)
def test_reliable_cross_entropy_equals_the_formula(shape, activation):
    step = pair(shape, activation)
    assert close(ReliableSoftTargetCE(temperature=10.0)(step), reliable(step, 10.0))


def test_reliable_cross_entropy_reads_one_hot_targets():
    step = pair()
    hot = torch.nn.functional.one_hot(step.target, 3).movedim(-1, 1)
    term = ReliableSoftTargetCE()
    assert term(Step(student=step.student, teacher=step.teacher, target=hot)) == term(step)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_reliable_cross_entropy_leaves_ignored_voxels_out(activation):
    step = pair((2, 3, 6), activation)
    kept = replace(
        step,
        student=step.student[..., :2],
        teacher=step.teacher[..., :2],
        target=step.target[..., :2],
    )
    target = step.target.long()
    target[..., 2:] = 255
    found = ReliableSoftTargetCE(ignore_index=255)(replace(step, target=target))
    assert found.item() == pytest.approx(ReliableSoftTargetCE()(kept).item(), rel=1e-6)


def test_reliable_cross_entropy_ignores_each_region_for_itself():
    step = pair((1, 2, 6), "sigmoid")
    target = step.target.long()
    target[:, 1] = 255
    # where nothing is read a region counts as absent, and the teacher would be right about that
    certain = torch.full((1, 1, 6), -9.0)
    teacher = torch.cat((step.teacher[:, :1], certain), 1)
    found = ReliableSoftTargetCE(ignore_index=255)(replace(step, teacher=teacher, target=target))
    alone = [z[:, :1] for z in (step.student, step.teacher, step.target)]
    wanted = ReliableSoftTargetCE()(Step(*alone[:2], target=alone[2], activation="sigmoid"))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_a_teacher_that_is_never_right_teaches_nothing():
    step = pair()
    student = step.student.requires_grad_()
    wrong = torch.nn.functional.one_hot((step.target + 1) % 3, 3).movedim(-1, 1) * 9.0
    value = ReliableSoftTargetCE()(Step(student=student, teacher=wrong, target=step.target))
    value.backward()
    assert value == 0
    assert not student.grad.any()


def test_reliability_carries_no_gradient():
    step = pair((1, 3, 1), dtype=torch.float64)
    student = step.student.requires_grad_()
    hot = torch.nn.functional.one_hot(step.teacher.argmax(1), 3).movedim(-1, 1)
    teacher = 20.0 * hot
    # a single voxel: the weight cancels, and the gradient is that of the cross-entropy alone
    ReliableSoftTargetCE(temperature=2.0)(Step(student, teacher, target=hot)).backward()
    expected = ((student / 2).softmax(1) - (teacher / 2).softmax(1)) / 2
    assert torch.allclose(student.grad, expected)


@pytest.mark.parametrize("term", [HintonKL(temperature=3.0), ReliableSoftTargetCE()], ids=repr)
def test_several_teachers_are_averaged_at_the_temperature(term):
    step = pair()
    twice = Step(
        student=step.student,
        teacher=step.teacher,
        target=step.target,
        members=((step.teacher, 0.25), (step.teacher, 0.75)),
    )
    assert term(twice).item() == pytest.approx(term(step).item(), rel=1e-4)


def test_terms_own_activation_wins():
    step = pair(activation="sigmoid")
    own = Step(student=step.student, teacher=step.teacher)
    assert HintonKL(activation="sigmoid")(own) == HintonKL()(step)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HintonKL(temperature=0), "`temperature` must be positive and finite; got 0"),
        (lambda: HintonKL(reduction="none"), r"`reduction` must be one of .*; got 'none'"),
        (lambda: LogitMSE(activation="tanh"), "LogitMSE: `activation` must be one of"),
        (lambda: ReliableSoftTargetCE(temperature=-1), "`temperature` must be positive"),
    ],
)
def test_options_without_meaning_are_refused(make, message):
    with pytest.raises(ObjectiveError, match=message):
        make()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_two_channels_cannot_be_standardised(activation):
    with pytest.raises(ObjectiveError, match="at least 3 channels; of the 2 here"):
        HintonKL(standardise=True)(pair((1, 2, 4), activation))


def test_logits_of_a_sigmoid_are_not_centred():
    with pytest.raises(ObjectiveError, match=r"what a sigmoid depends on. Pass centre=False"):
        LogitMSE(centre=True)(pair(activation="sigmoid"))


@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_steps_that_lack_something_are_refused(term):
    one = torch.zeros(1, 1, 4)
    with pytest.raises(ObjectiveError, match="softmax over 1 channel is constant"):
        term(Step(student=one, teacher=one, target=one))
    with pytest.raises(ObjectiveError, match="no teacher logits"):
        term(Step(student=torch.zeros(1, 3, 4)))
    with pytest.raises(ShapeMismatchError, match=r"student's logits are \(1, 3, 4\), the"):
        term(Step(student=torch.zeros(1, 3, 4), teacher=torch.zeros(1, 3, 8)))


def test_missing_target_says_how_to_call():
    step = pair()
    with pytest.raises(ObjectiveError, match=r"no target. Call the wrapper as kd\(image, target\)"):
        ReliableSoftTargetCE()(Step(student=step.student, teacher=step.teacher))


def test_repr_shows_what_was_chosen():
    assert repr(HintonKL()) == "HintonKL(temperature=4.0)"
    chosen = HintonKL(temperature=2.0, standardise=True, reduction="sum")
    assert repr(chosen) == "HintonKL(temperature=2.0, standardise=True, reduction='sum')"
    assert repr(LogitMSE()) == "LogitMSE()"
    assert repr(ReliableSoftTargetCE()) == "ReliableSoftTargetCE(temperature=10.0)"


def test_several_teachers_decide_at_one_and_soften_at_the_temperature():
    # At T = 1 their mean prefers the second class, at T = 5 the first.
    sure, less = torch.tensor([[[10.0], [0.0]]]), torch.tensor([[[0.0], [3.0]]])
    members = ((sure, 0.45), (less, 0.55))
    student = torch.tensor([[[1.0], [-1.0]]])
    first = 0.45 / (1 + math.exp(-2)) + 0.55 / (1 + math.exp(0.6))
    p, soft = 1 / (1 + math.exp(-2)), (first, 1 - first)
    dice = [2 * a * b / (a + b) for a, b in zip((p, 1 - p), soft, strict=True)]
    wanted = 1 - sum(dice) / 2 + math.log(1 + math.exp(2))
    step = Step(student, sure, members=members, validate=False)
    assert SoftTargetDiceBCE()(step).item() == pytest.approx(wanted, abs=1e-4)


def test_several_teachers_are_standardised_as_they_vote():
    student, one, other = torch.randn(3, 2, 4, 5)
    step = Step(student, one, members=((one, 0.3), (3 * other, 0.7)))
    vote = mix_logits(step.members, "softmax")
    options = {"temperature": 4.0, "standardise": True}
    found = HintonKL(**options)(step)
    assert found.item() == pytest.approx(hinton_kl(student, vote, **options).item())
