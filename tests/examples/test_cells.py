"""Cells of cases and units: means by hand, and intervals that hold what they should."""

import math

import numpy as np
import pytest

from kdnet.results.significance import bootstrap_interval
from kdnet.studies.cells import Cells, Draws, mean_interval, slope, slope_interval

NAN = math.nan


def cells_of(values, folds=2):
    """Values of shape (cases, seeds); cases are dealt into folds."""
    return Cells.of(
        {
            (f"Case_{case:03d}", (case % folds, seed)): float(value)
            for case, row in enumerate(values)
            for seed, value in enumerate(row)
        }
    )


def test_a_case_counts_once_however_many_seeds_it_has():
    cells = Cells.of(
        {("a", (0, 0)): 0.2, ("a", (0, 1)): 0.4, ("b", (1, 0)): 0.9, ("b", (1, 1)): NAN}
    )
    assert cells.case_means.tolist() == pytest.approx([0.3, 0.9])
    assert cells.mean == pytest.approx(0.6)
    assert cells.sd == pytest.approx(math.sqrt(2 * 0.3**2))
    assert cells.unit_means == {(0, 0): 0.2, (0, 1): 0.4, (1, 0): 0.9}
    assert (cells.folds, cells.seeds) == ([0, 1], [0, 1])


def test_order_of_values_does_not_matter():
    found = {("b", (0, 1)): 0.1, ("a", (0, 0)): 0.2, ("a", (0, 1)): 0.3}
    one, other = Cells.of(found), Cells.of(dict(reversed(found.items())))
    assert (one.cases, one.units) == (other.cases, other.units)
    assert np.array_equal(one.values, other.values, equal_nan=True)
    assert one.found() == found


def test_no_value_is_no_mean():
    empty = Cells.of({("a", (0, 0)): NAN})
    assert empty.cases == ()
    assert math.isnan(empty.mean)
    assert empty.unit_means == {}
    assert mean_interval(empty).reason == "0 cases; at least 6 are needed"
    assert math.isnan(slope(empty, empty))


def test_draws_weight_cases_and_units():
    draws = Draws(cases=np.array([[2.0, 1.0]]), units=np.array([[3.0, 1.0]]))
    # First case: (3 * 0.1 + 0.5) / 4 = 0.2; second: 0.8 from the second unit alone.
    means = draws.means(np.array([[0.1, 0.5], [NAN, 0.8]]))
    assert means.tolist() == pytest.approx([(2 * 0.2 + 0.8) / 3])


def test_sample_without_a_value_has_no_mean():
    draws = Draws(cases=np.array([[1.0]]), units=np.array([[0.0, 2.0]]))
    assert math.isnan(draws.means(np.array([[0.1, NAN]]))[0])


def test_fewer_than_six_cases_have_no_interval():
    interval = mean_interval(cells_of(np.full((5, 3), 0.1)))
    assert math.isnan(interval.lower)
    assert interval.reason == "5 cases; at least 6 are needed"
    assert interval.n == 5


def test_one_seed_gives_the_interval_over_cases():
    values = np.random.default_rng(0).normal(0.1, 0.2, size=60)
    found = mean_interval(cells_of(values[:, None]))
    cases_alone = bootstrap_interval(values.tolist(), seed=1)
    assert found.lower == pytest.approx(cases_alone.lower, abs=0.004)
    assert found.upper == pytest.approx(cases_alone.upper, abs=0.004)


def test_luck_of_a_training_widens_the_interval():
    # All cases agree, two seeds differ by 0.2: the samples are -0.1, 0 and 0.1.
    values = np.tile([0.0, 0.2], (20, 1)) - 0.1
    interval = mean_interval(cells_of(values, folds=1))
    assert (interval.lower, interval.upper) == pytest.approx((-0.1, 0.1))


def test_seeds_of_two_folds_are_drawn_apart():
    values = np.tile([0.0, 0.2], (20, 1)) - 0.1
    one = mean_interval(cells_of(values, folds=1))
    five = mean_interval(cells_of(values, folds=5))
    assert five.upper < one.upper


def test_interval_holds_the_true_gain_about_as_often_as_it_says():
    generator = np.random.default_rng(11)
    hits = 0
    for _ in range(100):
        # Cases, trainings and both together differ; the true gain is 0.05.
        cases = generator.normal(0, 0.1, size=(50, 1))
        trainings = generator.normal(0, 0.03, size=(5, 3))[np.arange(50) % 5]
        values = 0.05 + cases + trainings + generator.normal(0, 0.05, size=(50, 3))
        interval = mean_interval(cells_of(values, folds=5), resamples=400)
        hits += interval.lower <= 0.05 <= interval.upper
    assert hits >= 88


def test_intervals_are_the_same_each_time():
    cells = cells_of(np.random.default_rng(0).normal(size=(9, 2)))
    assert mean_interval(cells, seed=3) == mean_interval(cells, seed=3)


def test_coverage_outside_zero_and_one_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        mean_interval(cells_of(np.ones((6, 1))), level=95)


def test_slope_is_that_of_a_line():
    x = np.arange(8.0)[:, None] + np.zeros((8, 2))
    lead, gain = cells_of(x), cells_of(0.3 * x - 1)
    assert slope(lead, gain) == pytest.approx(0.3)
    interval = slope_interval(lead, gain)
    assert (interval.lower, interval.upper) == pytest.approx((0.3, 0.3))


def test_slope_agrees_with_least_squares_on_means_of_cases():
    generator = np.random.default_rng(5)
    x = np.repeat(generator.normal(size=(30, 1)), 3, axis=1)
    y = 0.5 * x + generator.normal(size=(30, 3))
    expected = np.polyfit(x[:, 0], y.mean(axis=1), 1)[0]
    assert slope(cells_of(x), cells_of(y)) == pytest.approx(expected)


def test_equal_leads_have_no_slope():
    lead, gain = (
        cells_of(np.full((8, 1), 0.3)),
        cells_of(np.random.default_rng(0).normal(size=(8, 1))),
    )
    assert math.isnan(slope(lead, gain))
    assert slope_interval(lead, gain).reason == "all values of x are equal"
