import math

import numpy as np
import pytest

from kdnet.results.significance import bootstrap_interval, holm, paired_wilcoxon

NAN = math.nan


def test_wilcoxon_of_six_gains_is_two_in_sixty_four():
    test = paired_wilcoxon([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert test.p_value == pytest.approx(2 / 64)
    assert (test.n, test.n_nonzero, test.reason) == (6, 6, None)


def test_wilcoxon_enumerated_by_hand():
    differences = [1.0, -2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    signs = np.array(np.meshgrid(*[[0, 1]] * 7)).reshape(7, -1)
    sums = (signs * np.arange(1, 8)[:, None]).sum(0)
    # Two-sided: rank sums of the negative signs as small as the 2 found here, doubled.
    assert paired_wilcoxon(differences).p_value == pytest.approx(2 * np.mean(sums <= 2))


def test_wilcoxon_is_symmetric_in_the_sign():
    differences = [0.3, -0.1, 0.25, 0.4, 0.05, -0.02, 0.6]
    negated = [-value for value in differences]
    assert paired_wilcoxon(differences).p_value == paired_wilcoxon(negated).p_value


def test_nan_pairs_are_left_out_and_counted():
    with_nan = paired_wilcoxon([0.1, NAN, 0.2, 0.3, 0.4, 0.5, NAN, 0.6])
    assert with_nan.n == 6
    assert with_nan.p_value == pytest.approx(2 / 64)


@pytest.mark.parametrize(
    ("differences", "reason"),
    [
        ([], "0 paired cases; at least 6"),
        ([0.1], "1 paired case; at least 6"),
        ([0.1, 0.2, 0.3, 0.4, 0.5, NAN], "5 paired cases; at least 6"),
        ([0.0] * 8, "all 8 differences are zero"),
        ([0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5], "only 5 of 7 differences are not zero"),
    ],
)
def test_reason_instead_of_a_p_value(differences, reason):
    test = paired_wilcoxon(differences)
    assert math.isnan(test.p_value)
    assert test.reason is not None
    assert reason in test.reason


def test_bootstrap_interval_of_equal_differences_is_a_point():
    interval = bootstrap_interval([0.25] * 7, seed=0)
    assert (interval.lower, interval.upper, interval.n) == (0.25, 0.25, 7)


def test_bootstrap_interval_approaches_the_normal_one():
    values = np.random.default_rng(1).normal(0.1, 1.0, size=400)
    interval = bootstrap_interval(values.tolist(), seed=2)
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert interval.lower == pytest.approx(values.mean() - half, abs=0.01)
    assert interval.upper == pytest.approx(values.mean() + half, abs=0.01)


def test_bootstrap_interval_depends_on_the_seed_alone():
    values = [0.1, 0.3, -0.2, 0.05, 0.4, 0.2, 0.7]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval([*values, NAN], seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_wider_level_gives_a_wider_interval():
    values = [0.1, 0.3, -0.2, 0.05, 0.4, 0.2, 0.7]
    wide, narrow = (bootstrap_interval(values, seed=0, level=level) for level in (0.99, 0.5))
    assert wide.lower < narrow.lower < narrow.upper < wide.upper


def test_no_interval_from_five_cases():
    interval = bootstrap_interval([0.1, 0.2, 0.3, 0.4, 0.5], seed=0)
    assert math.isnan(interval.lower)
    assert interval.reason == "5 paired cases; at least 6 are needed"


def test_level_outside_zero_and_one_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        bootstrap_interval([0.1] * 6, seed=0, level=95)


def test_holm_by_hand():
    # Sorted 0.01, 0.03, 0.04: times 3, 2, 1 gives 0.03, 0.06, 0.04, then never falling.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


def test_holm_stops_at_one_and_skips_nan():
    corrected = holm([0.9, NAN, 0.6])
    assert corrected[0] == corrected[2] == 1.0
    assert math.isnan(corrected[1])
    assert holm([NAN, 0.02]) == pytest.approx([NAN, 0.02], nan_ok=True)
