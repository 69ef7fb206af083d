import pytest
import torch

from privdistill import ObjectiveError, ShapeMismatchError
from privdistill.losses.targets import reference

LOGITS = torch.zeros(2, 3, 4, 4)


def convert(target, activation="softmax", logits=LOGITS, validate=True):
    return reference(target, logits, activation, "ground_truth", validate=validate).channels


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.long, torch.uint8, torch.float32])
def test_label_maps_become_one_hot(shape, dtype):
    labels = torch.randint(0, 3, shape)
    found = convert(labels.to(dtype))
    assert torch.equal(found.argmax(1), labels.reshape(2, 4, 4))
    assert torch.equal(found.sum(1), torch.ones(2, 4, 4))


def test_regions_may_overlap_under_sigmoid():
    target = torch.ones(2, 3, 4, 4)
    assert convert(target, "sigmoid") is target


def test_overlapping_regions_under_softmax_are_refused():
    with pytest.raises(ObjectiveError, match=r"sum to 3 to 3.*activation='sigmoid'"):
        convert(torch.ones(2, 3, 4, 4))


def test_softmax_over_one_channel_is_refused():
    with pytest.raises(ObjectiveError, match="softmax over 1 channel is constant"):
        convert(torch.zeros(2, 4, 4), logits=LOGITS[:, :1])


@pytest.mark.parametrize("value", [3, 7, -1])
def test_unknown_labels_are_quoted(value):
    with pytest.raises(ObjectiveError, match=rf"holds \[{value}\].*classes 0 to 2"):
        convert(torch.full((2, 4, 4), value))


def test_fractional_labels_are_refused():
    with pytest.raises(ObjectiveError, match=r"holds \[0.5\]"):
        convert(torch.full((2, 4, 4), 0.5))


def test_values_beyond_one_are_quoted():
    with pytest.raises(ObjectiveError, match="values from 0 to 4"):
        convert(torch.eye(4).mul(4).expand(2, 3, 4, 4), "sigmoid")


def test_a_voxel_that_is_unknown_in_one_class_is_unknown_in_all():
    one = convert(torch.zeros(2, 4, 4, dtype=torch.long))
    one[0, 1, 2, 3] = 255
    every = one.clone()
    every[0, :, 2, 3] = 255
    some, whole = (reference(given, LOGITS, "softmax", "", 255) for given in (one, every))
    assert all(map(torch.equal, some, whole))
    assert some.mask.sum() == 31


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 2, 4, 4), (1, 4, 4), (2, 4)])
def test_other_shapes_are_refused_with_both_shapes(shape):
    with pytest.raises(ShapeMismatchError, match=r"target is .*\(2, 3, 4, 4\)"):
        convert(torch.zeros(shape))


def test_label_map_under_sigmoid_is_refused():
    with pytest.raises(
        ShapeMismatchError, match=r"with sigmoid .*\(2, 3, 4, 4\) like the logits\."
    ):
        convert(torch.zeros(2, 4, 4), "sigmoid")


def test_values_are_not_looked_at_without_validation():
    assert convert(torch.full((2, 3, 4, 4), 9.0), validate=False).max() == 9


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.int16])
def test_label_maps_of_every_integer_type(dtype):
    labels = torch.randint(0, 2, (2, 4, 4))
    assert torch.equal(convert(labels.to(dtype)).argmax(1), labels)
