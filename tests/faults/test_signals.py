"""A training that is asked to stop keeps everything within one step, however often it is asked."""

import signal

import pytest
import safetensors.torch

from faulty_training import Samples, case, equal, losses, send, train, weights
from kdnet.stopping import StoppedError
from kdnet.training.checkpoint import load_state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    train(task := case(tmp_path_factory.mktemp("whole")))
    return task


@pytest.mark.parametrize(
    ("number", "read"), [(signal.SIGTERM, 1), (signal.SIGINT, 8), (signal.SIGUSR1, 10)]
)
def test_nothing_of_a_step_is_lost(tmp_path, whole, number, read):
    """Two reads are a step, five an epoch of three."""
    task = case(tmp_path / "parts")
    with pytest.raises(StoppedError) as stop:
        train(task, Samples(5, read, send(number)))
    epoch, inside = divmod(read - 1, 5)
    kept = load_state(task.folder.pause)
    step = 3 * epoch + inside // 2 + 1
    assert (kept["epoch"], kept["step"], kept["batch"]) == (epoch, step, inside // 2 + 1)
    assert stop.value.exit_status == 128 + number
    train(task, rest := Samples(5))
    assert rest.reads == 4 * 5 - 5 * epoch - min(5, 2 * (inside // 2 + 1))  # none is read again
    assert equal(weights(task), weights(whole))
    assert losses(task) == losses(whole)


def during_saving(monkeypatch, *numbers):
    """Send signals when half of what an interruption keeps is written."""
    save = safetensors.torch.save_file

    def interrupted(tensors, path, metadata):
        if path.name.endswith("pause.safetensors"):
            path.write_bytes(b"half")
            send(*numbers)()
        save(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)


def test_further_signals_while_saving_change_nothing(tmp_path, whole, monkeypatch):
    task = case(tmp_path / "parts")
    with monkeypatch.context() as patch:
        during_saving(patch, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        with pytest.raises(StoppedError, match="1 of 4 epochs and 2 of 3 steps"):
            train(task, Samples(5, 8, send(signal.SIGINT)))
    assert load_state(task.folder.pause)["step"] == 5
    train(task)
    assert equal(weights(task), weights(whole))


def test_leaving_at_once_while_saving_harms_no_file(tmp_path, whole, monkeypatch):
    task = case(tmp_path / "parts")
    with monkeypatch.context() as patch:
        during_saving(patch, signal.SIGINT, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(task, Samples(5, 8, send(signal.SIGINT)))
    assert not task.folder.pause.exists()
    assert [path.name for path in task.folder.root.glob(".*")] == []
    assert load_state(task.folder.state)["epoch"] == 1
    train(task)
    assert equal(weights(task), weights(whole))
