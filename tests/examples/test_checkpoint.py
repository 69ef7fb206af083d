from dataclasses import replace

import pytest
import torch
from quick import STUDENT
from safetensors.torch import load_file, save_file

from faulty_training import Samples, case, equal, send, train
from kdnet.data.description import load_description
from kdnet.errors import UserError
from kdnet.runs import networks
from kdnet.stopping import StoppedError
from kdnet.training.checkpoint import (
    check_compatible,
    load_model,
    load_state,
    read_metadata,
    save_model,
    save_state,
)

METADATA = replace(STUDENT, backbone_arguments={"channels": [2, 4, 8]}, crop=(32, 32, 32), epoch=3)


def build():
    return networks.build(METADATA)


@pytest.fixture
def file(tmp_path):
    save_model(tmp_path / "model.safetensors", build(), METADATA)
    return tmp_path / "model.safetensors"


def test_weights_in_channels_last_are_saved_like_any_other(tmp_path):
    network = build()
    save_model(tmp_path / "a", network, METADATA)
    save_model(tmp_path / "b", network.to(memory_format=torch.channels_last_3d), METADATA)
    assert equal(load_file(tmp_path / "a"), load_file(tmp_path / "b"))


def test_missing_cut_and_foreign_files_are_told_apart(file):
    with pytest.raises(UserError, match="No such file"):
        load_model(file.with_name("other"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="no file of this application, or it is damaged"):
        load_model(file)
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="expected format"):
        load_model(file)
    save_file(build().state_dict(), file, metadata=METADATA.to_strings())
    with pytest.raises(UserError, match="is damaged"):
        load_model(file)


def test_weights_of_another_network_show_both_descriptions(file):
    other = replace(METADATA, backbone_arguments={"channels": [2, 4, 6]})
    save_model(file, build(), other)
    with pytest.raises(UserError, match=r"(?s)Expected .*channels=\[2, 4, 6\].*Found .* tensors"):
        load_model(file)


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({}, (16, 16, 16), "grid 16x16x16"),
        ({"grid": None, "patch": (8, 9, 7)}, (8, 9, 7), "patches of 8x9x7"),
        ({"grid": (8, 9, 7), "slices": "coronal"}, (8, 7), "coronal slices of grid 8x9x7"),
    ],
)
def test_a_model_file_says_what_the_network_sees(file, changes, size, words):
    metadata = replace(METADATA, **changes)
    save_model(file, build(), metadata)
    found = read_metadata(file)
    assert found == metadata
    assert found.input_size == size
    assert words in found.summary()
    preprocessing = found.preprocessing()
    assert (preprocessing.grid, preprocessing.crop) == (metadata.grid, (32, 32, 32))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"modalities": ("t1", "t2"), "in_channels": 2}, "modalities"),
        ({"out_channels": 3}, "out_channels"),
        ({"grid": (8, 8, 8)}, "grid"),
        ({"slices": "axial"}, "slices"),
        ({"description": load_description("lgg")}, "classes"),
        ({"description": replace(METADATA.description, background="noise")}, "background"),
    ],
)
def test_another_view_or_class_count_is_refused_with_both_descriptions(tmp_path, changes, word):
    check_compatible(tmp_path, METADATA, replace(METADATA, role="teacher", epoch=9))
    with pytest.raises(UserError, match=rf"(?s)differs in .*{word}.*Expected .*Found "):
        check_compatible(tmp_path / "model", replace(METADATA, **changes), METADATA)


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]


def test_any_flipped_byte_of_a_model_file_is_refused(file):
    content = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    names = [content.index(b'"sha256"') + 3, content.index(b"t1ce") + 1]
    places = torch.randint(0, len(content), (60,), generator=generator).tolist()
    for place in places + names:
        file.write_bytes(flipped(content, place))
        with pytest.raises(UserError):
            load_model(file)
        if place in names:
            with pytest.raises(UserError):
                read_metadata(file)


#: What the state of a training holds, of every kind that there is.
STATE = {
    "finished": False,
    "epoch": 3,
    "best": float("inf"),
    "weights": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"params": [0]}]},
    "random": {"cpu": torch.zeros(1, 4, dtype=torch.uint8), "gpu": torch.zeros(1, 0)},
    "means": {"names": [], "packed": torch.full((1, 2, 1), 1 / 3, dtype=torch.float64)},
    "scheduler": {"rate": 0.1 + 0.2, "none": None},
}


def test_a_state_comes_back_exactly(tmp_path):
    shared = torch.ones(3)
    state = STATE | {"tied": [shared, shared]}
    save_state(tmp_path / "state", state)
    found = load_state(tmp_path / "state")
    torch.testing.assert_close(found, state, rtol=0, atol=0)
    assert found["optimizer"]["state"].keys() == {0}
    assert load_state(tmp_path / "none") is None


def test_any_flipped_byte_of_a_state_is_refused(tmp_path):
    save_state(tmp_path / "state", STATE)
    content = (tmp_path / "state").read_bytes()
    for place in range(0, len(content), 41):
        (tmp_path / "state").write_bytes(flipped(content, place))
        with pytest.raises(UserError, match=r"remove state alone to go on"):
            load_state(tmp_path / "state")


@pytest.mark.parametrize(
    "content",
    [
        *({}, [], 3, None, torch.zeros(3), {"epoch": 1}, {"epoch": "1", "finished": True}),
        {"epoch": 1, "finished": True, "files": {"../../secret": "0"}},
    ],
)
def test_what_is_no_state_is_refused_where_a_training_goes_on(tmp_path, content):
    task = case(tmp_path)
    task.folder.root.mkdir()
    save_state(task.folder.state, content)
    with pytest.raises(UserError, match="cannot be gone on with"):
        train(task)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """The state after an epoch, and that inside the next one."""
    task = case(tmp_path_factory.mktemp("states"))
    with pytest.raises(StoppedError):
        train(task, Samples(5, at=8, call=send(15)))
    return load_state(task.folder.state), load_state(task.folder.pause)


@pytest.mark.parametrize("which", [0, 1], ids=["state", "pause"])
@pytest.mark.parametrize("value", ["nothing", 7, "text", None, [1], {"a": 1}, torch.zeros(2)])
def test_an_entry_that_is_missing_or_wrong_is_one_message_and_no_traceback(
    states, tmp_path, which, value
):
    sound = states[which]
    for name in ("weights", "optimizer", "random", "network", "means")[: 4 + which]:
        task = case(tmp_path / name)
        rest = {key: entry for key, entry in sound.items() if key != name}
        changed = rest if isinstance(value, str) and value == "nothing" else rest | {name: value}
        task.folder.root.mkdir()
        save_state((task.folder.state, task.folder.pause)[which], changed)
        if which:
            save_state(task.folder.state, states[0])
        with pytest.raises(UserError, match=r"Restore it|another network|cannot be gone on with"):
            train(task)


def test_a_folder_in_place_of_a_model_file_is_told_as_one(tmp_path):
    with pytest.raises(UserError, match=r"is a folder.*model\.safetensors"):
        read_metadata(tmp_path)
