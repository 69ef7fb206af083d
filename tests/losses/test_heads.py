import pytest
import torch

from privdistill import PrivDistillError
from privdistill.losses.heads import head_weights, steps_by_head

FINE, COARSE = torch.randn(1, 2, 8), torch.randn(1, 2, 4)


def test_head_weights_halve_and_sum_to_one():
    assert head_weights(None, 2) == [2 / 3, 1 / 3]
    assert head_weights([3, 1], 2) == [0.75, 0.25]
    assert head_weights([3, 1], 1) == [1.0]


def test_head_weights_that_do_not_fit_are_refused():
    with pytest.raises(PrivDistillError, match="returns 3 heads, and `head_weights` has 2"):
        head_weights([1, 1], 3)
    for wrong in ([-1, 1], [0, 0], [float("nan"), 1]):
        with pytest.raises(PrivDistillError, match="not negative and not all zero"):
            head_weights(wrong, 2)


def teachers(heads, *taught):
    shared = [(own, 1 / len(taught)) for own in taught]
    return [step.teacher for step in steps_by_head({}, heads, shared, "softmax")]


def test_a_teacher_of_one_head_is_resampled_to_coarse_ones():
    fine, coarse = teachers([FINE, COARSE], [FINE])
    assert fine is FINE
    assert torch.allclose(coarse, FINE.unflatten(2, (4, 2)).mean(3))


def test_a_teacher_with_a_head_of_that_size_teaches_with_it():
    assert teachers([FINE, COARSE], [FINE, COARSE])[1] is COARSE


def test_the_main_head_is_never_resampled():
    assert teachers([FINE], [COARSE])[0] is COARSE


def test_several_teachers_are_mixed_at_each_head():
    fine, coarse = teachers([FINE, COARSE], [FINE], [FINE])
    assert torch.allclose(fine.softmax(1), FINE.softmax(1))
    assert coarse.shape == COARSE.shape


def test_without_teachers_there_is_nothing_to_resample():
    assert teachers([FINE, COARSE]) == [None, None]
