"""How much of the teacher's decision a softened target keeps."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privdistill import ObjectiveError, ShapeMismatchError, SoftTargetDiceBCE, Step
from privdistill.losses.agreement import copy_dice, decision_overlap, target_agreement
from privdistill.losses.agreement import warn_of_softening as warn

SHAPES = [(2, 3, 5), (2, 3, 4, 5), (1, 2, 3, 4, 2)]


def test_value_by_hand():
    # One voxel of region, nine outside, all logits +-4.
    logits = torch.full((1, 1, 10), -4.0)
    logits[0, 0, 0] = 4.0

    def dice(t):
        inside, outside = 1 / (1 + math.exp(-4 / t)), 1 / (1 + math.exp(4 / t))
        return 2 * inside / (1 + inside + 9 * outside)

    found = target_agreement(logits, 5.0, activation="sigmoid")
    assert found.item() == pytest.approx(dice(5) / dice(1), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_at_temperature_one_all_of_it_is_kept(shape, activation):
    kept = target_agreement(5 * torch.randn(shape), 1.0, activation=activation)
    torch.testing.assert_close(kept, torch.ones(shape[1], dtype=torch.float64))


def test_of_a_hard_teacher_all_of_it_is_kept():
    kept = target_agreement(1e4 * torch.randn(2, 3, 50), 5.0)
    torch.testing.assert_close(kept, torch.ones(3, dtype=torch.float64), rtol=0, atol=0.01)


def test_a_class_that_the_teacher_never_predicts_has_none():
    logits = torch.tensor([[[1.0], [-1.0], [0.0]]])
    assert target_agreement(logits, 2.0).isnan().tolist() == [False, True, True]


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=20), st.floats(1, 10), st.floats(1, 10))
def test_a_higher_temperature_never_keeps_more_of_a_region(values, first, second):
    logits = torch.tensor(values, dtype=torch.float64).reshape(1, 1, -1)
    low, high = sorted((first, second))
    kept = [target_agreement(logits, t, activation="sigmoid").item() for t in (low, high)]
    assert math.isnan(kept[0]) or kept[1] <= kept[0] + 1e-9


def test_sums_of_batches_add_up():
    logits = 3 * torch.randn(4, 3, 6, 6)
    whole = decision_overlap(logits, (1.0, 2.0), "softmax")
    parts = sum(decision_overlap(part, (1.0, 2.0), "softmax") for part in logits.split(1))
    torch.testing.assert_close(copy_dice(whole), copy_dice(parts))


def test_half_precision_and_infinite_logits_are_finite():
    logits = torch.tensor([[[1e4, -torch.inf], [-1e4, 3.0]]], dtype=torch.bfloat16)
    assert target_agreement(logits, 5.0).isfinite().all()


def test_a_warning_names_the_classes_and_their_numbers():
    logits = torch.full((1, 2, 1000), -4.0)
    logits[:, 0, :500] = logits[:, 1, :5] = 4.0
    kept = target_agreement(logits, 5.0, activation="sigmoid")
    with pytest.warns(UserWarning, match=f"{kept[1]:.2f} of class 1") as said:
        warn(logits, 5.0, "sigmoid", term="soft")
    assert "class 0" not in str(said[0].message)


def test_no_warning_where_most_is_kept():
    warn(1e3 * torch.randn(1, 2, 50), 5.0, "softmax", term="soft")
    warn(torch.zeros(1, 2, 50, device="meta"), 5.0, "softmax", term="soft")


def confident():
    """Logits of a teacher that T = 5 would drown: a small region, and a gap of 4 around it."""
    logits = torch.full((1, 2, 1000), -4.0)
    logits[:, :, :5] = 4.0
    return Step(torch.zeros(1, 2, 1000), logits, activation="sigmoid")


def test_a_term_warns_once_of_a_teacher_that_it_softens_too_much():
    term, given = SoftTargetDiceBCE(), confident()
    with pytest.warns(UserWarning, match="fit_temperature"):
        term(given)
    term(given)


@pytest.mark.parametrize("teacher", ["untrained", "sharp", "unchecked", "meta"])
def test_no_term_warns_without_a_reason(teacher):
    given = confident()
    other = {
        "untrained": {"teacher": 0.1 * torch.randn(1, 2, 1000)},
        "sharp": {"teacher": 10 * given.teacher},
        "unchecked": {"validate": False},
        "meta": {"student": given.student.to("meta"), "teacher": given.teacher.to("meta")},
    }
    SoftTargetDiceBCE()(replace(given, **other[teacher]))


@pytest.mark.parametrize("temperature", [None, 0, -1.0, math.inf, "5"])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ObjectiveError, match="temperature"):
        target_agreement(torch.randn(1, 2, 5), temperature)


def test_logits_and_activations_that_are_none_are_refused():
    with pytest.raises(ObjectiveError, match="'tanh'"):
        target_agreement(torch.randn(1, 2, 5), 2.0, activation="tanh")
    with pytest.raises(ShapeMismatchError, match=r"\(3,\)"):
        target_agreement(torch.randn(3), 2.0)
