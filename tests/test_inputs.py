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
        ({"modalities": (), "student": ("a",)}, r"`modalities` is \(\)"),
        ({"modalities": ("a", "a"), "student": ("a",)}, r"`modalities` is \('a', 'a'\).*once"),
        ({"modalities": ("a", "b"), "student": ("c",)}, r"`student` is \('c',\).*\('a', 'b'\)"),
        ({"modalities": ("a", "b"), "student": ()}, r"`student` is \(\)"),
        ({"modalities": ("a", "b"), "student": "a"}, "`student` is 'a'"),
        ({"modalities": ("a",), "student": ("a",), "teacher": ("z",)}, r"`teacher` is \('z',\)"),
    ],
)
def test_views_without_meaning_are_refused(arguments, message):
    with pytest.raises(ModalityError, match=message):
        PrivilegedInput(**arguments)


def test_wrong_channel_count_names_both_numbers(image):
    inputs = PrivilegedInput(BRATS, student=("t1ce",))
    with pytest.raises(ModalityError, match=r"is \(2, 3, .*expected \(B, 4, \*spatial\)"):
        inputs.for_teacher(image[:, :3])


def test_missing_modality_is_named(image):
    inputs = PrivilegedInput(BRATS, student=("t1ce",))
    with pytest.raises(ModalityError, match=r"no modality \['t1ce'\].*holds \['t1'\]"):
        inputs.for_student({"t1": image[:, :1]})


def test_modalities_of_different_shapes_are_refused(image):
    inputs = PrivilegedInput(("a", "b"), student=("a",))
    with pytest.raises(ModalityError, match="of one size"):
        inputs.for_teacher({"a": image[:, :1], "b": image[:1, :1]})


def test_input_without_spatial_axes_is_refused():
    with pytest.raises(ModalityError, match=r"is \(2, 2\); expected \(B, 2, \*spatial\)"):
        PrivilegedInput(("a", "b"), student=("a",)).for_teacher(torch.zeros(2, 2))


def test_without_names_a_mapping_cannot_be_stacked(image):
    with pytest.raises(ModalityError, match=r"is a dict; .* needs `inputs=Priv"):
        SameInput().for_student({"t1": image})


def test_without_names_both_see_the_whole(image):
    assert SameInput().for_student(image) is image
    assert SameInput().for_teacher(image) is image


def test_an_empty_teacher_view_is_refused():
    with pytest.raises(ModalityError, match=r"`teacher` is \(\)"):
        PrivilegedInput(("a",), student=("a",), teacher=())


def test_modalities_may_have_several_channels():
    inputs = PrivilegedInput({"rgb": 3, "depth": 1, "ir": 2}, student=("ir", "rgb"))
    image = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert inputs.for_student(image).flatten().tolist() == [4, 5, 0, 1, 2]
    assert torch.equal(inputs.for_student(image[:, :5]), image[:, :5])
    parts = {"rgb": image[:, :3], "ir": image[:, 4:]}
    assert inputs.for_student(parts).flatten().tolist() == [4, 5, 0, 1, 2]
    with pytest.raises(ModalityError, match=r"with the channels \{'rgb': 3"):
        inputs.for_student({"rgb": image[:, :1], "ir": image[:, 4:]})
    with pytest.raises(ModalityError, match=r"expected \(B, 6, "):
        inputs.for_teacher(image[:, :4])


@pytest.mark.parametrize("count", [0, 1.5, True, "3"])
def test_channel_counts_without_meaning_are_refused(count):
    with pytest.raises(ModalityError, match="gives the channel counts"):
        PrivilegedInput({"rgb": count}, student=("rgb",))


def test_absent_modalities_are_filled_for_both_networks():
    inputs = PrivilegedInput({"a": 1, "b": 2}, student=("b",), fill=-1.0)
    image = torch.tensor([[1.0, 2.0, 3.0], [4.0, float("nan"), 6.0]]).reshape(2, 3, 1)
    present = torch.tensor([[False, True], [True, False]])
    assert inputs.for_teacher(image, present).flatten().tolist() == [-1, 2, 3, 4, -1, -1]
    assert inputs.for_student(image, present).flatten().tolist() == [2, 3, -1, -1]


def test_a_presence_mask_of_another_form_is_refused():
    inputs = PrivilegedInput(("a", "b"), student=("a",))
    for wrong in (torch.ones(2, 2), torch.ones(1, 2, dtype=torch.bool)):
        with pytest.raises(ModalityError, match=r"expected torch.bool \(2, 2\)"):
            inputs.for_student(torch.zeros(2, 2, 4), wrong)


def test_dropout_hides_every_set_of_modalities_equally_often():
    inputs = PrivilegedInput(("a", "b"), student=("a", "b"), dropout=0.5)
    seen = inputs.for_training(torch.ones(3000, 2, 1)).squeeze(-1)
    shares = [
        (seen == torch.tensor(kept)).all(1).float().mean() for kept in ([1, 0], [0, 1], [1, 1])
    ]
    assert all(abs(share - 1 / 3) < 0.04 for share in shares)
    assert sum(shares) == pytest.approx(1)


def test_dropout_keeps_one_of_the_modalities_that_are_there():
    inputs = PrivilegedInput(("a", "b", "c"), student=("a", "b", "c"), dropout=0.9)
    present = torch.tensor([[True, False, True]]).expand(500, -1)
    seen = inputs.for_training(torch.ones(500, 3, 1), present).squeeze(-1)
    assert (seen[:, 1] == 0).all()
    assert (seen.sum(1) >= 1).all()
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert not inputs.for_training(torch.ones(2, 3, 1), nothing).any()


def test_dropout_reaches_neither_the_teacher_nor_a_prediction():
    inputs = PrivilegedInput(("a", "b"), student=("a", "b"), dropout=0.9)
    image = torch.ones(50, 2, 1)
    assert torch.equal(inputs.for_teacher(image), image)
    assert torch.equal(inputs.for_student(image), image)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_outside_the_unit_interval_is_refused(dropout):
    with pytest.raises(ModalityError, match="`dropout` must be in"):
        PrivilegedInput(("a",), student=("a",), dropout=dropout)


def test_dropout_acts_on_any_number_of_modalities():
    names = tuple(f"band{number}" for number in range(40))
    inputs = PrivilegedInput(names, student=names, dropout=0.5)
    kept = inputs.for_training(torch.ones(500, 40, 1))[..., 0]
    assert kept.any(1).all()
    assert kept.mean().item() == pytest.approx(0.5, abs=0.03)


def test_dropout_draws_each_set_with_its_own_probability():
    names = ("a", "b", "c")
    inputs = PrivilegedInput(names, student=names, dropout=0.7)
    sets = inputs.for_training(torch.ones(20_000, 3, 1))[..., 0] @ torch.tensor([1.0, 2.0, 4.0])
    for number in range(1, 8):
        hidden = 3 - number.bit_count()
        expected = 0.7**hidden * 0.3 ** (3 - hidden) / (1 - 0.7**3)
        assert (sets == number).float().mean().item() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("names", [3, (1, 2), [None]])
def test_what_is_no_name_is_refused(names):
    with pytest.raises(ModalityError, match="tuple of names"):
        PrivilegedInput(names, student=("a",))


@pytest.mark.parametrize("names", [("rgb",), ("rgb", "depth"), ("depth", "rgb"), ("t", "depth")])
def test_a_view_is_a_copy_in_the_order_asked_for(names):
    channels = {"t": 1, "rgb": 3, "depth": 1}
    image = torch.arange(2 * 5 * 4.0).reshape(2, 5, 2, 2)
    parts = dict(zip(channels, image.clone().split([1, 3, 1], dim=1), strict=True))
    view = PrivilegedInput(channels, student=names).for_student(image)
    assert view.is_contiguous()
    image.zero_()
    assert torch.equal(view, torch.cat([parts[name] for name in names], dim=1))


def test_a_view_of_neighbours_keeps_the_memory_format():
    image = torch.rand(2, 4, 3, 5).to(memory_format=torch.channels_last)
    view = PrivilegedInput(("a", "b", "c", "d"), student=("b", "c")).for_student(image)
    assert view.is_contiguous(memory_format=torch.channels_last)
