"""Patches and slices: where they lie, what they are called, and that seed and epoch decide."""

import pytest
import torch

from kdnet.data.loading import build_loader, start_epoch
from kdnet.data.samples import FixedPatches, FreePatches, SliceDataset
from kdnet.errors import UserError

PATCH = (4, 6, 5)


def subject(name="A", size=(10, 12, 9), tumour=((7, 3, 4, 1),)):
    """Image voxels hold their own position; tumour is (x, y, z, class)."""
    label = torch.zeros(1, *size, dtype=torch.uint8)
    for *place, value in tumour:
        label[(0, *place)] = value
    image = torch.arange(1, label.numel() + 1).reshape(1, *size).float()
    return {"image": image, "label": label, "name": name}


SUBJECTS = [subject("A"), subject("B", (6, 7, 8), ((0, 6, 7, 1), (5, 0, 0, 2)))]


def epoch_of(loader, epoch):
    start_epoch(loader, epoch)
    return list(loader)


def free_loader(seed=0, **settings):
    chosen = {"shuffle": True, "flips": True, "workers": 0, "moves": True} | settings
    return build_loader(FreePatches(SUBJECTS * 4, PATCH), 3, seed=seed, **chosen)


def starts(sample, count=400):
    """Where the patches begin that on average a third of is drawn on tumour."""
    voxels = [FreePatches([sample], PATCH)[0, n]["image"][0, 0, 0, 0] for n in range(count)]
    first = torch.tensor(voxels).long() - 1
    return {
        tuple(place)
        for place in torch.stack(torch.unravel_index(first, sample["label"].shape[1:]), 1).tolist()
    }


def test_patches_lie_anywhere_in_the_volume_and_never_beyond():
    for sample, last in ((subject(tumour=()), (6, 6, 4)), (SUBJECTS[1], (2, 1, 3))):
        for axis, end in enumerate(last):
            assert {start[axis] for start in starts(sample)} == set(range(end + 1))


def test_a_small_class_is_met_as_often_as_a_large_one():
    many = [(x, y, 0, 1) for x in range(10) for y in range(12)]
    sample = subject(size=(10, 12, 60), tumour=(*many, (9, 11, 58, 3)))
    patches = FixedPatches([sample], PATCH, 600, seed=0)
    found = [int(patches[n]["label"].max()) for n in range(0, 600, 3)]
    assert 70 < found.count(3) < 130


def test_a_smaller_volume_is_padded_on_both_sides():
    sample = {"image": torch.ones(1, 2, 3, 4), "label": torch.ones(1, 2, 3, 4), "name": "A"}
    padded = FreePatches([sample], (4, 6, 4))[0, 0]["image"]
    assert padded.shape == (1, 4, 6, 4)
    assert padded.sum() == 2 * 3 * 4
    assert padded[0, 1:3, 1:4].all()


def test_image_and_label_are_cut_alike():
    patches = FreePatches(SUBJECTS, PATCH)
    for number in range(20):
        patch = patches[0, number]
        on_tumour = patch["image"][patch["label"] > 0]
        assert on_tumour.tolist() in ([], [float(7 * 12 * 9 + 3 * 9 + 4 + 1)])


def test_a_third_of_the_free_patches_lies_on_tumour():
    patches = FreePatches([subject(size=(40, 40, 40), tumour=((20, 20, 20, 1),))], (4, 4, 4))
    hits = sum(bool(patches[0, number]["label"].any()) for number in range(300))
    # A patch at random holds this voxel once in about 800 times.
    assert 80 < hits < 120


def test_every_third_of_the_fixed_patches_lies_on_tumour():
    patches = FixedPatches(SUBJECTS, PATCH, 6, seed=0)
    assert len(patches) == 12
    assert patches[0]["label"][0, 2, 3, 2] == 1
    assert patches[3]["label"][0, 2, 3, 2] == 1


def test_fixed_patches_are_named_by_case_number_and_place():
    patches = FixedPatches(SUBJECTS, PATCH, 2, seed=0)
    assert patches[0]["name"] == "A/patch0@5,0,2+4x6x5"
    assert patches[3]["name"].startswith("B/patch1@")
    again = FixedPatches(SUBJECTS, PATCH, 2, seed=0)
    assert all(torch.equal(patches[n]["image"], again[n]["image"]) for n in range(4))
    other = FixedPatches(SUBJECTS, PATCH, 2, seed=1)
    assert other[1]["name"] != patches[1]["name"]


def test_fixed_patches_have_keys_and_free_ones_have_none():
    fixed = FixedPatches(SUBJECTS, PATCH, 2, seed=0)
    loader = build_loader(fixed, 4, shuffle=False, seed=0, flips=False, workers=0)
    assert next(iter(loader))["key"][0] == "A/patch0@5,0,2+4x6x5/flip0"
    assert "key" not in next(iter(free_loader()))


def test_free_patches_depend_on_seed_and_epoch_alone():
    first, again = free_loader(), free_loader()
    whole = [epoch_of(first, epoch) for epoch in range(3)]
    assert whole[0][0]["image"].shape == (3, 1, *PATCH)
    resumed = epoch_of(again, 2)
    for batch, other in zip(whole[2], resumed, strict=True):
        assert batch["name"] == other["name"]
        assert torch.equal(batch["image"], other["image"])
        assert torch.equal(batch["label"], other["label"])
    assert not torch.equal(whole[0][0]["image"], whole[1][0]["image"])
    assert not torch.equal(epoch_of(free_loader(seed=1), 2)[0]["image"], resumed[0]["image"])


def test_a_patch_keeps_no_volume_alive():
    patch = FreePatches(SUBJECTS, PATCH)[0, 1]["image"]
    assert patch.untyped_storage().nbytes() == patch.numel() * 4


def sliced(brain="011111110", tumour="000110000", name="A"):
    """A volume of one slice per character, along the third axis."""
    image = torch.tensor([float(c) for c in brain]).expand(2, 3, 4, -1).clone()
    label = torch.tensor([int(c) for c in tumour], dtype=torch.uint8).expand(1, 3, 4, -1).clone()
    return {"image": image, "label": label, "name": name}


def positions(sample, share):
    return [place for _, place in SliceDataset([sample], "axial", empty_slices=share).addresses]


@pytest.mark.parametrize(
    ("share", "kept"),
    [(0.0, [3, 4]), (0.4, [3, 4, 5, 7]), (0.5, [2, 3, 4, 6]), (1.0, [*range(1, 8)])],
)
def test_a_share_of_the_slices_without_tumour_is_kept(share, kept):
    # Slices 1, 2, 5, 6 and 7 hold brain and no tumour.
    assert positions(sliced(), share) == kept


def test_without_labels_every_slice_with_brain_counts():
    sample = sliced()
    del sample["label"]
    assert positions(sample, 0.0) == [1, 2, 3, 4, 5, 6, 7]
    assert "label" not in SliceDataset([sample], "axial")[0]


def test_a_sample_is_one_slice_named_by_case_and_position():
    slices = SliceDataset([sliced(), sliced(name="B")], "axial", empty_slices=0.0)
    assert [slices[n]["name"] for n in range(4)] == ["A/axial3", "A/axial4", "B/axial3", "B/axial4"]
    assert slices[0]["image"].shape == (2, 3, 4)
    assert torch.equal(slices[3]["label"], sliced()["label"][..., 4])


def test_slices_are_flipped_along_their_own_axes_alone():
    slices = SliceDataset([sliced()] * 40, "axial")
    loader = build_loader(slices, 280, shuffle=True, seed=0, flips=True, workers=0)
    codes = [key.rpartition("/flip")[2] for key in next(iter(loader))["key"]]
    assert set(codes) == {"0", "1", "2", "3"}


def test_a_data_set_without_any_useful_slice_is_refused():
    with pytest.raises(UserError, match=r"none of the 1 subjects has a slice with tumour.*empty-"):
        SliceDataset([sliced(tumour="000000000")], "axial", empty_slices=0.0)
