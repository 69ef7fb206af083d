"""rows.csv: what is written is read, in any order, and what is wrong is named."""

import math
from dataclasses import replace

import pytest

from invented_runs import invented_study, write_invented_study
from kdnet.errors import UserError
from kdnet.studies.rows import COLUMNS, StudyRow, read_rows, read_study, write_rows

ROW = StudyRow("s", "20-of-56_kd", "kd", 20, 36, 1, 2, "Case_3", "WT", "native", 0.25, 400)


def damaged(path, **texts):
    """A file of one row in which some values are replaced."""
    values = {name: str(getattr(ROW, name)) for name in COLUMNS} | texts
    path.write_text(",".join(COLUMNS) + "\n" + ",".join(values.values()) + "\n")
    return path


def test_rows_come_back_as_they_were(tmp_path):
    write_rows(tmp_path / "rows.csv", [ROW])
    assert read_rows(tmp_path / "rows.csv") == [ROW]
    assert (tmp_path / "rows.csv").read_text() == (
        "study,row,kind,labelled,unlabelled,fold,seed,case,region,space,dice,steps\n"
        "s,20-of-56_kd,kd,20,36,1,2,Case_3,WT,native,0.25,400\n"
    )


def test_missing_dice_is_an_empty_cell(tmp_path):
    write_rows(tmp_path / "rows.csv", [replace(ROW, dice=math.nan)])
    assert "native,,400" in (tmp_path / "rows.csv").read_text()
    assert math.isnan(read_rows(tmp_path / "rows.csv")[0].dice)


def test_order_of_rows_leaves_the_file_as_it_is(tmp_path):
    rows = invented_study(cases=4)
    write_rows(tmp_path / "a.csv", rows)
    write_rows(tmp_path / "b.csv", reversed(rows))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_order_of_columns_does_not_matter(tmp_path):
    write_rows(tmp_path / "a.csv", [ROW])
    lines = [line.split(",") for line in (tmp_path / "a.csv").read_text().splitlines()]
    (tmp_path / "b.csv").write_text("\n".join(",".join(line[::-1]) for line in lines))
    assert read_rows(tmp_path / "b.csv") == [ROW]


@pytest.mark.parametrize(
    ("column", "text", "expected"),
    [
        ("dice", "1.5", "dice is '1.5'; expected a number from 0 to 1, or nothing"),
        ("dice", "high", "dice is 'high'; expected a number"),
        ("labelled", "0", "labelled is '0'; expected a whole number, 1 or more"),
        ("unlabelled", "-1", "unlabelled is '-1'; expected a whole number, 0 or more"),
        ("seed", "1.0", "seed is '1.0'; expected a whole number"),
        ("space", "mni", "space is 'mni'; expected one of native, grid"),
        ("case", "", "case is ''; expected a name"),
        ("steps", "4,5", "expected 12 values, found more"),
    ],
)
def test_unfit_value_is_named_with_its_line(tmp_path, column, text, expected):
    with pytest.raises(UserError, match=rf"rows.csv, line 2: {expected}"):
        read_rows(damaged(tmp_path / "rows.csv", **{column: text}))


def test_line_that_was_cut_off_is_named(tmp_path):
    path = damaged(tmp_path / "rows.csv")
    path.write_text(path.read_text()[:-5])
    with pytest.raises(UserError, match="line 2: steps is missing; expected a whole number"):
        read_rows(path)


def test_other_columns_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("case,dice\n")
    with pytest.raises(UserError, match=r"expected the columns study, row.* found case, dice"):
        read_rows(tmp_path / "rows.csv")


def test_missing_and_empty_files_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="found no such file"):
        read_rows(tmp_path / "rows.csv")
    write_rows(tmp_path / "rows.csv", [])
    with pytest.raises(UserError, match="at least one row, found none"):
        read_rows(tmp_path / "rows.csv")


def test_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="expected a CSV file in UTF-8"):
        read_rows(tmp_path / "rows.csv")


def test_place_that_comes_twice_is_named_with_both_lines(tmp_path):
    write_rows(tmp_path / "rows.csv", [ROW, replace(ROW, dice=0.5)])
    with pytest.raises(UserError, match="lines 2 and 3 are both about 20-of-56_kd, fold 1, seed 2"):
        read_rows(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"steps": 9}, r"labelled, unlabelled and steps \(20, 36, 400\) and \(20, 36, 9\)"),
        ({"kind": "other"}, "is of the kinds kd and other; expected one"),
    ],
)
def test_rows_of_one_unit_do_not_contradict_each_other(tmp_path, change, expected):
    write_rows(tmp_path / "rows.csv", [ROW, replace(ROW, case="Case_4", **change)])
    with pytest.raises(UserError, match=expected):
        read_rows(tmp_path / "rows.csv")


def test_rows_of_another_study_are_refused(tmp_path):
    rows = [replace(row, study="lgg t1") for row in invented_study(cases=1)]
    write_invented_study(tmp_path, rows)
    with pytest.raises(UserError, match=r"study 'invented' \(study.json\), found rows of 'lgg t1'"):
        read_study(tmp_path)
