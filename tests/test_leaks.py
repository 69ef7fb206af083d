import pytest
import torch
from torch import nn

from privdistill import ModalityError, PrivilegedInput, assert_no_leak

INPUTS = PrivilegedInput(("flair", "t1ce", "t2"), student=("t1ce",))
EXAMPLE = torch.zeros(2, 3, 4, 4)


class Normalised:
    """A view that looks harmless: one channel, divided by a statistic of all of them."""

    def __init__(self, detached):
        self.detached = detached

    def for_teacher(self, image):
        return image

    def for_student(self, image):
        scale = image.detach().std() if self.detached else image.std()
        return image[:, 1:2] / scale


def student():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())


def test_a_view_by_name_leaks_nothing():
    net = student()
    assert_no_leak(net, INPUTS, EXAMPLE)
    assert net.training
    assert net[1].num_batches_tracked == 0
    assert all(p.grad is None for p in net.parameters())


def test_a_mapping_is_checked_by_name():
    assert_no_leak(student(), INPUTS, dict.fromkeys(INPUTS.modalities, EXAMPLE[:, :1]))


@pytest.mark.parametrize("detached", [False, True])
def test_a_statistic_over_all_channels_is_found(detached):
    with pytest.raises(ModalityError, match=r"depends on \[0, 2\]"):
        assert_no_leak(student(), Normalised(detached), EXAMPLE, seen=[1])


def test_modalities_of_several_channels_are_named():
    class Cheating(PrivilegedInput):
        def for_student(self, image, present=None):
            return image[:, 1:4]

    inputs = Cheating({"rgb": 3, "depth": 1}, student=("rgb",))
    with pytest.raises(ModalityError, match=r"depends on \['depth'\]"):
        assert_no_leak(nn.Conv2d(3, 2, 1), inputs, torch.zeros(1, 4, 4, 4))


def test_what_the_student_may_see_must_be_known():
    with pytest.raises(ModalityError, match="seen="):
        assert_no_leak(student(), Normalised(detached=True), EXAMPLE)
    with pytest.raises(ModalityError, match="Pass a full input"):
        assert_no_leak(student(), INPUTS, EXAMPLE[:, 1:2])


def test_networks_with_several_outputs_are_checked_in_all_of_them():
    class Several(nn.Module):
        def forward(self, x):
            return {"mean": x.mean(), "labels": x.argmax(1), "maps": [x]}

    assert_no_leak(Several(), INPUTS, EXAMPLE)
    with pytest.raises(ModalityError, match="depends on"):
        assert_no_leak(Several(), Normalised(detached=False), EXAMPLE, seen=[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_any_precision_is_checked(dtype):
    for example in (EXAMPLE, EXAMPLE.to(dtype), EXAMPLE.byte()):
        assert_no_leak(student().to(dtype), INPUTS, example)
