import math

import pytest
import torch

from kdnet.recipes.terms import (
    ContrastWithinBatch,
    Reconstruction,
    StyleDivergence,
    SubsetDivergence,
)
from privdistill import ContrastiveProjection, ObjectiveError, Step, TapPair

LOGITS = torch.zeros(1, 2, 2)
AUXILIARY = [Reconstruction(), SubsetDivergence(), StyleDivergence()]


def step(image=None, **output):
    return Step(student=LOGITS, image=image, student_output={"out": LOGITS, **output})


def test_reconstruction_counts_the_modalities_that_are_present():
    image = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])
    output = {
        "reconstruction": torch.tensor([[[2.0, 6.0], [9.0, 9.0]]]),
        "present": torch.tensor([[True, False]]),
    }
    assert Reconstruction("squared")(step(image, **output)).item() == 5.0  # (1 + 9) / 2
    assert Reconstruction("absolute")(step(image, **output)).item() == 2.0  # (1 + 3) / 2
    output["present"] = torch.tensor([[False, False]])
    assert Reconstruction()(step(image, **output)).item() == 0.0


def test_subset_divergence_is_the_mean_over_the_batch():
    assert SubsetDivergence()(step(divergence=torch.tensor([1.0, 3.0]))).item() == 2.0


def test_style_divergence_is_that_from_a_standard_normal_distribution():
    output = {
        "style_mean": torch.tensor([[[1.0, 0.0], [7.0, 7.0]]]),
        "style_log_variance": torch.tensor([[[0.0, math.log(2.0)], [7.0, 7.0]]]),
        "present": torch.tensor([[True, False]]),
    }
    expected = (1 + (2 - 1 - math.log(2.0))) / 2
    assert StyleDivergence()(step(**output)).item() == pytest.approx(expected)
    standard = {**output, "style_mean": torch.zeros(1, 2, 2)}
    standard["style_log_variance"] = torch.zeros(1, 2, 2)
    assert StyleDivergence()(step(**standard)).item() == 0.0


@pytest.mark.parametrize("term", AUXILIARY, ids=repr)
def test_auxiliary_terms_are_zero_in_eval_mode_where_networks_return_logits_alone(term):
    plain = Step(student=LOGITS.half(), image=LOGITS, student_output=LOGITS)
    value = term.eval()(plain)
    term.train()
    assert value.item() == 0
    assert value.dtype == torch.float32


def test_half_precision_is_compared_in_float32():
    image = torch.full((1, 1, 2), 300.0)
    output = {"reconstruction": torch.zeros(1, 1, 2).half(), "present": torch.ones(1, 1).bool()}
    assert Reconstruction()(step(image.half(), **output)).item() == 90_000.0


def contrast(batch, index):
    features = torch.randn(batch, 3, 4, requires_grad=True)
    pair = TapPair(features, torch.randn(batch, 3, 4))
    return Step(student=torch.zeros(batch, 2, 4), taps={"decoder": pair}, index=index)


def test_a_lone_subject_is_no_contrast_but_a_training_of_lone_subjects_is_refused():
    term = ContrastWithinBatch(tap="decoder")
    term.build(contrast(2, 0))
    with pytest.raises(ObjectiveError, match="the batch holds 1 sample"):
        term(contrast(1, 0))
    lone = term(contrast(1, 5))
    lone.backward()
    assert lone.item() == 0
    assert all(weights.grad is not None for weights in term.parameters())
    pair = contrast(2, 5)
    assert term(pair).item() == ContrastiveProjection.forward(term, pair).item() > 0
