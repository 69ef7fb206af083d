"""What the page reads from the folder of a cross-validation."""

import json
import os
import shutil

import pytest
import yaml

from invented_runs import write_crossval
from kdnet.data.description import load_description
from kdnet.results.crossval_folder import CrossvalFolder
from kdnet.results.slices import load_slices


def folder_of(tmp_path, *rows):
    facts = {"rows": rows, "folds": 2, "seeds": [0]}
    (tmp_path / "crossval.json").write_text(json.dumps(facts))
    return CrossvalFolder(tmp_path)


@pytest.mark.parametrize(
    ("rows", "student", "baseline"),
    [
        (("teacher", "baseline", "gt_kl", "kdnet"), "kdnet", "baseline"),
        (("teacher", "baseline", "hemis"), "hemis", "baseline"),
        (("teacher", "baseline-flair", "kdnet-flair"), "kdnet-flair", "baseline-flair"),
        (("baseline", "baseline_0skips", "kdnet_0skips"), "kdnet_0skips", "baseline_0skips"),
        (("baseline",), "baseline", "baseline"),
    ],
)
def test_student_and_baseline_are_of_one_kind(tmp_path, rows, student, baseline):
    folder = folder_of(tmp_path, *rows)
    assert (folder.student, folder.baseline) == (student, baseline)


def test_rows_are_compared_with_the_baseline_of_their_kind(tmp_path):
    folder = folder_of(tmp_path, "baseline", "baseline_0skips", "gt_kl", "gt_kl_0skips", "teacher")
    kinds = [folder.baseline_of(row) for row in folder.rows]
    assert kinds == ["baseline", "baseline_0skips", "baseline", "baseline_0skips", "baseline"]


def test_pictures_show_the_pair_first_then_teachers(tmp_path):
    folder = folder_of(tmp_path, "teacher", "baseline", "gt_kl", "kdnet")
    assert folder.shown == ["baseline", "kdnet", "teacher", "gt_kl"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder") / "crossval"
    return write_crossval(root, load_description("brats2021"), folds=2, cases=2)


@pytest.fixture
def crossval(original, tmp_path):
    return CrossvalFolder(shutil.copytree(original, tmp_path / "crossval"))


def test_slices_are_cut_once_and_again_after_new_scores(crossval):
    assert crossval.cut_slices(crossval.scores()) == ""
    _, cases = load_slices(crossval.slices)
    assert list(cases[0].labels) == ["reference", "baseline", "kdnet", "teacher"]
    before = crossval.slices.stat().st_mtime_ns
    crossval.cut_slices(crossval.scores())
    assert crossval.slices.stat().st_mtime_ns == before
    os.utime(crossval.root / "scores.csv", ns=(before + 10**9, before + 10**9))
    crossval.cut_slices(crossval.scores())
    assert crossval.slices.stat().st_mtime_ns != before


def test_cases_without_label_maps_are_not_chosen_and_that_is_said(crossval):
    shutil.rmtree(crossval.root / "fold1-seed0" / "predictions")
    said = crossval.cut_slices(crossval.scores())
    assert said == "Chosen among the 2 of 4 cases whose label maps were found."
    _, cases = load_slices(crossval.slices)
    assert {case.name for case in cases} <= {"Case_0", "Case_1"}


def test_images_that_moved_are_missed_in_words(crossval):
    config = crossval.config | {"data_root": "/nowhere"}
    (crossval.root / "config.yaml").write_text(yaml.safe_dump(config))
    assert "The images are not where config.yaml names them" in crossval.cut_slices(
        crossval.scores()
    )
    assert not crossval.slices.exists()


def test_phantoms_are_found_in_the_cache(crossval, original):
    phantoms = crossval.root / "cache" / "phantoms-12"
    shutil.copytree(original.parent / "data", phantoms)
    (phantoms / "phantom.json").write_text("{}")
    (crossval.root / "config.yaml").write_text("student_modalities: [t1ce]\n")
    assert crossval.cut_slices(crossval.scores()) == ""
    assert load_slices(crossval.slices)[1]


def test_no_row_is_compared_with_a_baseline_of_another_kind(tmp_path):
    folder = folder_of(tmp_path, "baseline", "kdnet_0skips", "teacher_0skips")
    assert [folder.baseline_of(row) for row in folder.rows] == ["baseline", "", ""]
