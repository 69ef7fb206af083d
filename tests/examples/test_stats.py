"""Statistics: values by hand, intervals that hold what they should, and what has no partner."""

import math

import numpy as np
import pandas as pd
import pytest

from invented_runs import scores_of, table, two_networks
from kdnet.errors import UserError
from kdnet.results.stats import cells, gains, holm, interval, lead, slope, wilcoxon

NAN = math.nan


def cells_of(values, folds=2):
    """Values of shape (cases, seeds); cases are dealt into folds."""
    lines = [
        (case % folds, seed, f"Case_{case:03d}", float(value))
        for case, row in enumerate(values)
        for seed, value in enumerate(row)
    ]
    return cells(pd.DataFrame(lines, columns=["fold", "seed", "case", "dice"]))


def test_wilcoxon_enumerated_by_hand():
    assert wilcoxon([0.1, NAN, 0.2, 0.3, 0.4, 0.5, 0.6]) == (pytest.approx(2 / 64), "")
    signs = np.array(np.meshgrid(*[[0, 1]] * 7)).reshape(7, -1)
    sums = (signs * np.arange(1, 8)[:, None]).sum(0)
    # Two-sided: rank sums of the negative signs as small as the 2 found here, doubled.
    p, _ = wilcoxon([1.0, -2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    assert p == pytest.approx(2 * np.mean(sums <= 2))


@pytest.mark.parametrize(
    ("differences", "reason"),
    [
        ([], "0 patients; at least 6"),
        ([0.1, 0.2, 0.3, 0.4, 0.5, NAN], "5 patients; at least 6"),
        ([0.0] * 8, "8 of 8 differences are zero"),
        ([0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5], "2 of 7 differences are zero"),
    ],
)
def test_reason_instead_of_a_p_value(differences, reason):
    p, why = wilcoxon(differences)
    assert math.isnan(p)
    assert reason in why


def test_holm_by_hand():
    # 3 * 0.01; 2 * 0.02, no less than the one before; 0.9 itself; NaN is no test.
    assert holm([0.02, NAN, 0.01, 0.9]) == pytest.approx([0.04, NAN, 0.03, 0.9], nan_ok=True)
    assert holm([0.8, 0.9]) == [1.0, 1.0]


def test_luck_of_a_training_widens_the_interval_and_folds_are_drawn_apart():
    # All cases agree, two seeds differ by 0.2: the samples are -0.1, 0 and 0.1.
    values = np.tile([0.0, 0.2], (20, 1)) - 0.1
    one, five = (interval(cells_of(values, folds=folds)) for folds in (1, 5))
    assert (one.lower, one.upper) == pytest.approx((-0.1, 0.1))
    assert five.upper < one.upper


def test_one_seed_gives_the_interval_over_cases():
    values = np.random.default_rng(0).normal(0.1, 0.2, size=60)
    found = interval(cells_of(values[:, None]))
    draws = np.random.default_rng(1).choice(values, (20_000, 60)).mean(axis=1)
    assert (found.lower, found.upper) == pytest.approx(
        np.quantile(draws, [0.025, 0.975]), abs=0.004
    )
    assert interval(cells_of(values[:, None])) == found
    assert interval(cells_of(values[:5, None])).reason == "5 patients; at least 6 are needed"


def test_interval_holds_the_true_gain_about_as_often_as_it_says():
    generator = np.random.default_rng(11)
    hits = 0
    for _ in range(40):
        # Cases, trainings and both together differ; the true gain is 0.05.
        cases = generator.normal(0, 0.1, size=(50, 1))
        trainings = generator.normal(0, 0.03, size=(5, 3))[np.arange(50) % 5]
        values = 0.05 + cases + trainings + generator.normal(0, 0.05, size=(50, 3))
        found = interval(cells_of(values, folds=5))
        hits += found.lower <= 0.05 <= found.upper
    assert hits >= 34


def test_slope_is_that_of_a_line_and_of_least_squares():
    x = np.arange(8.0)[:, None] + np.zeros((8, 2))
    value, found = slope(cells_of(x), cells_of(0.3 * x - 1))
    assert (value, found.lower, found.upper) == pytest.approx((0.3, 0.3, 0.3))
    generator = np.random.default_rng(5)
    x = np.repeat(generator.normal(size=(30, 1)), 3, axis=1)
    y = 0.5 * x + generator.normal(size=(30, 3))
    expected = np.polyfit(x[:, 0], y.mean(axis=1), 1)[0]
    assert slope(cells_of(x), cells_of(y))[0] == pytest.approx(expected)
    value, found = slope(cells_of(np.full((8, 1), 0.3)), cells_of(np.arange(8.0)[:, None]))
    assert math.isnan(value)
    assert found.reason == "all values of x are equal"


def test_visits_of_a_patient_are_drawn_and_tested_as_one():
    values = np.arange(8.0)[:, None] / 10 + 0.1
    scores = two_networks(values[:, 0])
    # Every case comes twice: as two visits nothing is known better, as two patients it is.
    twice = table(scores, scores.assign(case=scores["case"] + "-again"))
    (visits,) = gains(twice.assign(patient=twice["case"].str.removesuffix("-again")))
    (once,), (strangers,) = gains(scores), gains(twice)
    assert len(visits.cells) == 16
    assert (visits.interval, visits.p) == (once.interval, once.p)
    assert strangers.interval.upper < once.interval.upper
    assert strangers.p < once.p
    five = twice["case"].str[:2].replace(["c5", "c6", "c7"], "c0")
    (few,) = gains(twice.assign(patient=five))
    assert few.interval.reason == "5 patients; at least 6 are needed"


def test_gain_pairs_fold_seed_and_case_and_counts_a_case_once():
    base = {f"c{index}": 0.1 * index for index in range(6)}
    scores = table(
        *(scores_of("baseline", base, seed=seed) for seed in (0, 1)),
        scores_of("kdnet", {case: value + 0.05 for case, value in base.items()}),
        scores_of("kdnet", {case: value - 0.01 for case, value in base.items()}, seed=1),
    )
    (gain,) = gains(scores.sample(frac=1, random_state=0))
    assert (gain.row, gain.against, len(gain.cells)) == ("kdnet", "baseline", 6)  # not 12
    assert gain.mean == pytest.approx(0.02)


def test_gain_never_pairs_seeds_and_leaves_out_cases_that_one_network_lacks():
    scores = table(scores_of("baseline", {"a": 0.5}), scores_of("kdnet", {"a": 0.9}, seed=1))
    assert gains(scores) == []
    assert len(gains(two_networks([0.1] * 6).iloc[:-1])[0].cells) == 5


def test_holm_covers_the_regions_of_a_row_or_all_comparisons():
    rising = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]
    scores = table(two_networks(rising, "ET"), two_networks(rising, "WT"))
    more = scores[scores["row"] == "student"].assign(row="other")
    for together, factor in ((False, 2), (True, 4)):
        found = gains(table(scores, more), together=together)
        assert [gain.p for gain in found] == pytest.approx([2 / 128] * 4)
        assert [gain.p_holm for gain in found] == pytest.approx([factor * 2 / 128] * 4)


@pytest.mark.parametrize(
    ("metric", "gain", "verdict"),
    [("dice", 0.1, "better"), ("dice", -0.1, "worse"), ("hd95", -1.0, "better")],
)
def test_verdict_needs_interval_and_test(metric, gain, verdict):
    values = [gain * (1 + index / 100) for index in range(9)]
    scores = two_networks([0.0] * 9)
    scores.loc[scores["row"] == "student", metric] += values
    assert gains(scores, metric)[0].verdict == verdict


def test_verdict_on_few_cases_or_on_differences_around_zero_is_open():
    assert gains(two_networks([0.1, 0.2]))[0].verdict == "open"
    assert gains(two_networks([0.1, -0.1] * 5))[0].verdict == "open"


def test_scores_against_other_references_are_not_paired():
    one = scores_of("baseline", {"a": 0.5}, reference_voxels=25)
    with pytest.raises(UserError, match="a: the reference of ET"):
        gains(table(one, scores_of("student", {"a": 0.0}, reference_voxels=0)))


def test_lead_is_the_teachers_over_the_baseline_of_all_seeds_or_of_the_others():
    scores = table(
        *(scores_of("baseline", {"a": dice}, seed=seed) for seed, dice in enumerate((0.2, 0.4))),
        *(scores_of("student", {"a": dice}, seed=seed) for seed, dice in enumerate((0.3, 0.5))),
        scores_of("teacher", {"a": 0.8}),
    )
    (gain,) = gains(scores)
    assert lead(scores, gain, "teacher").to_numpy() == pytest.approx(np.array([[0.5, 0.5]]))
    apart = lead(scores, gain, "teacher", other_seeds=True)
    assert apart.to_numpy() == pytest.approx(np.array([[0.4, 0.6]]))
    assert lead(scores, gain, "nobody").empty
