"""The application's loop in two gloo processes against one process on the joined batch.

With five validation subjects the first process has two batches of them, the second one; of three
whole volumes, which have windows of their own number, the first has two.
"""

import os
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import nn
from versions import needs_fsdp

import faulty_training
from faulty_training import MODALITIES, case, send
from kdnet.config import Config, ObjectiveConfig, TrainingConfig
from kdnet.data.loading import build_loader
from kdnet.recipes import kdnet
from kdnet.runs.unit import launch
from kdnet.stopping import StoppedError
from kdnet.training.history import read_history
from kdnet.training.loop import fit
from privdistill import DistillationWrapper, PrivilegedInput

pytestmark = pytest.mark.slow
GRID = (8, 8, 8)


class Samples(faulty_training.Samples):
    """Random volumes of another grid; reading the chosen one sends this process a signal."""

    grid = GRID


class Net(nn.Module):
    def __init__(self, channels, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv3d(channels, 4, 3, padding=1), nn.LeakyReLU())
        self.bottleneck = nn.Sequential(nn.Conv3d(4, 4, 2, stride=2), nn.LeakyReLU())
        self.head = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv3d(4, 4, 1))

    def forward(self, x):
        return self.head(self.bottleneck(self.stem(x)))


def volumes():
    """Three whole subjects, of other sizes than the patches."""
    generator = torch.Generator().manual_seed(4)
    sizes = [(8, 8, 8), (8, 16, 8), (8, 8, 12)]
    images = [torch.randn(4, *size, generator=generator) for size in sizes]
    labels = [torch.randint(0, 4, (1, *size), generator=generator).byte() for size in sizes]
    return [{"image": i, "label": t, "name": ""} for i, t in zip(images, labels, strict=True)]


def task(folder, batch_size, whole):
    settings = {"epochs": 3, "batch_size": batch_size, "gradient_clip": 1.0}
    work = case(folder, role="student", **settings)
    size = {"grid": None, "patch": GRID} if whole else {"grid": GRID}
    return replace(work, metadata=replace(work.metadata, **size), volumes=whole)


def distil(fabric, folder, samples, whole=None, batch=None):
    """The student of the paper, four subjects in a step over all processes unless it is said."""
    work = task(folder, batch or 4 // fabric.world_size, whole)
    shared = {"workers": 0, "replicas": fabric.world_size, "rank": fabric.global_rank}
    loaders = [
        build_loader(part, work.settings.batch_size, shuffle=x, seed=3, flips=x, **shared)
        for part, x in ((samples, True), (Samples(5), False))
    ]
    teacher, student = Net(4, seed=1), Net(1, seed=2)
    objective = kdnet.student_objective(ObjectiveConfig())
    with DistillationWrapper(
        teacher,
        student,
        objective=objective,
        inputs=PrivilegedInput(MODALITIES, student=("t1ce",)),
        taps=kdnet.bottleneck(ObjectiveConfig(), student, objective),
        example=torch.zeros(1, 4, *GRID),
    ) as kd:
        fit(fabric, kd, *loaders, work)


def work(rank, folder, port, strategy):
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = {"accelerator": "cpu", "devices": 2, "strategy": strategy}
    fabric = launch(Config(training=TrainingConfig(**options)))
    distil(fabric, Path(folder) / "two", Samples(8))
    distil(fabric, Path(folder) / "patches", Samples(8), volumes())
    for number in (signal.SIGTERM, signal.SIGUSR1):
        part = Path(folder) / number.name
        # Only the second process is asked to stop, in the second of its epochs of two steps.
        samples = Samples(8, at=5 if rank == 1 else None, call=send(number))
        try:
            distil(fabric, part, samples)
        except StoppedError as stop:
            (part / f"{rank}.txt").write_text(f"{stop.exit_status - 128}: {stop}")
        fabric.barrier()
        if rank == 0:
            for name in (".alone", ".other"):
                shutil.copytree(part, part.with_suffix(name))
        fabric.barrier()
        distil(fabric, part, Samples(8))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp", marks=needs_fsdp)])
def folder(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(str(root), port, request.param), nprocs=2)
    return root


def history(folder):
    return read_history(folder / "student" / "history.csv")


def assert_same_weights(one, other, **tolerance):
    weights = load_file(other / "student" / "model.safetensors")
    for name, value in load_file(one / "student" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], value, **tolerance)


@pytest.mark.parametrize(("kind", "whole"), [("two", None), ("patches", volumes())])
def test_two_processes_have_the_losses_of_one_on_the_joined_batch(folder, tmp_path, kind, whole):
    distil(Fabric(accelerator="cpu", devices=1), tmp_path, Samples(8), whole)
    assert len(history(tmp_path)) == 3
    for one, two in zip(history(tmp_path), history(folder / kind), strict=True):
        assert two["validation_dice"] > 0
        for name in one.keys() - {"seconds"}:
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
    assert_same_weights(tmp_path, folder / kind, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_all_of_them_at_the_same_step(folder, number):
    part = folder / number.name
    messages = {(part / f"{rank}.txt").read_text() for rank in range(2)}
    assert len(messages) == 1
    assert messages.pop().startswith(
        f"{int(number)}: Stopped in epoch 2 of the student; 1 of 3 "
        "epochs and 1 of 2 steps of the next are kept"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_was_stopped_goes_on_to_the_same_end(folder, number):
    assert_same_weights(folder / "two", folder / number.name, atol=0, rtol=0)
    assert [row["epoch"] for row in history(folder / number.name)] == [1, 2, 3]


def test_what_two_processes_began_one_can_finish(folder):
    distil(Fabric(accelerator="cpu", devices=1), folder / "SIGTERM.alone", Samples(8))
    assert_same_weights(folder / "two", folder / "SIGTERM.alone", atol=1e-5, rtol=1e-5)


def test_one_process_goes_on_with_its_own_number_of_steps(folder):
    """The batch of a device stays what it was, so that an epoch has twice as many steps."""
    part = folder / "SIGTERM.other"
    distil(Fabric(accelerator="cpu", devices=1), part, Samples(8), batch=2)
    assert [row["step"] for row in history(part)] == [2, 6, 10]
