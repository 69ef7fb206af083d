import pytest
import torch
from torch import nn

from kdnet.models.blocks import (
    InstanceNorm,
    check_image,
    check_widths,
    draw_subset,
    every_subset,
    find_present,
)


@pytest.mark.parametrize("axes", [2, 3])
def test_instance_norm_is_that_of_pytorch(axes):
    own = InstanceNorm(3)
    reference = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[axes](3, affine=True)
    reference.load_state_dict(own.state_dict())
    features = torch.randn(2, 3, *[4] * axes)
    assert torch.equal(own(features), reference(features))


def test_a_single_voxel_is_scaled_and_shifted_but_not_erased():
    norm = InstanceNorm(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0]))
    voxel = torch.tensor([5.0, 7.0]).reshape(1, 2, 1, 1, 1)
    assert norm(voxel).flatten().tolist() == [10.0, 22.0]


@pytest.mark.parametrize(
    ("channels", "axes", "message"),
    [
        ((8, 16), 4, "spatial_dims is 2 or 3, not 4"),
        ((8,), 3, r"two even widths or more.*\(8,\)"),
        ((8, 5), 3, r"two even widths or more.*\(8, 5\)"),
    ],
)
def test_widths_that_cannot_be_halved_are_refused(channels, axes, message):
    with pytest.raises(ValueError, match=message):
        check_widths("HeMIS", channels, axes, even=True)


def test_images_with_other_modalities_or_too_few_voxels_are_refused():
    check_image("HeMIS", torch.zeros(1, 4, 8, 8, 8), 4, 4)
    with pytest.raises(ValueError, match=r"HeMIS: .*\(1, 3, 8, 8, 8\).*\(B, 4, \*spatial\)"):
        check_image("HeMIS", torch.zeros(1, 3, 8, 8, 8), 4, 4)
    with pytest.raises(ValueError, match="8 voxels or more along each axis"):
        check_image("HeMIS", torch.zeros(1, 4, 8, 8, 7), 4, 4)


def test_a_modality_of_zeros_is_absent():
    image = torch.zeros(2, 3, 4, 4)
    image[0, 1, 2, 3] = -1.0
    image[1] = 1.0
    assert find_present(image).tolist() == [[False, True, False], [True, True, True]]


def test_every_subset_of_three_is_equally_likely_and_none_is_empty():
    drawn = draw_subset(torch.ones(7000, 3, dtype=torch.bool))
    counts = (drawn.long() * torch.tensor([1, 2, 4])).sum(1).bincount(minlength=8)
    assert counts[0] == 0
    # 1000 are expected of each, with a standard deviation of 29.
    assert ((counts[1:] - 1000).abs() < 120).all()


def test_a_subset_keeps_to_what_a_sample_has():
    assert len({*every_subset(4)}) == 15
    few = torch.tensor([[False, True], [False, False]])
    assert draw_subset(few).tolist() == few.tolist()
    present = torch.tensor([[False, True, False, True]]).expand(300, 4)
    drawn = draw_subset(present)
    assert not (drawn & ~present).any()
    assert drawn[:, [1, 3]].unique(dim=0).tolist() == [[False, True], [True, False], [True, True]]
