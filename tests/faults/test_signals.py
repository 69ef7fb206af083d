"""A training that is asked to stop keeps everything within one step, however often it is asked."""

import os
import signal

import pytest
import torch

from faulty_training import case, equal, train, weights
from kdnet.stopping import StoppedError
from kdnet.training.checkpoint import load_state
from kdnet.training.history import read_history


def send(*numbers):
    def call(*_):
        for number in numbers:
            os.kill(os.getpid(), number)

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    train(task := case(tmp_path_factory.mktemp("whole")))
    return task


def losses(task):
    rows = read_history(task.folder / "history.csv")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize(
    ("number", "read"), [(signal.SIGTERM, 1), (signal.SIGINT, 8), (signal.SIGUSR1, 10)]
)
def test_nothing_of_a_step_is_lost(tmp_path, whole, number, read):
    """Two reads are a step, five an epoch of three."""
    task = case(tmp_path / "parts")
    with pytest.raises(StoppedError) as stop:
        train(task, at=read, call=send(number))
    epoch, inside = divmod(read - 1, 5)
    step = 3 * epoch + inside // 2 + 1
    kept = load_state(task.pause_file)
    assert (kept["epoch"], kept["step"], kept["batch"]) == (epoch, step, inside // 2 + 1)
    assert stop.value.exit_status == 128 + number
    train(task)
    assert equal(weights(task), weights(whole))
    assert losses(task) == losses(whole)


def during_saving(monkeypatch, *numbers):
    """Send signals when half of a state is written."""
    save = torch.save

    def interrupted(content, stream):
        stream.write(b"half")
        if "batch" in content:
            send(*numbers)()
        stream.seek(0)
        save(content, stream)

    monkeypatch.setattr(torch, "save", interrupted)


def test_further_signals_while_saving_change_nothing(tmp_path, whole, monkeypatch):
    task = case(tmp_path / "parts")
    with monkeypatch.context() as patch:
        during_saving(patch, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        with pytest.raises(StoppedError, match="1 of 4 epochs and 2 of 3 steps"):
            train(task, at=8, call=send(signal.SIGINT))
    assert load_state(task.pause_file)["step"] == 5
    train(task)
    assert equal(weights(task), weights(whole))


def test_leaving_at_once_while_saving_harms_no_file(tmp_path, whole, monkeypatch):
    task = case(tmp_path / "parts")
    with monkeypatch.context() as patch:
        during_saving(patch, signal.SIGINT, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(task, at=8, call=send(signal.SIGINT))
    assert not task.pause_file.exists()
    assert [path.name for path in task.folder.glob(".*")] == []
    assert load_state(task.state_file)["epoch"] == 1
    train(task)
    assert equal(weights(task), weights(whole))
