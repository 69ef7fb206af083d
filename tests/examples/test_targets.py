"""Targets and predictions, worked out by hand on a row of four voxels, one per class."""

from dataclasses import replace

import pytest
import torch

from kdnet.data.description import load_description
from kdnet.data.targets import number_of_outputs, predict_classes, to_target
from kdnet.errors import UserError

BRATS = load_description("brats2021")
LABEL = torch.tensor([0, 1, 2, 3]).reshape(1, 1, 4, 1, 1)


def test_softmax_targets_are_one_hot():
    target = to_target(LABEL, BRATS, "softmax")
    assert target.shape == (1, 4, 4, 1, 1)
    assert torch.equal(target[0, :, :, 0, 0], torch.eye(4))


def test_sigmoid_targets_are_regions_in_the_order_of_the_description():
    target = to_target(LABEL, BRATS, "sigmoid")
    expected = [[0, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 1]]
    assert target[0, :, :, 0, 0].tolist() == expected
    assert target.dtype == torch.float32


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_perfect_prediction_gives_the_label_back(activation):
    logits = to_target(LABEL, BRATS, activation) * 20 - 10
    assert torch.equal(predict_classes(logits, BRATS, activation), LABEL[:, 0])


def test_a_small_region_is_painted_over_a_large_one():
    logits = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1, 1)
    assert predict_classes(logits, BRATS, "sigmoid").item() == 3


def test_number_of_outputs():
    assert number_of_outputs(BRATS, "softmax") == 4
    assert number_of_outputs(BRATS, "sigmoid") == 3
    assert number_of_outputs(load_description("lgg"), "sigmoid") == 1


def test_regions_that_cannot_be_told_apart_need_softmax():
    overlapping = replace(BRATS, regions={"TC": (1, 3)})
    with pytest.raises(UserError, match="region 'TC' must hold exactly one class"):
        number_of_outputs(overlapping, "sigmoid")
    assert number_of_outputs(overlapping, "softmax") == 4
