import json

import pytest

from kdnet.data.splits import Split
from kdnet.data.subjects import Subject
from kdnet.errors import UserError
from kdnet.runs.folds import Fold, deal, load_folds, save_folds

SUBJECTS = [Subject(f"case{i}", images={}, segmentation=None) for i in range(9)]


def deal_nine(**options):
    usual = {"folds": 3, "repeats": 1, "validation_fraction": 0.2, "seed": 0}
    return deal(SUBJECTS, **(usual | options))


def test_every_subject_is_tested_once_in_each_repeat():
    folds = deal_nine(repeats=2)
    assert [(fold.number, fold.repeat) for fold in folds] == [
        *((0, 0), (1, 0), (2, 0)),
        *((3, 1), (4, 1), (5, 1)),
    ]
    for repeat in (0, 1):
        tested = [n for fold in folds if fold.repeat == repeat for n in fold.split.test]
        assert sorted(tested) == [subject.name for subject in SUBJECTS]


def test_repeats_deal_differently():
    first, second = (
        {fold.split.test for fold in deal_nine(repeats=2) if fold.repeat == r} for r in (0, 1)
    )
    assert first != second


def test_written_folds_are_read_back(tmp_path):
    folds = deal_nine(repeats=2)
    save_folds(tmp_path / "folds.json", folds)
    assert load_folds(tmp_path / "folds.json", SUBJECTS) == folds


def write(tmp_path, *folds):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"folds": list(folds)}), encoding="utf-8")
    return path


def lists(train, validation, test, **more):
    return {"train": train, "validation": validation, "test": test} | more


def test_all_problems_of_case_lists_are_named_at_once(tmp_path):
    path = write(
        tmp_path,
        lists(["case0", "case0"], ["case1"], ["case2"]),
        lists(["case3"], [], ["case2", "stranger"]),
    )
    with pytest.raises(UserError) as caught:
        load_folds(path, SUBJECTS)
    message = str(caught.value)
    assert "fold 0: named more than once: case0" in message
    assert "fold 1: no subjects for validation" in message
    assert "fold 1: not in the data set: stranger" in message
    assert "folds 0 and 1: their test sets overlap: case2" in message


def test_repeated_splits_may_test_a_subject_again(tmp_path):
    path = write(
        tmp_path,
        lists(["case0"], ["case1"], ["case2"]),
        lists(["case1"], ["case0"], ["case2"], repeat=1),
    )
    assert load_folds(path, SUBJECTS)[1] == Fold(1, 1, Split(("case1",), ("case0",), ("case2",)))


@pytest.mark.parametrize("content", ["[]", "{", '{"folds": []}', '{"folds": [{"train": []}]}'])
def test_a_file_of_another_form_is_refused_with_the_form_expected(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="--folds_file"):
        load_folds(path, SUBJECTS)
