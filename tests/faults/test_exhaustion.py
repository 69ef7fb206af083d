"""Lost workers, exhausted memory and hanging loaders: cause, remedy, status 2, nothing lost."""

import os
import re
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file

from crossval import CrossvalOptions
from faults.tiny import Network, Samples, task, wrapper
from kdnet import exhaustion
from kdnet.command import exit_status
from kdnet.config import DataConfig, TrainingConfig
from kdnet.data.loading import build_loader, map_parallel
from kdnet.exhaustion import ExhaustedError, explain, explained
from kdnet.runs import pool
from kdnet.training import loop
from kdnet.training.checkpoint import load_state


class FailingSamples(Samples):
    """Does something when a chosen case is read, until there is a file that says not to."""

    def __init__(self, count, at, call, mended):
        super().__init__(count)
        self.at, self.call, self.mended = at, call, mended

    def __getitem__(self, index):
        if index == self.at and not self.mended.exists():
            self.call()
        return super().__getitem__(index)


def kill_yourself():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    os._exit(3)


def hang():
    time.sleep(60)


def fit(folder, samples, *, workers, network=None):
    folder.mkdir(exist_ok=True)
    work = task(folder)
    train = build_loader(
        samples, 2, shuffle=False, seed=3, flips=False, workers=workers, patience=2.0
    )
    validation = build_loader(Samples(2), 2, shuffle=False, seed=3, flips=False, workers=0)
    torch.manual_seed(5)
    with wrapper(network or Network()) as kd:
        loop.fit(Fabric(accelerator="cpu", devices=1), kd, train, validation, work)
    return work


def is_one_message(text, *parts):
    return "Traceback" not in text and all(part in text for part in parts)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (kill_yourself, ("was killed", "Lower --workers", "killed by signal: Killed")),
        (leave, ("ended by itself", "check_data.py", "exited unexpectedly")),
        # PyTorch waits five seconds for a process that hangs before it ends it.
        pytest.param(
            hang, ("must hang", "network drive", "timed out after 2"), marks=pytest.mark.faults
        ),
    ],
)
def test_a_loading_process_that_fails_ends_the_run_and_the_next_start_finishes_it(
    tmp_path, capsys, call, parts
):
    mended = tmp_path / "mended"
    samples = FailingSamples(4, 3, call, mended)
    assert exit_status(lambda: fit(tmp_path / "run", samples, workers=1) and None) == 2
    assert is_one_message(capsys.readouterr().err, *parts, "the same command goes on")
    mended.touch()
    work = fit(tmp_path / "run", samples, workers=1)
    assert load_state(work.state_file)["finished"]
    whole = fit(tmp_path / "whole", Samples(4), workers=0)
    first, second = load_file(work.model_file), load_file(whole.model_file)
    assert all(torch.equal(first[name], second[name]) for name in second)


class Greedy(Network):
    """Asks for too much in one of its calls."""

    def __init__(self, at, call):
        super().__init__()
        self.at, self.call = at, call

    def forward(self, x):
        out = super().forward(x)
        if self.calls == self.at:
            self.call()
        return out


def gpu_is_full():
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
    )


def gpu_is_full_elsewhere():
    raise RuntimeError("CUDA error: out of memory")


def main_memory_of_torch():
    torch.empty(2**60, dtype=torch.uint8)


def main_memory_of_numpy():
    np.empty(2**60, dtype=np.uint8)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (gpu_is_full, ("The GPU's memory", "--batch_size", "--patch", "79.10 GiB")),
        (gpu_is_full_elsewhere, ("The GPU's memory", "nvidia-smi")),
        (main_memory_of_torch, ("Main memory", "--workers", "--teacher_cache_storage half")),
        (main_memory_of_numpy, ("Main memory", "Unable to allocate")),
    ],
)
def test_memory_that_runs_out_ends_the_run_with_its_epochs_kept(tmp_path, capsys, call, parts):
    # Two steps and one validation batch per epoch: the fifth call is in epoch 2.
    greedy = Greedy(5, call)
    status = exit_status(lambda: fit(tmp_path, Samples(4), workers=0, network=greedy) and None)
    assert status == 2
    assert is_one_message(capsys.readouterr().err, *parts)
    work = fit(tmp_path, Samples(4), workers=0)
    assert load_state(work.state_file)["finished"]
    assert load_state(work.state_file)["epoch"] == 3


def test_a_lack_of_memory_in_a_loading_process_is_explained_too(tmp_path, capsys):
    samples = FailingSamples(4, 3, main_memory_of_numpy, tmp_path / "mended")
    assert exit_status(lambda: fit(tmp_path / "run", samples, workers=1) and None) == 2
    assert "Main memory was not enough" in capsys.readouterr().err


def test_a_killed_process_of_a_pool_is_explained():
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        future = pool.submit(kill_yourself)
        with pytest.raises(ExhaustedError, match="was killed"), explained("Preparing"):
            future.result()


def test_work_in_parallel_names_the_item_that_did_not_fit():
    items = [SimpleNamespace(name=f"BraTS_{number}", size=2 ** (60 * number)) for number in (0, 1)]
    with pytest.raises(ExhaustedError, match=r"^Preparing subjects: BraTS_1 stopped\. Main memory"):
        map_parallel(
            lambda item: np.empty(item.size, np.uint8),
            items,
            workers=2,
            title="Preparing subjects",
            progress=False,
        )


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
    texts = [kind for _, kind in exhaustion._KINDS]
    named = {name for text in texts for name in re.findall(r"(?<!run )--([a-z][a-z_]+)", text)}
    known = {item.name for kind in (DataConfig, TrainingConfig) for item in fields(kind)}
    known |= {item.name for item in fields(CrossvalOptions)} | {"out"}
    # Docker's own.
    assert named - known == {"ipc"}


def test_a_hanging_loader_can_only_be_seen_from_outside():
    inside = build_loader(Samples(2), 2, shuffle=False, seed=0, flips=False, workers=0)
    outside = build_loader(Samples(2), 2, shuffle=False, seed=0, flips=False, workers=1)
    assert (inside.timeout, outside.timeout) == (0, 600)
