import math

import numpy as np
import pytest
import torch

from privdistill import GroundTruth, LatentKL, ObjectiveError, Ramp, Step, TapPair, warm_up


def value(schedule, index):
    return float(schedule(torch.tensor(index)))


@pytest.mark.parametrize("curve", ["linear", "cosine", "exponential"])
def test_a_ramp_stays_at_its_ends(curve):
    ramp = Ramp(2, 6, steps=10, begin=5, curve=curve)
    assert [value(ramp, index) for index in (0, 5, 15, 400)] == pytest.approx([2, 2, 6, 6])


def test_values_between_by_hand():
    assert value(Ramp(0, 8, steps=4), 1) == pytest.approx(2)
    assert value(Ramp(8, 0, steps=4), 1) == pytest.approx(6)
    assert value(Ramp(0, 1, steps=3, curve="cosine"), 1) == pytest.approx(0.25)
    floor = math.exp(-5)
    wanted = (math.exp(-5 / 4) - floor) / (1 - floor)
    assert value(Ramp(0, 1, steps=2, curve="exponential"), 1) == pytest.approx(wanted)
    assert value(warm_up(4), 3) == pytest.approx(0.75)


def test_a_schedule_weighs_its_term_by_the_step():
    z = torch.randn(1, 2, 4)
    step = Step(student=z, target=z.argmax(1), taps={"bottleneck": TapPair(z, z.flip(1))})
    objective = 3 * (GroundTruth() + Ramp(0, 1, steps=10) * LatentKL())
    for index in (0, 5, 10):
        loss, terms = objective(Step(**{**vars(step), "index": torch.tensor(index)}))
        wanted = 3 * terms["ground_truth"] + 3 * index / 10 * terms["latent_kl"]
        assert loss.item() == pytest.approx(wanted.item())


def test_schedules_multiply_and_any_function_will_do():
    def halves(index):
        return 0.5**index

    objective = halves * (warm_up(4) * GroundTruth())
    (weight, _) = objective.named_terms["ground_truth"]
    assert float(weight.at(torch.tensor(2))) == pytest.approx(0.25 * 0.5)
    assert repr(objective) == "Ramp(0, 1, steps=4) * halves * GroundTruth()"


def test_repr_shows_begin_and_curve():
    ramp = Ramp(0, 1, steps=10, begin=2, curve="cosine")
    assert repr(2 * (ramp * GroundTruth())) == f"2 * {ramp!r} * GroundTruth()"
    assert repr(ramp) == "Ramp(0, 1, steps=10, begin=2, curve='cosine')"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps`"),
        ({"steps": 5, "begin": -1}, "`begin`"),
        ({"steps": 5, "curve": "cubic"}, "`curve`"),
        ({"steps": 5, "end": float("inf")}, "`end`"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ObjectiveError, match=message):
        Ramp(**{"start": 0, "end": 1} | options)


def test_a_weight_that_is_neither_number_nor_function_is_refused():
    with pytest.raises(ObjectiveError, match="finite number or a function of the step"):
        "2" * GroundTruth()


@pytest.mark.parametrize("value", [None, "1", torch.ones(1), torch.ones(2), [1.0], float("nan")])
def test_a_function_that_is_no_schedule_is_refused_when_the_objective_is_made(value):
    def growing(index):
        return value

    with pytest.raises(ObjectiveError, match=r"The schedule growing gave .* at step 0; it must"):
        growing * GroundTruth()


@pytest.mark.parametrize("value", [0, 0.5, True, np.float32(2), torch.tensor(3)])
def test_a_schedule_may_return_any_kind_of_scalar(value):
    (weight, _) = ((lambda index: value) * GroundTruth()).named_terms["ground_truth"]
    assert float(weight.at(torch.tensor(1))) == float(value)
