from types import SimpleNamespace

import pytest
import torch

from privdistill import ShapeMismatchError
from privdistill.output import Output, first_logits

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
    assert first_logits(output) is LOGITS


@pytest.mark.parametrize("output", [None, {}, [], "text", {"mask": LOGITS}, torch.zeros(3)])
def test_output_without_logits_is_an_error_that_names_the_selector(output):
    with pytest.raises(ShapeMismatchError, match="select_logits"):
        first_logits(output)


def test_output_can_be_walked_as_a_tuple():
    loss, terms, student, teacher, taps = Output(torch.ones(()), {}, LOGITS, None, {})
    assert loss == 1
    assert (terms, student, teacher, taps) == ({}, LOGITS, None, {})
