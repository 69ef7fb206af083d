import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privdistill.cache.entries import Entry, decode, digest, distance, encode, join


def entry(value, seen=0.0):
    return Entry(torch.full((1, 2), seen), {"logits.0.0": encode(value, "full")})


def test_full_storage_keeps_every_bit():
    value = torch.tensor([[[0.1, float("inf"), -0.0, float("nan")]]])
    kept = decode(encode(value, "full"), "full")
    assert kept.view(torch.int32).tolist() == value.view(torch.int32).tolist()


@pytest.mark.parametrize("storage", ["full", "half", "8bit"])
def test_what_is_kept_is_a_copy(storage):
    value = torch.ones(1, 1, 3)
    kept = encode(value, storage)
    value.zero_()
    assert decode(kept, storage).tolist() == [[[1, 1, 1]]]


def test_half_storage_stays_finite_beyond_the_range_of_float16():
    assert decode(encode(torch.tensor([[[1e6, -1e6]]]), "half"), "half").tolist() == [
        [[65504, -65504]]
    ]


@pytest.mark.parametrize("storage", ["full", "half"])
def test_16_bit_outputs_stay_as_they_are(storage):
    value = torch.tensor([[[1e5, 1.0]]], dtype=torch.bfloat16)
    kept = decode(encode(value, storage), storage)
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept, value)


@given(st.floats(-1e4, 1e4), st.floats(0, 1e4))
def test_8_bits_err_by_half_a_step_of_each_channel(low, width):
    value = torch.linspace(low, low + width, 23).reshape(1, 1, 23)
    value = torch.cat((value, value / 100), dim=1)
    error = (decode(encode(value, "8bit"), "8bit") - value).abs().amax((0, 2))
    half = (value.amax(2) - value.amin(2))[0] / 255 / 2
    assert (error <= half * 1.01 + 4e-7 * value.abs().max() + 1e-37).all()


def test_8_bits_leave_what_is_not_finite_alone():
    value = torch.tensor([[[1.0, float("inf")]]])
    assert torch.equal(decode(encode(value, "8bit"), "8bit"), value)


def test_8_bits_keep_vectors_without_space():
    assert decode(encode(torch.tensor([[0.0, 1.0]]), "8bit"), "8bit").tolist() == [[0, 1]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_joined_batch_has_the_layout_of_its_samples(layout):
    batch = torch.rand(2, 3, 4, 5, 6).to(memory_format=layout)
    joined = join([entry(batch[:1]), entry(batch[1:])], torch.device("cpu"), "full")
    assert torch.equal(joined["logits.0.0"], batch)
    assert joined["logits.0.0"].stride() == batch.stride()


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 3, 9, 7), (2, 3, 9, 7, 5), (1, 1, 200, 2, 2)])
def test_digests_do_not_depend_on_the_memory_layout(shape):
    view = torch.rand(shape)
    other = view.movedim(1, -1).contiguous().movedim(-1, 1)
    assert digest(other).shape == (shape[0], digest(view).shape[1])
    assert distance(digest(view)[:1], digest(other)[:1]) < 1e-6


def hole(view):
    view = view.clone()
    view[:, 0, 14:18, 12:16, 15:19] = 0
    return view


CHANGES = {
    "flip of axis 0": lambda v: v.flip(2),
    "flip of axis 1": lambda v: v.flip(3),
    "flip of axis 2": lambda v: v.flip(4),
    "noise": lambda v: v + 0.02 * torch.randn_like(v),
    "contrast": lambda v: v * 1.05,
    "shift by one voxel": lambda v: v.roll(1, 4),
    "a hole of 8 voxels a side": lambda v: v.clone().index_fill_(2, torch.arange(9, 17), 0.0),
    "other modalities": lambda v: v.flip(1),
    "a hole in one modality": hole,
    "one voxel": lambda v: v.index_put(
        [torch.tensor(i) for i in (0, 0, 9, 9, 9)], torch.tensor(2.0)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_digests_tell_another_input(change):
    axis = torch.linspace(-1, 1, 32)
    ball = (1 - axis[:, None, None] ** 2 - axis[:, None] ** 2 - axis**2).clamp_min(0)
    view = torch.stack((ball * (1 + 0.3 * axis), ball**2 + 0.1 * axis[:, None, None]))[None]
    view += 0.05 * torch.randn_like(view)
    assert distance(digest(view), digest(CHANGES[change](view))) > 1e-3


@pytest.mark.parametrize("missing", [float("nan"), float("inf")])
def test_digests_see_what_surrounds_missing_values(missing):
    view = torch.rand(1, 1, 8, 8)
    view[..., 3] = missing
    other = view.clone()
    assert distance(digest(view), digest(other)) == 0
    other[..., 5] += 1
    assert distance(digest(view), digest(other)) > 1e-3
    assert distance(digest(view), digest(view.roll(1, 3))) > 1e-3


@pytest.mark.parametrize("axis", [2, 3])
def test_digests_tell_a_sparse_image_from_its_shift(axis):
    view = torch.zeros(1, 1, 32, 32)
    view[:, :, 10:20, 9] = 1
    assert distance(digest(view), digest(view.roll(1, axis))) > 1e-3


def test_digests_of_other_channels_differ():
    assert distance(digest(torch.ones(1, 2, 4)), digest(torch.ones(1, 1, 4))) == float("inf")


def test_a_checksum_tells_one_bit():
    first, second = entry(torch.zeros(1, 2, 3)), entry(torch.zeros(1, 2, 3))
    assert first.checksum() == second.checksum()
    second.parts["logits.0.0"][0][0, 1, 2] = 1e-45
    assert first.checksum() != second.checksum()


def test_an_entry_counts_its_bytes():
    assert entry(torch.zeros(1, 2, 3)).bytes == 4 * (2 + 6)
