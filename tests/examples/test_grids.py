"""Tables of a cross-validation."""

import math
from dataclasses import replace

from invented_runs import invented_scores
from kdnet.results.grids import chapters, gain_grid
from kdnet.results.tables import gains


def scores_over_folds():
    """Two cases per fold; the Dice of fold 0 is 0.2, that of fold 1 is 0.4."""
    return [
        replace(score, dice=0.2 + 0.2 * fold, case=f"{score.case}-{fold}", fold=fold, nsd=math.nan)
        for fold in (0, 1)
        for score in invented_scores(cases=4, rows=("baseline", "kdnet"), first=1)
    ]


def test_field_gives_statistics_over_cases_folds_and_seeds():
    chapter, *_ = chapters(scores_over_folds(), str.upper)
    name, (cell, *_) = chapter.grids[0].rows[0]
    assert name == "BASELINE"
    assert cell.text == "0.300 ± 0.107"  # four cases of 0.2, four of 0.4
    median, interval, spread = cell.notes
    assert median == "median 0.300 (0.200 to 0.400)"
    assert interval.startswith("95% interval 0.2")
    assert spread == "sd of folds 0.141, of seeds –; n 8"  # noqa: RUF001


def test_metrics_that_nobody_has_are_left_out():
    chapter, *_ = chapters(scores_over_folds(), str)
    titles = [grid.title for grid in chapter.grids]
    assert titles == [
        "Dice, all cases",
        "Dice, cases with the region in the reference",
        "HD95 [mm]",
    ]


def test_native_space_comes_first_and_post_processing_after_it():
    scores = scores_over_folds()
    scores += [replace(s, postprocessing="on") for s in scores if s.space == "native"]
    assert [chapter.title for chapter in chapters(scores, str)] == [
        "native space, no post-processing",
        "native space, small regions removed",
        "training grid, no post-processing",
    ]


def test_few_cases_are_given_without_interval_and_with_the_reason():
    scores = invented_scores(cases=3, rows=("kdnet",))
    (chapter, *_) = chapters(scores, str)
    assert chapter.grids[0].rows[0][1][0].notes[1] == "3 cases; at least 6 are needed"


def test_subsets_of_one_network_are_told_apart():
    scores = invented_scores(cases=3, rows=("hemis", "kdnet"))
    scores = [replace(score, modalities="t1ce") for score in scores]
    scores += [replace(s, modalities="t1+t2") for s in scores if s.role == "hemis"]
    (chapter, *_) = chapters(scores, str)
    names = [name for name, _ in chapter.grids[0].rows]
    assert names == ["hemis (t1ce)", "kdnet", "hemis (t1+t2)"]


def test_empty_regions_are_counted_per_network():
    (chapter, *_) = chapters(invented_scores(cases=8, rows=("kdnet",)), str)
    assert chapter.empties.columns[0] == "ET: reference empty in 1 of 8"
    assert chapter.empties.rows[0][1][0].text == "1 predicted all the same, 0 missed"


def test_gains_are_coloured_by_what_they_allow_to_say():
    differences = gains(invented_scores(cases=12), role="student", against="baseline")
    grid = gain_grid(differences, "dice", "Dice", str)
    ((name, cells),) = grid.rows
    assert name == "student \N{MINUS SIGN} baseline"
    assert [cell.verdict for cell in cells] == ["better"] * 3
    assert cells[1].notes[1].endswith("; n 12")
    few = gains(invented_scores(cases=3), role="student", against="baseline")
    ((_, cells),) = gain_grid(few, "dice", "Dice", str).rows
    assert cells[0].notes == ("3 paired cases; at least 6 are needed",)
