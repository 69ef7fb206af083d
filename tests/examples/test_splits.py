"""Splits: every subject is tested once, grades are shared out, files are checked."""

from collections import Counter

import pytest

from kdnet.data.splits import Split, share_labels, split_subjects
from kdnet.data.subjects import Subject
from kdnet.errors import UserError


def subjects(count: int, high: int = 0) -> list[Subject]:
    return [
        Subject(f"s{i:02d}", {}, grade=("HGG" if i < high else "LGG") if high else None)
        for i in range(count)
    ]


@pytest.mark.parametrize("fold", range(3))
def test_parts_do_not_overlap_and_miss_nobody(fold):
    split = split_subjects(subjects(12), folds=3, fold=fold, validation_fraction=0.25, seed=1)
    assert len(split.test) == 4
    assert len(split.validation) == 2
    assert len({*split.train, *split.validation, *split.test}) == 12
    whole = split_subjects(subjects(12), folds=3, fold=fold, validation_fraction=0, seed=1)
    assert (len(whole.train), whole.validation, whole.test) == (8, (), split.test)


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


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"fold": 3}, "fold 3 of 3"),
        ({"folds": 9}, "fold 0 of 9"),
        ({"folds": 2, "validation_fraction": 0.9}, "none to train on"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(numbers, message):
    settings = {"folds": 3, "fold": 0, "validation_fraction": 0.2, "seed": 0} | numbers
    with pytest.raises(UserError, match=message):
        split_subjects(subjects(4), **settings)


TRAINING = Split(tuple(f"t{i:02}" for i in range(20)), ("v0",), ("x0", "x1"))


def shared(**numbers):
    return share_labels(TRAINING, **({"labelled": None, "unlabelled": None} | numbers))


def test_subjects_without_a_reference_leave_the_others_alone():
    split = shared(labelled=5)
    assert len(split.train) == 5
    assert len(split.unlabelled) == 15
    assert {*split.train, *split.unlabelled} == {*TRAINING.train}
    assert (split.validation, split.test) == (TRAINING.validation, TRAINING.test)
    assert {*shared(labelled=3).train} < {*split.train}
    assert {*shared(labelled=5, unlabelled=4).unlabelled} < {*split.unlabelled}
    assert shared() == TRAINING


def test_parts_that_are_left_out_are_each_subject_once():
    parts = [shared(labelled=9, leave_out=(part, 3)) for part in range(3)]
    left = [{*shared(labelled=9).train} - {*split.train} for split in parts]
    assert sorted(name for names in left for name in names) == list(shared(labelled=9).train)
    assert all(split.unlabelled == shared(labelled=9).unlabelled for split in parts)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"labelled": 21}, "--unlabelled-root"),
        ({"labelled": 18, "unlabelled": 3}, "--unlabelled-root"),
        ({"labelled": 1, "leave_out": (0, 2)}, "--out-of-fold"),
    ],
)
def test_more_subjects_than_there_are_is_refused(numbers, words):
    with pytest.raises(UserError, match=words):
        shared(**numbers)
