from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdnet.data.description import load_description
from kdnet.errors import UserError
from kdnet.models import build_network
from kdnet.training.checkpoint import (
    ModelMetadata,
    check_compatible,
    load_model,
    load_state,
    read_metadata,
    save_model,
    save_state,
)

METADATA = ModelMetadata(
    role="student",
    backbone="kdnet",
    backbone_arguments={"channels": [2, 4, 8]},
    in_channels=1,
    out_channels=4,
    modalities=("t1ce",),
    activation="softmax",
    description=load_description("brats2021"),
    crop=(32, 32, 32),
    grid=(16, 16, 16),
    epoch=3,
)


def build():
    return build_network("kdnet", {"channels": [2, 4, 8]}, in_channels=1, out_channels=4)


def test_a_model_file_alone_rebuilds_the_network(tmp_path):
    network, image = build().eval(), torch.randn(1, 1, 16, 16, 16)
    save_model(tmp_path / "model.safetensors", network, METADATA)
    again, metadata = load_model(tmp_path / "model.safetensors")
    assert metadata == METADATA
    assert read_metadata(tmp_path / "model.safetensors") == METADATA
    assert not again.training
    assert torch.equal(again(image), network(image))


def test_metadata_give_the_preprocessing_of_the_network():
    preprocessing = METADATA.preprocessing()
    assert preprocessing.grid == (16, 16, 16)
    assert preprocessing.crop == (32, 32, 32)


def test_weights_in_channels_last_are_saved_like_any_other(tmp_path):
    network = build()
    save_model(tmp_path / "a", network, METADATA)
    save_model(tmp_path / "b", network.to(memory_format=torch.channels_last_3d), METADATA)
    contiguous, converted = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert contiguous.keys() == converted.keys()
    assert all(torch.equal(contiguous[name], converted[name]) for name in contiguous)


def test_missing_damaged_and_foreign_files_are_told_apart(tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="no such model file"):
        load_model(file)
    save_model(file, build(), METADATA)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="not a model of this application, or it is damaged"):
        load_model(file)
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="expected metadata of format"):
        load_model(file)


def test_weights_of_another_network_show_both_descriptions(tmp_path):
    file = tmp_path / "model.safetensors"
    other = replace(METADATA, backbone_arguments={"channels": [2, 4, 6]})
    save_model(file, build(), other)
    with pytest.raises(UserError, match=r"(?s)Expected .*channels=\[2, 4, 6\].*Found .* tensors"):
        load_model(file)


def test_damaged_metadata_are_told(tmp_path):
    file = tmp_path / "model.safetensors"
    strings = METADATA.to_strings()
    del strings["grid"]
    save_file({"weight": torch.zeros(2)}, file, metadata=strings)
    with pytest.raises(UserError, match=r"metadata are damaged .*grid"):
        load_model(file)


def test_files_from_before_patches_and_slices_are_of_whole_volumes(tmp_path):
    strings = METADATA.to_strings()
    del strings["patch"], strings["slices"], strings["any_subset"]
    weights = {name: value.contiguous() for name, value in build().state_dict().items()}
    save_file(weights, tmp_path / "old.safetensors", metadata=strings)
    metadata = load_model(tmp_path / "old.safetensors")[1]
    assert metadata == METADATA
    assert metadata.input_size == (16, 16, 16)


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({}, (16, 16, 16), "grid 16x16x16"),
        ({"grid": None, "patch": (8, 9, 7)}, (8, 9, 7), "patches of 8x9x7"),
        ({"grid": (8, 9, 7), "slices": "coronal"}, (8, 7), "coronal slices of grid 8x9x7"),
    ],
)
def test_a_model_file_says_what_the_network_sees(tmp_path, changes, size, words):
    metadata = replace(METADATA, **changes)
    save_model(tmp_path / "model", build(), metadata)
    found = read_metadata(tmp_path / "model")
    assert found == metadata
    assert found.input_size == size
    assert words in found.summary()
    assert found.preprocessing().grid == metadata.grid


def test_a_network_without_patch_and_grid_is_refused():
    with pytest.raises(ValueError, match="neither a patch nor a grid"):
        _ = replace(METADATA, grid=None).input_size


def test_a_teacher_of_slices_is_no_teacher_of_volumes(tmp_path):
    with pytest.raises(UserError, match="differs in slices"):
        check_compatible(tmp_path, replace(METADATA, slices="axial"), METADATA)


def test_a_teacher_of_another_view_is_refused(tmp_path):
    check_compatible(tmp_path, METADATA, replace(METADATA, role="teacher", epoch=9))
    with pytest.raises(UserError, match=r"(?s)differs in modalities, grid.*Expected.*Found"):
        check_compatible(
            tmp_path, METADATA, replace(METADATA, modalities=("t1", "t2"), grid=(8, 8, 8))
        )


def test_a_state_that_is_missing_is_none_and_a_damaged_one_an_error(tmp_path):
    file = tmp_path / "state.pt"
    assert load_state(file) is None
    file.write_bytes(b"half a state")
    with pytest.raises(UserError, match=r"Remove .* to train this network again"):
        load_state(file)


def test_a_state_never_runs_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"weights": Harmful()}, tmp_path / "state.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_state(tmp_path / "state.pt")


def flip(path, needle):
    """Change one bit of a file, in the middle of some bytes."""
    content = bytearray(path.read_bytes())
    content[content.rindex(needle) + len(needle) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_the_weights_is_found_and_named(tmp_path):
    file, network = tmp_path / "model.safetensors", build()
    save_model(file, network, METADATA)
    # Normalisations begin with the same numbers everywhere, kernels do not.
    kernels = [item for item in network.state_dict().items() if item[1].ndim == 5]
    name, tensor = kernels[1]
    flip(file, tensor.contiguous().numpy().tobytes())
    with pytest.raises(UserError, match=f"is damaged: the numbers of {name} are not those"):
        load_model(file)


def test_a_flipped_bit_in_the_metadata_is_found(tmp_path):
    file = tmp_path / "model.safetensors"
    save_model(file, build(), METADATA)
    flip(file, b"t1ce")
    with pytest.raises(UserError, match="its metadata are not those that were written"):
        read_metadata(file)


#: What the state of a training holds, and nothing in it.
STATE = {
    "finished": False,
    "epoch": 3,
    "step": 9,
    "best": 0.5,
    "weights": {},
    "optimizer": {},
    "scheduler": {},
    "precision": {},
    "random": {"cpu": torch.zeros(1), "cuda": []},
}


def test_a_flipped_bit_in_a_state_is_found_and_named(tmp_path):
    file, moments = tmp_path / "state.pt", torch.full((9,), 0.75)
    save_state(file, STATE | {"optimizer": {"moments": moments}})
    assert load_state(file)["epoch"] == 3
    flip(file, moments.numpy().tobytes())
    with pytest.raises(UserError, match=r"is damaged: optimizer of it are not what was written"):
        load_state(file)


def test_a_digest_that_lost_its_name_is_missed(tmp_path):
    file = tmp_path / "model.safetensors"
    save_model(file, build(), METADATA)
    flip(file, b'"sha256"')
    with pytest.raises(UserError):
        read_metadata(file)


def test_any_flipped_byte_of_a_model_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_model(file, build(), METADATA)
    content = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(0, len(content), (60,), generator=generator).tolist():
        file.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
        with pytest.raises(UserError):
            load_model(file)


def test_states_and_weights_without_digests_still_load(tmp_path):
    torch.save(STATE, tmp_path / "state.pt")
    assert load_state(tmp_path / "state.pt").keys() == STATE.keys()
    save_file(build().state_dict(), tmp_path / "model", metadata=METADATA.to_strings())
    assert load_model(tmp_path / "model")[1] == METADATA


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"modalities": ("t1", "t2"), "in_channels": 2}, "modalities"),
        ({"out_channels": 3}, "out_channels"),
        ({"description": load_description("lgg")}, "classes"),
    ],
)
def test_another_view_or_class_count_is_refused_with_both_descriptions(tmp_path, changes, word):
    with pytest.raises(UserError, match=rf"(?s)differs in .*{word}.*Expected .*Found "):
        check_compatible(tmp_path / "model", replace(METADATA, **changes), METADATA)
