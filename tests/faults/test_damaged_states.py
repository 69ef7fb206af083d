"""A state that can be read and is none is refused with the names of what is wrong."""

import os
import signal

import pytest
import torch

from faulty_training import case, train
from kdnet.errors import UserError
from kdnet.stopping import StoppedError
from kdnet.training.checkpoint import load_state, save_state


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """The state after an epoch, and that inside the next one."""
    task = case(tmp_path_factory.mktemp("states"))
    with pytest.raises(StoppedError):
        train(task, at=8, call=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    return load_state(task.state_file), load_state(task.pause_file)


WRONG = [7, "text", None, [1], {"a": 1}, torch.zeros(2), True, -1.5]


@pytest.mark.parametrize("digest", [False, True])
@pytest.mark.parametrize("which", [0, 1], ids=["state", "pause"])
def test_every_entry_is_needed_and_has_one_form(states, tmp_path, which, digest):
    save = save_state if digest else lambda path, content: torch.save(content, path)
    sound = states[which]
    path = tmp_path / "state.pt"
    fitting = {"precision": 1, "optimizer": 1, "scheduler": 1, "weights": 0}
    for name in {*sound} - {"network", "files"}:
        if name == "batch":
            continue
        save(path, {key: value for key, value in sound.items() if key != name})
        with pytest.raises(UserError, match=f"not the state of a training: .*{name}"):
            load_state(path)
        refused = 0
        for value in WRONG:
            save(path, sound | {name: value})
            try:
                load_state(path)
            except UserError:
                refused += 1
        assert refused >= len(WRONG) - 2 - fitting.get(name, 0), name


@pytest.mark.parametrize("content", [{}, [], {"a": 1}, 3, torch.zeros(3), {"epoch": 1}])
def test_what_is_no_state_is_refused_where_a_training_goes_on(tmp_path, content):
    task = case(tmp_path)
    task.folder.mkdir()
    torch.save(content, task.state_file)
    with pytest.raises(
        UserError, match=r"state.pt (is not the state of a training|cannot be read)"
    ):
        train(task)


@pytest.mark.parametrize("name", ["weights", "optimizer"])
def test_a_state_that_does_not_fit_is_refused(states, tmp_path, name):
    task = case(tmp_path)
    task.folder.mkdir()
    save_state(task.state_file, states[0] | {name: {}})
    with pytest.raises(UserError, match="does not fit this network"):
        train(task)


def test_files_of_a_state_lie_beside_it(states, tmp_path):
    save_state(tmp_path / "state.pt", states[0] | {"files": {"../../secret": "0"}})
    with pytest.raises(UserError, match="files of it are missing or of another kind"):
        load_state(tmp_path / "state.pt")


def test_a_file_without_a_digest_is_said_to_have_none(states, tmp_path):
    said = []
    torch.save(states[0], tmp_path / "state.pt")
    assert load_state(tmp_path / "state.pt", said.append)["epoch"] == 1
    assert len(said) == 1
    assert "state.pt has no digest" in said[0]
    save_state(tmp_path / "state.pt", states[0])
    load_state(tmp_path / "state.pt", said.append)
    assert len(said) == 1
