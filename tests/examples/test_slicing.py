"""Slices of volumes: cut, stacked again, chosen, named and flipped."""

import pytest
import torch

from kdnet.data.loading import build_loader
from kdnet.data.samples import SliceDataset, cut, plane_of, stack
from kdnet.errors import UserError

PLANES = {"sagittal": (3, 4), "coronal": (2, 4), "axial": (2, 3)}


def subject(brain="011111110", tumour="000110000", name="A"):
    """A volume of one slice per character, along the third axis."""
    image = torch.tensor([float(c) for c in brain]).expand(2, 3, 4, -1).clone()
    label = torch.tensor([int(c) for c in tumour], dtype=torch.uint8).expand(1, 3, 4, -1).clone()
    return {"image": image, "label": label, "name": name}


@pytest.mark.parametrize("plane", PLANES)
def test_slices_are_put_together_as_they_were(plane):
    volume = torch.rand(1, 2, 3, 4)
    parts = list(cut(volume, plane))
    assert parts[0].shape[1:] == PLANES[plane] == plane_of((2, 3, 4), plane)
    assert torch.equal(stack(parts, plane), volume)


def test_axial_slices_are_those_of_the_third_axis():
    volume = torch.rand(1, 2, 3, 4)
    assert torch.equal(list(cut(volume, "axial"))[1], volume[..., 1])


def positions(sample, share):
    return [place for _, place in SliceDataset([sample], "axial", empty_slices=share).addresses]


@pytest.mark.parametrize(
    ("share", "kept"),
    [(0.0, [3, 4]), (0.4, [3, 4, 5, 7]), (0.5, [2, 3, 4, 6]), (1.0, [*range(1, 8)])],
)
def test_a_share_of_the_slices_without_tumour_is_kept(share, kept):
    # Slices 1, 2, 5, 6 and 7 hold brain and no tumour.
    assert positions(subject(), share) == kept


def test_without_labels_every_slice_with_brain_counts():
    sample = subject()
    del sample["label"]
    assert positions(sample, 0.0) == [1, 2, 3, 4, 5, 6, 7]
    assert "label" not in SliceDataset([sample], "axial")[0]


def test_a_sample_is_one_slice_named_by_case_and_position():
    slices = SliceDataset([subject(), subject(name="B")], "axial", empty_slices=0.0)
    assert [slices[n]["name"] for n in range(4)] == ["A/axial3", "A/axial4", "B/axial3", "B/axial4"]
    assert slices[0]["image"].shape == (2, 3, 4)
    assert torch.equal(slices[3]["label"], subject()["label"][..., 4])


def test_slices_are_flipped_along_their_own_axes_alone():
    slices = SliceDataset([subject()] * 40, "axial")
    loader = build_loader(slices, 280, shuffle=True, seed=0, flips=True, workers=0)
    codes = [key.rpartition("/flip")[2] for key in next(iter(loader))["key"]]
    assert set(codes) == {"0", "1", "2", "3"}


def test_a_data_set_without_any_useful_slice_is_refused():
    with pytest.raises(UserError, match=r"none of the 1 subjects has a slice with tumour.*empty_"):
        SliceDataset([subject(tumour="000000000")], "axial", empty_slices=0.0)
