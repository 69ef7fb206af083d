from types import SimpleNamespace

import pytest
import torch

from privdistill import ShapeMismatchError
from privdistill.output import Output, find_heads

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
