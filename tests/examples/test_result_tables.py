"""Tables of results: what stands in their cells, and what names from files can do to them."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from invented_runs import scores_of, table, two_networks, write_plan
from kdnet.data.description import load_description
from kdnet.results.stats import gains
from kdnet.results.stored import Results, read_folder
from kdnet.results.tables import (
    Table,
    empty_table,
    gain_table,
    headline,
    nothing_found,
    number,
    p_value,
    paper_table,
    protocol_table,
    published,
    published_table,
    results_table,
    subset_table,
)
from kdnet.rows import Row
from kdnet.runs.folder import Facts

NAMES = ("flair", "t1", "t1ce", "t2")


def cells_of(found, name, column=0):
    """Lines whose first cell is a name."""
    frame = found.frame
    return [list(line) for line in frame.to_numpy() if line[column] == name]


def test_numbers_are_written_with_true_signs():
    assert number(-0.12345) == "\N{MINUS SIGN}0.123"
    assert number(0.5, 1, signed="+") == "+0.5"
    assert number(-0.0001, signed="+") == "0.000"
    assert p_value(0.0004) == "< 0.001"
    assert p_value(math.nan) == "\N{EN DASH}"


def test_both_conventions_spreads_and_unit_stand_in_a_line():
    empty = {"reference_voxels": 0, "dice_reference_present": math.nan}
    scores = table(
        scores_of("student", {"a": 0.1, "b": 0.3}),
        scores_of("student", {"a": 0.3, "b": 0.5}, seed=1),
        scores_of("student", {"c": 0.5}, fold=1, **empty),
        scores_of("student", {"c": 0.7}, fold=1, seed=1, **empty),
    )
    (line,) = results_table(scores, str.upper).frame.to_dict("records")
    assert line == {
        "network": "STUDENT",
        "region": "ET",
        "Dice": "0.400 ± 0.200",
        "median (quartiles)": "0.400 (0.300 to 0.500)",
        "95 % interval": "none",
        "sd of folds": "0.212",  # of 0.3 and 0.6
        "sd of seeds": "0.141",  # of 0.3 and 0.5
        "Dice, reference present (n)": "0.300 ± 0.141 (2)",
        "HD95": "4.0 ± 0.0 mm",
        "surface Dice": "\N{EN DASH}",
        "n": "3",
    }


def test_spaces_and_post_processing_are_tables_of_their_own():
    scores = two_networks([0.1] * 6)
    scores = table(scores, scores.assign(postprocessing="on", dice=1.0))
    on = results_table(scores, str, postprocessing="on")
    assert "small regions removed" in on.title
    assert {line[2] for line in on.frame.to_numpy()} == {"1.000 ± 0.000"}
    assert results_table(scores, str, space="grid").frame.empty


def test_empty_regions_are_counted_by_hand():
    scores = table(
        scores_of("student", {"a": 1.0, "b": 0.0}, reference_voxels=0, predicted_voxels=0),
        scores_of("student", {"b": 0.0}, reference_voxels=0, predicted_voxels=7, seed=1),
        scores_of("student", {"e": 0.0}, reference_voxels=9, predicted_voxels=0),
    )
    (line,) = empty_table(scores, str).frame.to_numpy().tolist()
    assert line == ["student", "ET", "2 of 3", "1", "1"]


def test_a_network_that_finds_a_region_nowhere_is_named():
    scores = table(
        scores_of("blind", {"a": 1.0}, reference_voxels=0),
        scores_of("blind", {"b": 0.0, "c": 0.0}, reference_voxels=9),
        scores_of("sees", {"b": 0.0, "c": 0.1}, reference_voxels=9),
        scores_of("untested", {"a": 0.0}, reference_voxels=0),
    )
    (sentence,) = nothing_found(scores, str.upper)
    assert "BLIND" in sentence
    assert "ET" in sentence


def test_gains_and_sentences_say_no_more_than_they_may():
    better = gains(two_networks([0.1 + index / 1000 for index in range(9)]))
    (line,) = gain_table(better, str).frame.to_numpy()
    assert line[0] == "student \N{MINUS SIGN} baseline"
    assert line[6] == "better"
    (sentence,) = headline(better, str)
    assert sentence.endswith("student is better than baseline.")
    few = gains(two_networks([0.1, 0.2]))
    assert "2 patients; at least 6 are needed" in gain_table(few, str).text()
    assert headline(few, str)[0].endswith("Nothing can be concluded.")
    assert "no difference is shown" in headline(gains(two_networks([0.1, -0.1] * 5)), str)[0]
    assert gain_table([], str).frame.empty


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables") / "run"
    return write_plan(folder, load_description("phantom"), cases=6, folds=2)


def test_ours_over_folds_and_cases_stands_beside_the_published_numbers(root):
    results = read_folder(root)
    found = paper_table("Table 1", results)
    over_folds, over_cases, theirs = cells_of(found, "KD-Net (GT + KL + KD)")
    own = results.scores.query("row == 'student' and space == 'grid' and region == 'WT'")
    folds, cases = (100 * own.groupby(by)["dice"].mean() for by in ("fold", "case"))
    mean = f"{cases.mean():.2f} ± "
    assert over_folds[1:3] == ["ours, over folds", "(1)"]
    assert over_folds[5] == mean + f"{folds.std():.2f}"
    assert over_cases[1:3] == ["ours, over 12 cases", "(1)"]
    assert over_cases[5] == mean + f"{cases.std():.2f}"
    assert theirs[1:] == [
        *("published, over folds", "(2)"),
        *("71.67 ± 1.22", "81.45 ± 1.25", "76.98 ± 1.54"),
    ]
    assert "(1) ours: phantom, 12 cases, 2 folds, 3 epochs." in found.notes
    assert [line[1] for line in cells_of(found, "U-HVED")] == ["published"]
    # Of Table 2, baseline, teacher and KD-Net: rows are known by recipe, role and options.
    assert len(cells_of(paper_table("Table 2", results), "ours, over folds", 1)) == 3


def under_protocol(scores, **facts):
    rows = (Row("student", label="mine"),)
    told = Facts("crossval", "as here", rows, protocol="as here", **facts)
    return Results(Path(), told, {row.name: row for row in rows}, scores)


def test_under_a_public_protocol_splits_and_cases_stand_beside_what_others_published():
    # Case b is tested in both splits.
    parts = [
        scores_of("student", values, region, fold=fold, space="native", postprocessing=treatment)
        for region in ("ET", "TC", "WT")
        for treatment, more in (("off", 0.0), ("on", 0.1))
        for fold, values in enumerate(
            ({"a": 0.2 + more, "b": 0.4 + more}, {"b": 0.6 + more, "c": 0.8 + more})
        )
    ]
    seen = "flair+t1ce"
    more = scores_of("student", {"a": 1.0}, space="native", modalities=seen, fold=9)
    found = protocol_table(under_protocol(table(*parts, more), case_lists="brats2018-public"))
    over_splits, over_cases = cells_of(found, "mine, no post-processing")
    assert over_splits[3:] == ["50.00 ± 28.28"] * 3  # of 0.3 and 0.7
    assert over_cases[1:] == ["ours, over 3 cases", "(1)", *["50.00 ± 30.00"] * 3]  # 0.2, 0.5, 0.8
    cleaned, _ = cells_of(found, "mine, small regions removed")
    assert cleaned[3:] == ["60.00 ± 28.28"] * 3
    (theirs,) = cells_of(found, "DeMoSeg")
    assert theirs[3:] == ["78.98", "84.81", "81.99"]
    assert found.notes[1] == "(1) ours: as here."
    # One protocol alone: what is not comparable stands in the other table.
    assert cells_of(found, "ACN") == []


@pytest.mark.parametrize(
    ("lists", "changes"),
    [
        ({}, {}),
        ({"case_lists": "mine"}, {}),
        ({"case_lists": "brats2018-public"}, {"modalities": "t2"}),
    ],
)
def test_other_case_lists_or_modalities_stand_beside_no_published_number(lists, changes):
    parts = [scores_of("student", {"a": 0.2}, region, **changes) for region in ("ET", "TC", "WT")]
    assert protocol_table(under_protocol(table(*parts), **lists)) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"recipe": "supervised"},
        {"role": "teacher"},
        {"options": {"temperature": 1.0}},
        {"labelled": 3},
    ],
)
def test_another_row_is_not_taken_for_a_published_one(fields):
    row = Row(**({"name": "kdnet", "recipe": "distilled"} | fields))
    scores = scores_of("kdnet", {"a": 0.5}, space="grid")
    results = Results(Path(), Facts("crossval", "x", (row,)), {"kdnet": row}, scores)
    found = paper_table("Table 1", results)
    assert found is None or len(cells_of(found, "KD-Net (GT + KL + KD)")) == 1


@pytest.mark.parametrize(
    "option", [{"start": "teacher"}, {"latent_weight": 0.0}, {"imitation": 0.0}, {"labelled": 4}]
)
def test_a_run_with_another_recipe_is_not_taken_for_the_published_one(root, tmp_path, option):
    results = read_folder(root)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**results.config, **option}))
    found = paper_table("Table 1", replace(results, root=tmp_path))
    assert found is None or len(cells_of(found, "KD-Net (GT + KL + KD)")) == 1


PAPERS = "0.75 * SoftTargetDiceBCE(temperature=5.0) + 0.25 * GroundTruth()"
PAPERS += " + 10 * LatentKL(tap='bottleneck')"


@pytest.mark.parametrize(
    ("objective", "lines"),
    [
        (PAPERS, 3),
        (PAPERS.replace("temperature=5.0", "temperature=1.0, binarisation='soft'"), 3),
        (PAPERS.replace("GroundTruth()", "GroundTruth(weighted)"), 1),
        (PAPERS.replace("GroundTruth()", "GroundTruth(TverskyLoss(alpha=0.7))"), 1),
        (PAPERS.replace("LatentKL", "CosineFeature"), 1),
        (PAPERS.replace("0.75", "0.6").replace("0.25", "0.4"), 1),
        (f"{PAPERS} + 1 * CWD()", 1),
        (PAPERS.partition(" + 10")[0], 1),
    ],
)
def test_a_student_with_another_objective_than_the_papers_is_not_shown_as_the_papers(
    root, tmp_path, objective, lines
):
    copy = tmp_path / "run"
    shutil.copytree(root, copy)
    for path in copy.glob("units/student/*/unit.json"):
        config = {"imitation": 0.75, "latent_weight": 10.0}
        experiment = {
            "objective": objective,
            "row": {"recipe": "distilled"},
            "config": config,
        }
        path.write_text(json.dumps({"experiment": experiment}))
    found = paper_table("Table 1", read_folder(copy))
    assert len(cells_of(found, "KD-Net (GT + KL + KD)")) == lines
    assert len(cells_of(found, "baseline (GT)")) == 3


def test_published_numbers_have_protocols_and_lie_between_zero_and_a_hundred():
    rows = [row for rows in published()["tables"].values() for row in rows]
    assert len(rows) == 5 + 10 + 32
    for row in rows:
        assert row["protocol"] in published()["protocols"], row
        for region in ("ET", "TC", "WT"):
            mean, *sd = row[region] if isinstance(row[region], list) else [row[region]]
            assert 0 < mean < 100
            assert all(0 < value < 5 for value in sd)
    note = published_table().notes[0]
    assert "Only numbers of one protocol can be compared." in note


def test_fifteen_subsets_and_their_mean():
    scores = [scores_of("baseline", {"a": 0.5})]
    subsets = [
        list(subset.split("+"))
        for subset in subset_table(scores[0], str, NAMES, "native").frame["modalities"][:-1]
    ]
    assert len(subsets) == 15
    for index, subset in enumerate(subsets):
        # The order within a subset is that of the network, not of the table.
        seen = "+".join(reversed(subset))
        scores.append(scores_of("hemis", {"a": index / 20, "b": index / 20}, modalities=seen))
    found = subset_table(table(*scores), str, NAMES, "native").frame
    assert found.to_numpy()[0].tolist() == ["flair", "not run", "0.00"]
    assert found.to_numpy()[-1].tolist() == ["mean of 15", "\N{EN DASH}", "35.00"]


def test_names_are_shown_and_never_obeyed():
    hostile = "<b>|\x1b[31m\x07\u202e\n" + "long" * 30
    found = Table.of(hostile, [{hostile: hostile, "n": "1"}, {hostile: hostile, "n": "2"}], hostile)
    markdown, text = found.markdown(), found.text()
    assert "<b>" not in markdown
    assert "\\|" in markdown
    assert not {"\x1b", "\x07", "\u202e"} & {*text, *markdown}
    assert len([line for line in markdown.splitlines() if line.startswith("|")]) == 4
    page = str(found.html())
    assert "<b>" not in page
    assert "long" * 30 in page  # nothing is cut
    assert page.count("&lt;b&gt;") == 3
