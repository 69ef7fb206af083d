from dataclasses import replace

import pytest

from kdnet.evaluation.scoring import Score
from kdnet.results.results_table import results_table

SCORE = Score(
    role="kdnet",
    case="a",
    region="ET",
    space="native",
    dice=0.5,
    dice_reference_present=0.5,
    hd95=3.0,
    hd95_unit="mm",
    reference_voxels=10,
    predicted_voxels=10,
    nsd=0.75,
)


def cells(table, line=0):
    return dict(zip(table.columns, table.rows[line], strict=True))


def test_mean_quartiles_and_counts_are_those_worked_out_by_hand():
    values = (0.2, 0.4, 0.6, 0.8)
    scores = [replace(SCORE, case=str(i), dice=value) for i, value in enumerate(values)]
    found = cells(results_table(scores, space="native"))
    assert found["Dice"] == "0.500 ± 0.258"
    assert found["median (quartiles)"] == "0.500 (0.350 to 0.650)"
    assert found["95 % interval"] == "too few cases"
    assert (found["HD95"], found["surface Dice"], found["n"]) == (
        "3.0 ± 0.0 mm",
        "0.750 ± 0.000",
        "4",
    )


def test_spread_over_folds_and_over_seeds_stand_apart():
    places = {(0, 0): 0.1, (0, 1): 0.3, (1, 0): 0.5, (1, 1): 0.7}
    scores = [
        replace(SCORE, case=f"case{fold}", fold=fold, seed=seed, dice=value)
        for (fold, seed), value in places.items()
    ]
    found = cells(results_table(scores, space="native"))
    # Folds have the means 0.2 and 0.6, seeds 0.3 and 0.5; two cases, not four.
    assert (found["sd of folds"], found["sd of seeds"], found["n"]) == ("0.283", "0.141", "2")


def test_an_empty_reference_is_counted_and_left_out_of_the_second_convention():
    empty = replace(
        SCORE, case="b", dice=0.0, dice_reference_present=float("nan"), reference_voxels=0
    )
    table = results_table([SCORE, empty], space="native")
    assert cells(table)["Dice, reference present (n)"] == "0.500 ± \N{EN DASH} (1)"
    assert (
        "Cases with an empty reference: ET 1. Predicted all the same: kdnet ET 1." in table.notes[0]
    )


@pytest.mark.parametrize("wanted", [("grid", "off"), ("native", "on")])
def test_other_spaces_and_label_maps_are_kept_apart(wanted):
    space, postprocessing = wanted
    assert results_table([SCORE], space=space, postprocessing=postprocessing).rows == []


def test_rows_stand_in_the_order_of_the_scores_under_their_labels():
    scores = [replace(SCORE, role=role) for role in ("teacher", "baseline")]
    table = results_table(scores, space="native", labels={"baseline": "GT"})
    assert [row[0] for row in table.rows] == ["teacher", "GT"]
