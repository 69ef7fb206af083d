"""Splits: every subject is tested once, grades are shared out, files are checked."""

import json
from collections import Counter

import pytest

from data.layouts import Subject
from data.splits import Split, split_subjects
from errors import UserError


def subjects(count: int, high: int = 0) -> list[Subject]:
    return [
        Subject(f"s{i:02d}", {}, grade=("HGG" if i < high else "LGG") if high else None)
        for i in range(count)
    ]


def test_every_subject_is_tested_exactly_once():
    tested = [
        name
        for fold in range(3)
        for name in split_subjects(
            subjects(10), folds=3, fold=fold, validation_fraction=0.1, seed=0
        ).test
    ]
    assert Counter(tested) == Counter(subject.name for subject in subjects(10))


@pytest.mark.parametrize("fold", range(3))
def test_parts_do_not_overlap_and_miss_nobody(fold):
    split = split_subjects(subjects(12), folds=3, fold=fold, validation_fraction=0.25, seed=1)
    assert len(split.test) == 4
    assert len(split.validation) == 2
    assert len({*split.train, *split.validation, *split.test}) == 12


@pytest.mark.parametrize("fold", range(3))
def test_each_part_has_its_share_of_each_grade(fold):
    grade = {subject.name: subject.grade for subject in subjects(60, high=45)}
    split = split_subjects(
        subjects(60, high=45), folds=3, fold=fold, validation_fraction=0.2, seed=0
    )
    assert Counter(grade[name] for name in split.test) == {"HGG": 15, "LGG": 5}
    assert Counter(grade[name] for name in split.validation) == {"HGG": 6, "LGG": 2}


def test_the_seed_alone_decides():
    def split(seed: int, listed: list[Subject]) -> Split:
        return split_subjects(listed, folds=3, fold=0, validation_fraction=0.2, seed=seed)

    assert split(0, subjects(20)) == split(0, subjects(20)[::-1])
    assert split(0, subjects(20)) != split(1, subjects(20))


def test_no_validation_if_its_share_is_zero():
    split = split_subjects(subjects(6), folds=2, fold=0, validation_fraction=0, seed=0)
    assert split.validation == ()
    assert len(split.train) == 3


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"folds": 1}, "at least 2"),
        ({"fold": 3}, "between 0"),
        ({"validation_fraction": 1.0}, "below 1"),
        ({"folds": 9}, "9 folds need"),
        ({"folds": 2, "validation_fraction": 0.9}, "none to train on"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(numbers, message):
    settings = {"folds": 3, "fold": 0, "validation_fraction": 0.2, "seed": 0} | numbers
    with pytest.raises(UserError, match=message):
        split_subjects(subjects(4), **settings)


def test_a_saved_split_comes_back(tmp_path):
    split = split_subjects(subjects(9), folds=3, fold=1, validation_fraction=0.2, seed=0)
    split.save(tmp_path / "cases.json")
    assert Split.load(tmp_path / "cases.json", subjects(9)) == split
    assert list(tmp_path.iterdir()) == [tmp_path / "cases.json"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": ["s00"], "validation": ["s00"], "test": []}, "more than once: s00"),
        ({"train": ["x"], "validation": [], "test": []}, "not in the data set: x"),
        ({"train": [], "test": []}, "keys train, validation, test"),
        ({"train": "s00", "validation": [], "test": []}, "list of names"),
        ([], "found list"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(tmp_path, parts, message):
    (tmp_path / "cases.json").write_text(json.dumps(parts))
    with pytest.raises(UserError, match=message):
        Split.load(tmp_path / "cases.json", subjects(2))


def test_a_split_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "cases.json").write_text("{")
    with pytest.raises(UserError, match="expected a split as JSON"):
        Split.load(tmp_path / "cases.json", subjects(2))
