from types import SimpleNamespace

import pytest
import torch

from privdistill import PrivDistillError, ShapeMismatchError
from privdistill.sides.heads import find_heads, head_weights, steps_by_head
from privdistill.step import Output

LOGITS = torch.zeros(1, 2, 8, 8)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        [LOGITS, LOGITS[..., ::2, ::2]],
        (LOGITS, torch.zeros(1)),
        {"out": LOGITS, "aux": None},
        {"logits": LOGITS},
        SimpleNamespace(logits=LOGITS),
        ({"out": LOGITS}, None),
    ],
)
def test_logits_are_found_in_every_common_form(output):
    assert find_heads(output, axes=2)[0] is LOGITS


@pytest.mark.parametrize("output", [None, {}, [], "text", {"mask": LOGITS}, torch.zeros(3)])
def test_output_without_logits_is_an_error_that_names_the_selector(output):
    with pytest.raises(ShapeMismatchError, match="select_logits"):
        find_heads(output, axes=2)


def test_output_can_be_walked_as_a_tuple():
    loss, terms, student, teacher, taps = Output(torch.ones(()), {}, LOGITS, None, {})
    assert loss == 1
    assert (terms, student, teacher, taps) == ({}, LOGITS, None, {})


def test_scalars_carry_no_graph():
    loss = 2 * torch.ones((), requires_grad=True)
    scalars = Output(loss, {"a": loss.detach()}, LOGITS, None, {}).scalars("train_")
    assert scalars == {"train_loss": 2, "train_a": 2}
    assert not any(value.requires_grad for value in scalars.values())


def sizes(output, axes=2):
    return [tuple(head.shape[2:]) for head in find_heads(output, axes)]


def test_heads_come_finest_first_in_whatever_order_the_network_has_them():
    coarse, fine = LOGITS[..., ::2, ::2], LOGITS
    assert sizes([coarse, fine]) == sizes((fine, coarse)) == [(8, 8), (4, 4)]


def test_stacked_heads_are_taken_apart():
    assert sizes(torch.zeros(3, 4, 2, 8, 8)) == [(8, 8)] * 4
    assert find_heads(torch.zeros(3, 4, 2, 8, 8), 2)[0].shape == (3, 2, 8, 8)


def test_an_auxiliary_head_counts_and_other_tensors_do_not():
    other = torch.zeros(1, 64, 8, 8)
    assert sizes({"out": LOGITS, "aux": LOGITS}) == [(8, 8), (8, 8)]
    assert sizes({"out": LOGITS, "features": LOGITS}) == [(8, 8)]
    assert sizes((LOGITS, other, torch.zeros(()), None)) == [(8, 8)]


def test_a_second_tensor_of_equal_size_is_a_head_in_a_list_and_never_in_a_tuple():
    assert sizes((LOGITS, LOGITS + 1)) == [(8, 8)]
    assert find_heads((LOGITS, LOGITS + 1), axes=2)[0] is LOGITS
    assert sizes([LOGITS, LOGITS + 1]) == sizes(([LOGITS, LOGITS + 1], None)) == [(8, 8)] * 2


def test_only_a_whole_factor_makes_a_coarser_head():
    assert sizes((LOGITS, LOGITS[..., :5, :5], LOGITS[..., ::4, :])) == [(8, 8), (2, 8)]


def test_of_equal_tensors_the_main_head_comes_first():
    heads = [LOGITS, LOGITS[..., ::2, ::2], LOGITS + 1, LOGITS + 2]
    found = find_heads(heads, axes=2, equals=(2, 0))
    assert [head.shape[2] for head in found] == [8, 8, 4]
    assert found[0] is heads[3]
    assert found[1] is heads[0]
    named = {"out": LOGITS, "aux": LOGITS + 1}
    first, second = find_heads(named, axes=2, equals=(1, 0))
    assert (first is named["out"], second is named["aux"]) == (True, True)


def test_a_list_beside_something_else_is_found():
    assert sizes(([LOGITS, LOGITS[..., ::2, ::2]], torch.zeros(()))) == [(8, 8), (4, 4)]


def test_nested_and_numbered_auxiliary_heads_count():
    coarse = LOGITS[..., ::2, ::2]
    for output in (
        {"out": LOGITS, "aux": [coarse]},
        (LOGITS, [coarse]),
        {"out": LOGITS, "aux1": coarse},
    ):
        assert sizes(output) == [(8, 8), (4, 4)]


def test_head_weights_halve_and_sum_to_one():
    assert head_weights(None, 2) == [2 / 3, 1 / 3]
    assert head_weights([3, 1], 2) == [0.75, 0.25]
    assert head_weights([3, 1], 1) == [1.0]


def test_head_weights_that_do_not_fit_are_refused():
    with pytest.raises(PrivDistillError, match="returns 3 heads, and `head_weights` has 2"):
        head_weights([1, 1], 3)
    with pytest.raises(PrivDistillError, match="returns 1 heads, and `head_weights` has 2"):
        head_weights([1, 1], 1, training=True)
    for wrong in ([-1, 1], [0, 0], [float("nan"), 1]):
        with pytest.raises(PrivDistillError, match="not negative and not all zero"):
            head_weights(wrong, 2)


FINE, COARSE = torch.randn(1, 2, 8), torch.randn(1, 2, 4)


def teachers(heads, *taught):
    shares = [1 / len(taught) for _ in taught]
    steps = steps_by_head({"activation": "softmax"}, heads, taught, shares)
    return [step.teacher for step in steps]


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
