"""Folders of results: what is read, in which order, and that damage is one clear error."""

import json
import math

import pandas as pd
import pytest

from invented_runs import invented_study, write_plan, write_study
from kdnet.data.description import load_description
from kdnet.errors import UserError
from kdnet.evaluation.scoring import read_scores, write_scores
from kdnet.results.stored import read_folder
from kdnet.results.study_tables import Study


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "crossval"
    rows = ("teacher", "baseline", "gt_kl", "kdnet")
    return write_plan(folder, load_description("phantom"), rows, cases=2, kind="crossval")


@pytest.fixture
def plan(root, tmp_path):
    """The files of the plan alone."""
    for path in root.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change_plan(folder, **changes):
    path = folder / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_meaning_comes_from_fields_and_never_from_names(root):
    results = read_folder(root)
    assert [*results.scores["row"].unique()] == [*results.rows]
    assert (results.student, results.baseline) == ("kdnet", "baseline")
    assert results.label("kdnet") == "KD-Net (GT+KL+KD)"
    assert results.phantom
    assert results.seen == ["t1ce"]
    assert len([*results.units()]) == 4


def test_names_of_rows_mean_nothing(plan):
    scores = read_scores(plan / "scores.csv")
    other = {"kdnet": "a", "baseline": "kdnet", "gt_kl": "baseline", "teacher": "b"}
    moved = scores.replace({"row": other, "against": other})
    write_scores(plan / "scores.csv", moved)
    rows = json.loads((plan / "plan.json").read_text())["rows"]
    change_plan(plan, rows=[row | {"name": other[row["name"]]} for row in rows])
    results = read_folder(plan)
    assert (results.student, results.baseline) == ("a", "kdnet")
    assert results.role("b") == "teacher"


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": [{"name": "../x"}]},
        {"rows": [{"name": "=cmd"}]},
        {"rows": ["kdnet"]},
        {"rows": [{"name": "kdnet", "options": 3}]},
        {"rows": {}},
        {"title": 3},
        {"labels": []},
    ],
)
def test_a_plan_of_another_form_is_one_clear_error(plan, changes):
    change_plan(plan, **changes)
    with pytest.raises(UserError, match=r"plan\.json"):
        read_folder(plan)


def test_a_row_with_several_views_is_refused(plan):
    scores = read_scores(plan / "scores.csv")
    scores.loc[0, "modalities"] = "t2"
    write_scores(plan / "scores.csv", scores)
    with pytest.raises(UserError, match=r"several subsets.*subsets\.csv"):
        read_folder(plan)


def test_folder_without_results_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"neither plan\.json nor rows\.csv"):
        read_folder(tmp_path)


def test_published_rows_are_compared_by_kind_and_labels(tmp_path):
    shuffled = invented_study({"paper": 0.0, "chosen": 0.1}).sample(frac=1, random_state=0)
    results = read_folder(write_study(tmp_path, shuffled))
    assert [*results.rows] == [
        *("8-of-20_baseline", "8-of-20_teacher", "8-of-20_chosen", "8-of-20_paper"),
        *("20-of-20_baseline", "20-of-20_chosen", "20-of-20_paper", "20-of-20_teacher"),
    ]
    assert results.rows["8-of-20_chosen"]["against"] == "8-of-20_baseline"
    assert results.rows["20-of-20_chosen"]["teacher"] == "20-of-20_teacher"
    settings = Study(results, "native").settings
    assert settings["8-of-20_chosen"] == "8 labelled + 12 unlabelled"
    assert settings["20-of-20_chosen"] == "20 labelled"


def test_missing_dice_of_published_rows_is_nan(tmp_path):
    rows = invented_study(cases=2)
    rows.loc[0, "dice"] = math.nan
    assert read_folder(write_study(tmp_path, rows)).scores["dice"].isna().sum() == 1


@pytest.mark.parametrize(
    ("column", "value", "quoted"),
    [
        ("dice", 1.5, "1.5"),
        ("dice", "high", "high"),
        ("labelled", 0.5, "0.5"),
        ("unlabelled", -1, "-1"),
        ("space", "mni", "mni"),
        ("case", "", "case"),
        ("study", "lgg t1", "lgg t1"),
    ],
)
def test_unfit_value_is_named_with_its_line(tmp_path, column, value, quoted):
    rows = invented_study(cases=2).astype(object)
    rows.loc[3, column] = value
    with pytest.raises(UserError, match=quoted) as error:
        read_folder(write_study(tmp_path, rows))
    assert column == "study" or "line 5" in str(error.value)


def test_place_that_comes_twice_and_two_baselines_are_refused(tmp_path):
    rows = invented_study(cases=2)
    with pytest.raises(UserError, match="two lines are about"):
        read_folder(write_study(tmp_path, rows.iloc[[0, 1, 0]]))
    again = rows[rows["row"] == "8-of-20_baseline"].assign(row="again")
    both = pd.concat([rows, again])
    with pytest.raises(UserError, match="both of the kind baseline with 8 labelled"):
        read_folder(write_study(tmp_path, both))


@pytest.mark.parametrize(
    "changes", [{"labels": []}, {"protocol": 3}, {"chosen": [1]}, {"phantom": "yes"}]
)
def test_facts_of_another_form_are_one_clear_error(tmp_path, changes):
    with pytest.raises(UserError, match=r"study\.json"):
        read_folder(write_study(tmp_path, invented_study(cases=1), **changes))
