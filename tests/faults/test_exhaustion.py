"""Lost workers, exhausted memory and hanging loaders: cause, remedy, status 2, nothing lost."""

import os
import re
import signal
import time
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crossval import CrossvalOptions
from faulty_training import Network, Samples, case, equal, train, weights, wrapper
from kdnet import errors
from kdnet.command import exit_status
from kdnet.config import DataConfig, TrainingConfig
from kdnet.data.loading import build_loader, map_parallel
from kdnet.errors import UserError, explain, explained
from kdnet.runs import pool
from kdnet.training.checkpoint import load_state


class FailingSamples(Samples):
    """Does something when a chosen case is read, until there is a file that says not to."""

    def __init__(self, call, mended):
        super().__init__(4)
        self.failing, self.mended = call, mended

    def __getitem__(self, index):
        if index == 3 and not self.mended.exists():
            self.failing()
        return super().__getitem__(index)


def kill_yourself():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    os._exit(3)


def hang():
    time.sleep(60)


def status_of(folder, samples, network=None, **loading):
    work = case(folder, epochs=3, schedule="constant")
    kd = wrapper(network or Network())
    status = exit_status(
        lambda: train(work, samples, Samples(2), kd=kd, shuffle=False, **loading) and None
    )
    return work, status


def is_one_message(text, *parts):
    return "Traceback" not in text and all(part in text for part in parts)


LOADING = "A process that loads data was lost"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (kill_yourself, "killed by signal: Killed"),
        (leave, "exited unexpectedly"),
        # PyTorch waits five seconds for a process that hangs before it ends it.
        pytest.param(hang, "timed out after 2", marks=pytest.mark.faults),
    ],
)
def test_a_loading_process_that_fails_ends_the_run_and_the_next_start_finishes_it(
    tmp_path, capsys, monkeypatch, call, words
):
    monkeypatch.setattr("kdnet.data.loading.PATIENCE", 2.0)
    samples = FailingSamples(call, tmp_path / "mended")
    assert status_of(tmp_path / "run", samples, workers=1)[1] == 2
    assert is_one_message(capsys.readouterr().err, LOADING, words, "the same command goes on")
    (tmp_path / "mended").touch()
    work, status = status_of(tmp_path / "run", samples, workers=1)
    assert status == 0
    whole, _ = status_of(tmp_path / "whole", Samples(4))
    assert equal(weights(work), weights(whole))


def gpu_is_full():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB of 79.10 GiB")


def main_memory_of_numpy():
    np.empty(2**60, dtype=np.uint8)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (gpu_is_full, ("The GPU's memory", "--batch-size", "--patch", "79.10 GiB")),
        (main_memory_of_numpy, ("Main memory", "--workers", "Unable to allocate")),
    ],
)
def test_memory_that_runs_out_ends_the_run_with_its_epochs_kept(tmp_path, capsys, call, parts):
    # Two steps and one validation batch per epoch: the fifth call is in epoch 2.
    assert status_of(tmp_path, Samples(4), Network(at=5, call=call))[1] == 2
    assert is_one_message(capsys.readouterr().err, *parts)
    work, status = status_of(tmp_path, Samples(4))
    assert status == 0
    state = load_state(work.folder.state)
    assert (state["finished"], state["epoch"]) == (True, 3)


def test_a_lack_of_memory_in_a_loading_process_is_explained_too(tmp_path, capsys):
    samples = FailingSamples(main_memory_of_numpy, tmp_path / "mended")
    assert status_of(tmp_path, samples, workers=1)[1] == 2
    assert "Main memory was not enough" in capsys.readouterr().err


def test_work_in_parallel_names_the_item_that_did_not_fit():
    items = [SimpleNamespace(name=f"BraTS_{number}", size=2 ** (60 * number)) for number in (0, 1)]
    options = {"workers": 2, "title": "Preparing subjects", "progress": False}
    with pytest.raises(UserError, match=r"^Preparing subjects: BraTS_1 stopped\. Main memory"):
        map_parallel(lambda item: np.empty(item.size, np.uint8), items, **options)


def test_a_unit_that_the_kernel_killed_says_what_to_lower(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("Epoch 3\n")
    words = pool._last_words(log, -signal.SIGKILL)
    assert "killed by signal 9, as the kernel does when memory runs out; lower --jobs" in words


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), KeyError("out")])
def test_other_errors_pass_as_they_are(error):
    assert explain(error) is None
    with pytest.raises(type(error)), explained("The run"):
        raise error


def test_every_option_that_is_recommended_exists():
    texts = [errors._GPU, errors._CPU, errors._LOADING]
    found = [name for text in texts for name in re.findall(r"(?<!run )--([a-z][a-z-]+)", text)]
    named = {name.replace("-", "_") for name in found}
    known = {item.name for kind in (DataConfig, TrainingConfig) for item in fields(kind)}
    assert named <= known | {item.name for item in fields(CrossvalOptions)} | {"out"}


def test_a_hanging_loader_can_only_be_seen_from_outside():
    inside = build_loader(Samples(2), 2, shuffle=False, seed=0, flips=False, workers=0)
    outside = build_loader(Samples(2), 2, shuffle=False, seed=0, flips=False, workers=1)
    assert (inside.timeout, outside.timeout) == (0, 600)
