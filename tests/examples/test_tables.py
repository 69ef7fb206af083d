import math
from dataclasses import replace

import pytest
from rich.console import Console

from kdnet.errors import UserError
from kdnet.evaluation.scoring import Score
from kdnet.results.tables import format_number, format_p, gains, render_tables, summarise


def score(role, case, region="ET", *, dice, reference=10, predicted=10, space="native", hd95=1.0):
    present = dice if reference else math.nan
    return Score(role, case, region, space, dice, present, hd95, "mm", reference, predicted)


def two_networks(differences, region="ET"):
    base = [score("baseline", f"c{i}", region, dice=0.5) for i in range(len(differences))]
    return base + [
        score("student", f"c{i}", region, dice=0.5 + difference)
        for i, difference in enumerate(differences)
    ]


def test_summary_by_hand_with_both_conventions():
    (row,) = summarise(
        [
            score("student", "a", dice=0.8, hd95=3.0),
            score("student", "b", dice=0.6, hd95=5.0),
            score("student", "c", dice=1.0, reference=0, predicted=0, hd95=0.0),
            score("student", "d", dice=0.0, reference=0, predicted=7, hd95=373.0),
            score("student", "e", dice=0.0, reference=9, predicted=0, hd95=373.0),
        ]
    )
    assert row.dice.mean == pytest.approx(2.4 / 5)
    assert row.dice.n == 5
    assert row.dice_reference_present.mean == pytest.approx(1.4 / 3)
    assert row.dice_reference_present.n == 3
    assert (row.reference_empty, row.false_alarms, row.missed) == (2, 1, 1)
    assert row.hd95.median == 5.0


def test_sd_is_over_cases_with_n_minus_one():
    (row,) = summarise([score("student", name, dice=d) for name, d in (("a", 0.2), ("b", 0.6))])
    assert row.dice.sd == pytest.approx(0.4 / math.sqrt(2))


def test_one_case_has_no_sd():
    (row,) = summarise([score("student", "a", dice=0.2)])
    assert math.isnan(row.dice.sd)


def test_gain_pairs_cases_by_name_not_by_order():
    scores = two_networks([0.1, 0.2, 0.3, 0.0, -0.1, 0.4])
    shuffled = gains(scores[::-1])
    gain = next(row for row in shuffled if row.metric == "dice")
    assert gain.mean == pytest.approx(0.15)
    assert gain.n == 6


def test_gain_keeps_grid_and_native_space_apart():
    scores = two_networks([0.1] * 6)
    scores += [replace(score, space="grid", dice=0.5) for score in scores]
    means = {row.space: row.mean for row in gains(scores) if row.metric == "dice"}
    assert means == {"native": pytest.approx(0.1), "grid": 0.0}


def test_gain_leaves_out_cases_that_one_network_lacks():
    scores = two_networks([0.1] * 6)[:-1]
    assert next(row for row in gains(scores) if row.metric == "dice").n == 5


def test_no_gain_without_a_student():
    assert gains([score("baseline", "a", dice=0.5)]) == []


def test_holm_corrects_over_the_regions_of_one_space_and_metric():
    rising = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]
    scores = two_networks(rising, "ET") + two_networks(rising, "WT")
    rows = [row for row in gains(scores) if row.metric == "dice"]
    assert [row.test.p_value for row in rows] == pytest.approx([2 / 128] * 2)
    assert [row.p_holm for row in rows] == pytest.approx([4 / 128] * 2)


def rendered(scores, **options):
    console = Console(width=140, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(render_tables(scores, **options))
    return capture.get()


def test_terminal_table_gives_reason_instead_of_p():
    text = rendered(two_networks([0.1, 0.2]), phantom=False)
    assert "2 paired cases; at least 6 are needed" in text
    assert "phantom" not in text


def test_terminal_table_names_the_unit_of_distances():
    assert "HD95 (mm)" in rendered(two_networks([0.1, 0.2]), phantom=False)


def test_terminal_table_says_phantom():
    assert "phantom" in rendered(two_networks([0.1] * 6), phantom=True)


def test_numbers_are_written_with_true_signs():
    assert format_number(-0.12345) == "\N{MINUS SIGN}0.123"
    assert format_number(0.5, 1, signed=True) == "+0.5"
    assert format_number(-0.0001, signed=True) == "0.000"
    assert format_p(0.0004) == "< 0.001"
    assert format_p(math.nan) == "\N{EN DASH}"


def trained(role, fold, seed, **dice):
    return [
        replace(score(role, case, dice=value), fold=fold, seed=seed) for case, value in dice.items()
    ]


def test_quartiles_of_five_cases():
    values = dict(zip("abcde", (0.1, 0.2, 0.4, 0.7, 0.9), strict=True))
    (row,) = summarise(trained("student", 0, 0, **values))
    quartiles = (row.dice.lower_quartile, row.dice.median, row.dice.upper_quartile)
    assert quartiles == pytest.approx((0.2, 0.4, 0.7))


def test_seeds_of_a_case_are_averaged_before_cases_are_counted():
    scores = trained("student", 0, 0, a=0.2, b=0.6) + trained("student", 0, 1, a=0.4, b=1.0)
    (row,) = summarise(scores)
    assert (row.dice.n, row.folds, row.seeds) == (2, 1, 2)
    assert row.dice.mean == pytest.approx(0.55)
    assert row.dice.sd == pytest.approx(0.5 / math.sqrt(2))  # of 0.3 and 0.8
    assert row.dice.seeds_sd == pytest.approx(0.3 / math.sqrt(2))  # of 0.4 and 0.7
    assert math.isnan(row.dice.folds_sd)


def test_sd_over_folds_pools_their_seeds():
    scores = trained("student", 0, 0, a=0.1, b=0.3) + trained("student", 0, 1, a=0.3, b=0.5)
    scores += trained("student", 1, 0, c=0.5) + trained("student", 1, 1, c=0.7)
    (row,) = summarise(scores)
    assert row.dice.folds_mean == pytest.approx((0.3 + 0.6) / 2)
    assert row.dice.folds_sd == pytest.approx(0.3 / math.sqrt(2))
    assert row.dice.mean == pytest.approx((0.2 + 0.4 + 0.6) / 3)  # over cases, not over folds


def test_interval_holds_the_mean_and_narrows_with_cases():
    few = summarise(trained("student", 0, 0, **{f"c{i}": (i % 4) / 4 for i in range(8)}))[0].dice
    many = summarise(trained("student", 0, 0, **{f"c{i}": (i % 4) / 4 for i in range(80)}))[0].dice
    assert few.interval.lower < many.interval.lower < 0.375 < many.interval.upper
    assert many.interval.upper < few.interval.upper


def test_mean_of_few_cases_has_no_interval():
    (row,) = summarise([score("student", "a", dice=0.2)])
    assert row.dice.interval.reason == "1 case; at least 6 are needed"


def test_gain_pairs_fold_seed_and_case_and_counts_a_case_once():
    base, better = {}, {}
    for index in range(6):
        base[f"c{index}"], better[f"c{index}"] = 0.1 * index, 0.1 * index + 0.05
    worse = {case: value - 0.01 for case, value in base.items()}
    scores = trained("baseline", 0, 0, **base) + trained("kdnet", 0, 0, **better)
    scores += trained("baseline", 0, 1, **base) + trained("kdnet", 0, 1, **worse)
    gain = gains(scores, role="kdnet")[0]
    assert gain.n == gain.test.n == gain.interval.n == 6  # not 12
    assert gain.mean == pytest.approx(0.02)


def test_gain_never_pairs_one_seed_with_another():
    scores = trained("baseline", 0, 0, a=0.5) + trained("kdnet", 0, 1, a=0.9)
    assert gains(scores, role="kdnet") == []


def test_processed_label_maps_are_a_table_of_their_own():
    scores = two_networks([0.1] * 6)
    scores += [replace(score, postprocessing="on", dice=1.0) for score in scores]
    assert {row.dice.mean for row in summarise(scores, postprocessing="on")} == {1.0}
    assert max(row.dice.mean for row in summarise(scores)) < 1.0
    assert gains(scores, postprocessing="on")[0].mean == 0.0
    assert gains(scores)[0].mean == pytest.approx(0.1)
    text = rendered(scores, phantom=False)
    assert "native space, no post-processing" in text
    assert "native space, small regions removed" in text


def test_subsets_of_modalities_are_rows_of_their_own():
    scores = [
        replace(score("hemis", "a", dice=0.4), modalities="t1"),
        replace(score("hemis", "a", dice=0.8), modalities="t1+t2"),
    ]
    means = {row.modalities: row.dice.mean for row in summarise(scores)}
    assert means == {"t1": 0.4, "t1+t2": 0.8}
    with pytest.raises(UserError, match="'hemis' is scored twice on a"):
        gains([*scores, score("baseline", "a", dice=0.1)], role="hemis")


def test_the_same_scores_given_twice_are_refused():
    scores = [score("student", "a", dice=0.4)] * 2
    with pytest.raises(UserError, match="scored twice on a"):
        summarise(scores)


def test_surface_dice_is_left_empty_where_spacing_is_nominal():
    (row,) = summarise([score("student", "a", dice=0.4)])
    assert row.nsd.n == 0
    assert math.isnan(row.nsd.mean)


def test_scores_against_other_references_are_not_paired():
    one = score("baseline", "a", dice=0.5, reference=25)
    other = score("student", "a", dice=0.0, reference=0)
    with pytest.raises(UserError, match="the segmentation has changed in between"):
        gains([one, other])
