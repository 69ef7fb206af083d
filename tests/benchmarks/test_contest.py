"""The statistics of the benchmarks, on data whose answer is known. No timing decides a test."""

import math

import pytest
import torch
from torch import nn

from contest import Contestant, check_same_work, difference, exponent, median, race, ratio


def test_the_interval_of_equal_values_is_that_value():
    assert median([2.0] * 9) == (2.0, 2.0, 2.0)


def test_the_interval_of_a_median_holds_it_in_about_95_of_100_samples():
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(200, 40, generator=generator, dtype=torch.float64).tolist()
    intervals = [median(sample, samples=400) for sample in samples]
    assert 180 <= sum(low <= 0 <= high for _, low, high in intervals) <= 199


def test_the_median_of_an_even_number_is_the_mean_of_the_middle():
    assert median([1.0, 2.0, 4.0, 9.0]).value == 3.0


def test_ratios_are_taken_within_the_round():
    """The machine is three times slower in the last round, for both."""
    times = {"mine": [1.0, 1.0, 3.0], "theirs": [2.0, 2.0, 6.0]}
    assert ratio(times, "mine", "theirs") == (0.5, 0.5, 0.5)


def test_differences_are_in_microseconds():
    times = {"mine": [1.00005, 2.00005], "theirs": [1.0, 2.0]}
    assert difference(times, "mine", "theirs").value == pytest.approx(50)


@pytest.mark.parametrize("power", [-1.0, 0.5, 1.0, 3.0])
def test_the_exponent_of_a_power_law_is_found(power):
    sizes = [8.0, 16.0, 32.0, 64.0]
    found = exponent(sizes, [7 * size**power for size in sizes])
    assert found == pytest.approx((power, power, power), abs=1e-6)


def test_the_interval_of_an_exponent_is_that_of_the_regression():
    """Slope 1, residuals of +-d at the ends: worked out by hand with t = 4.3027 for two degrees."""
    d = 0.1
    logs, noise = [-1.5, -0.5, 0.5, 1.5], [d, -d, -d, d]
    costs = [math.exp(x + e) for x, e in zip(logs, noise, strict=True)]
    found = exponent([math.exp(x) for x in logs], costs)
    reach = 4.30265 * math.sqrt(4 * d**2 / 2 / 5)
    assert found == pytest.approx((1, 1 - reach, 1 + reach), abs=1e-5)


def test_everyone_takes_turns_and_another_one_starts_each_round():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = race(steps, 4, warm_up=1)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 4)


def test_progress_ends_at_one():
    shares = []
    race({"a": lambda: None}, 4, warm_up=0, report=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def moves(by):
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)

    def step():
        with torch.no_grad():
            network.weight += by

    return Contestant(step, network)


def test_the_largest_difference_of_weights_is_reported():
    contestants = {"hand": moves(1.0), "other": moves(1.0 + 2**-20)}
    assert check_same_work(contestants, steps=2) == pytest.approx(2 * 2**-20, rel=0.1)


@pytest.mark.parametrize("wrong", [1.001, math.nan])
def test_contestants_that_do_other_work_are_refused(wrong):
    with pytest.raises(ValueError, match=r"differ from those of 'hand' by \{'other'"):
        check_same_work({"hand": moves(1.0), "other": moves(wrong)})
