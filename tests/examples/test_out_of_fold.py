import pytest

from kdnet.config import Config, ObjectiveConfig
from kdnet.errors import UserError
from kdnet.recipes.out_of_fold import part_teachers, with_part_teachers
from kdnet.recipes.rows import Row

TEACHER = Row("teacher", role="teacher", label="teacher")
BASELINE = Row("baseline")
STUDENT = Row("student", recipe="distilled", teacher="teacher")
CONFIG = Config(objective=ObjectiveConfig(out_of_fold=2, latent_weight=0.0))


def test_one_part_changes_nothing():
    rows = (TEACHER, BASELINE, STUDENT)
    assert with_part_teachers(rows, Config()) == rows


def test_a_student_has_a_teacher_without_each_part():
    rows = with_part_teachers((TEACHER, BASELINE, STUDENT), CONFIG)
    names = ("teacher-without-0-of-2", "teacher-without-1-of-2")
    assert [row.name for row in rows] == ["teacher", "baseline", *names, "student"]
    assert rows[-1].teachers == names


def test_students_share_the_teachers_of_their_teacher():
    more = Row("other", recipe="distilled", teacher="teacher")
    rows = with_part_teachers((TEACHER, STUDENT, more), CONFIG)
    assert len(rows) == 5


def test_an_option_of_the_row_wins():
    own = Row(
        "student",
        recipe="distilled",
        teacher="teacher",
        options={"out_of_fold": 3, "latent_weight": 0.0},
    )
    assert len(with_part_teachers((TEACHER, own), Config())[-1].teachers) == 3


def test_part_teachers_keep_the_options_of_their_teacher():
    teacher = Row("teacher", role="teacher", options={"labelled": 20})
    options = [row.options for row in part_teachers(teacher, 2)]
    assert options == [{"labelled": 20, "leave_out": [part, 2]} for part in range(2)]


def test_terms_that_compare_features_are_refused_with_several_teachers():
    own = Row("student", recipe="distilled", teacher="teacher", options={"out_of_fold": 2})
    with pytest.raises(UserError, match="Set --latent_weight 0"):
        with_part_teachers((TEACHER, own), Config())
