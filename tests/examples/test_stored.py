"""Folders of results: what is read, in which order, and that damage is one clear error."""

import json
import math

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


def test_meaning_comes_from_fields_and_never_from_names(plan):
    results = read_folder(plan)
    assert [*results.scores["row"].unique()] == [*results.rows]
    assert (results.student, results.baseline) == ("kdnet", "baseline")
    assert results.label("kdnet") == "KD-Net (GT+KL+KD)"
    assert results.own_options == ["gt_kl: imitation 0.0"]
    assert [unit.name for unit in results.units("kdnet")] == ["fold0-seed0"]
    other = {"kdnet": "a", "baseline": "kdnet", "gt_kl": "baseline", "teacher": "b"}
    scores = read_scores(plan / "scores.csv").replace({"row": other, "against": other})
    write_scores(plan / "scores.csv", scores)
    rows = json.loads((plan / "plan.json").read_text())["rows"]
    change_plan(plan, rows=[row | {"name": other[row["name"]]} for row in rows])
    results = read_folder(plan)
    assert (results.student, results.baseline, results.teachers) == ("a", "kdnet", ["b"])


def test_whose_visits_cases_are_is_read_from_their_names(plan):
    scores = read_scores(plan / "scores.csv")
    visits = scores["case"].replace({"Case_0": "sub-1_ses-1", "Case_1": "sub-1_ses-2"})
    write_scores(plan / "scores.csv", scores.assign(case=visits))
    assert {*read_folder(plan).scores["patient"]} == {"sub-1"}


def test_scores_that_were_not_put_together_are_told_with_what_to_do(plan):
    (plan / "scores.csv").unlink()
    with pytest.raises(UserError, match=r"scores\.csv.*--unit"):
        read_folder(plan)


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
        {"chosen": "kdnet"},
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


def test_published_rows_stand_in_the_order_of_their_subjects(tmp_path):
    shuffled = invented_study({"paper": 0.0, "chosen": 0.1}).sample(frac=1, random_state=0)
    shuffled.loc[shuffled.index[0], "dice"] = math.nan
    results = read_folder(write_study(tmp_path, shuffled))
    assert [*results.rows] == [
        *("8-of-20_baseline", "8-of-20_teacher", "8-of-20_chosen", "8-of-20_paper"),
        *("20-of-20_baseline", "20-of-20_chosen", "20-of-20_paper", "20-of-20_teacher"),
    ]
    assert results.scores["dice"].isna().sum() == 1
    study = Study(results, "native")
    assert study.setting("8-of-20_chosen") == "8 labelled + 12 unlabelled"
    assert study.setting("20-of-20_chosen") == "20 labelled"


def test_a_place_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="two lines are about"):
        read_folder(write_study(tmp_path, invented_study(cases=2).iloc[[0, 1, 0]]))
