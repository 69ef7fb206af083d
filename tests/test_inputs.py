import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privdistill import ModalityError, PrivilegedInput
from privdistill.inputs import SameInput

BRATS = ("flair", "t1", "t1ce", "t2")


@pytest.fixture
def image():
    return torch.arange(4.0).reshape(1, 4, 1, 1, 1).expand(2, 4, 2, 2, 2)


def test_student_gets_its_modality(image):
    view = PrivilegedInput(BRATS, student=("t1ce",)).for_student(image)
    assert view.shape == (2, 1, 2, 2, 2)
    assert view.unique().tolist() == [2.0]


def test_views_follow_the_order_of_their_names(image):
    inputs = PrivilegedInput(BRATS, student=("t2", "flair"), teacher=("t1ce", "t1"))
    assert inputs.for_student(image)[0, :, 0, 0, 0].tolist() == [3.0, 0.0]
    assert inputs.for_teacher(image)[0, :, 0, 0, 0].tolist() == [2.0, 1.0]


def test_teacher_sees_everything_by_default(image):
    assert PrivilegedInput(BRATS, student=("t1",)).for_teacher(image) is image


def test_the_students_view_alone_is_taken_as_it_is(image):
    alone = image[:, 2:3]
    assert PrivilegedInput(BRATS, student=("t1ce",)).for_student(alone) is alone


def test_a_reordered_full_view_is_not_taken_for_the_view_alone(image):
    view = PrivilegedInput(BRATS, student=tuple(reversed(BRATS))).for_student(image)
    assert view[0, :, 0, 0, 0].tolist() == [3.0, 2.0, 1.0, 0.0]


def test_mapping_by_name(image):
    parts = {name: image[:, i : i + 1] for i, name in enumerate(BRATS)}
    inputs = PrivilegedInput(BRATS, student=("t1ce",))
    assert torch.equal(inputs.for_teacher(parts), image)
    assert torch.equal(inputs.for_student({"t1ce": parts["t1ce"]}), parts["t1ce"])


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True), st.data())
def test_any_subset_in_any_order_is_given_back_by_name(names, data):
    student = data.draw(st.permutations(names).map(lambda p: tuple(p[: max(1, len(p) // 2)])))
    image = torch.arange(float(len(names))).reshape(1, -1, 1)
    view = PrivilegedInput(names, student=student).for_student(image)
    if len(student) < len(names) or student != tuple(names):
        assert [names[int(v)] for v in view.flatten()] == list(student)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modalities": (), "student": ("a",)}, "`modalities` is empty"),
        ({"modalities": ("a", "a"), "student": ("a",)}, "repeats a name"),
        ({"modalities": ("a", "b"), "student": ("c",)}, r"names \['c'\]"),
        ({"modalities": ("a", "b"), "student": ()}, "`student` is empty"),
        ({"modalities": ("a", "b"), "student": "a"}, r"pass a tuple, \('a',\)"),
        ({"modalities": ("a",), "student": ("a",), "teacher": ("z",)}, r"`teacher` names \['z'\]"),
    ],
)
def test_views_without_meaning_are_refused(arguments, message):
    with pytest.raises(ModalityError, match=message):
        PrivilegedInput(**arguments)


def test_wrong_channel_count_names_both_numbers(image):
    inputs = PrivilegedInput(BRATS, student=("t1ce",))
    with pytest.raises(ModalityError, match=r"has 3 channels, but `modalities` names 4"):
        inputs.for_teacher(image[:, :3])


def test_missing_modality_is_named(image):
    inputs = PrivilegedInput(BRATS, student=("t1ce",))
    with pytest.raises(ModalityError, match=r"no modality \['t1ce'\].*holds \['t1'\]"):
        inputs.for_student({"t1": image[:, :1]})


def test_modalities_of_different_shapes_are_refused(image):
    inputs = PrivilegedInput(("a", "b"), student=("a",))
    with pytest.raises(ModalityError, match="all must be equal"):
        inputs.for_teacher({"a": image[:, :1], "b": image[:1, :1]})


def test_input_without_spatial_axes_is_refused():
    with pytest.raises(ModalityError, match="at least one spatial axis"):
        PrivilegedInput(("a", "b"), student=("a",)).for_teacher(torch.zeros(2, 2))


def test_without_names_a_mapping_cannot_be_stacked(image):
    with pytest.raises(ModalityError, match="no modality names were given"):
        SameInput().for_student({"t1": image})


def test_without_names_both_see_the_whole(image):
    assert SameInput().for_student(image) is image
    assert SameInput().for_teacher(image) is image


def test_an_empty_teacher_view_is_refused():
    with pytest.raises(ModalityError, match="`teacher` is empty"):
        PrivilegedInput(("a",), student=("a",), teacher=())
