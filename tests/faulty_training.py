"""A training of seconds whose data set or network can do something harmful."""

import os
from dataclasses import replace

import torch
from lightning_fabric import Fabric
from quick import STUDENT
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from kdnet.config import TrainingConfig
from kdnet.data.loading import build_loader
from kdnet.models import build_network
from kdnet.training.checkpoint import Task, TrainingFolder
from kdnet.training.history import read_history
from kdnet.training.loop import fit
from privdistill import DistillationWrapper, GroundTruth, HintonKL, PrivilegedInput

MODALITIES = tuple(STUDENT.description.modalities)
GRID = (4, 4, 4)
NAN, INFINITY = float("nan"), float("inf")


class Samples(torch.utils.data.Dataset):
    """Random volumes; reading the chosen one calls a function first, and one voxel may be odd."""

    grid = GRID

    def __init__(self, count, at=None, call=None, *, case=None, modality="t2", value=NAN):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 4, *self.grid, generator=generator)
        self.labels = torch.randint(0, 4, (count, 1, *self.grid), generator=generator).byte()
        self.reads, self.at, self.call = 0, at, call
        if case is not None:
            self.images[case, MODALITIES.index(modality), 0, 1, 2] = value

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == self.at:
            self.call(self)
        return {"image": self.images[index], "label": self.labels[index], "name": f"case{index}"}


class Network(nn.Module):
    """One convolution; a voxel above a limit gives NaN, and gradients are spoilt from a call on."""

    def __init__(self, channels=1, limit=INFINITY, spoil_from=None, call=None, at=None):
        super().__init__()
        torch.manual_seed(5)
        self.norm = nn.BatchNorm3d(channels)
        self.head = nn.Conv3d(channels, 4, 1)
        self.limit, self.spoil_from, self.calls = limit, spoil_from, 0
        self.at, self.call = at, call

    def forward(self, x):
        logits = self.head(self.norm(x))
        self.calls += 1
        if self.calls == self.at:
            self.call()
        if self.spoil_from is not None and self.calls >= self.spoil_from and logits.requires_grad:
            self.head.weight.register_hook(lambda slope: slope * NAN)
        too_large = (x > self.limit).flatten(1).any(1)
        return logits + torch.where(too_large, NAN, 0.0)[:, None, None, None, None]


def send(*numbers):
    """Return what sends this process signals."""
    return lambda *_: [os.kill(os.getpid(), number) for number in numbers]


def network(width=2, channels=1, classes=4):
    torch.manual_seed(7)
    arguments = {"channels": [width, 2 * width]}
    return build_network("kdnet", arguments, in_channels=channels, out_channels=classes)


def case(folder, width=2, role="baseline", **settings):
    """A task of four epochs of three steps."""
    arguments = {"channels": [width, 2 * width]}
    metadata = replace(STUDENT, role=role, backbone_arguments=arguments, grid=GRID)
    usual = {"epochs": 4, "batch_size": 2, "learning_rate": 0.01, "schedule": "onecycle"}
    folder.mkdir(parents=True, exist_ok=True)
    return Task(
        metadata=metadata,
        settings=TrainingConfig(**(usual | settings)),
        folder=TrainingFolder(folder / role),
        console=Console(quiet=True),
    )


def wrapper(student=None, teacher=None):
    objective = GroundTruth() + HintonKL() if teacher else 1.0 * GroundTruth()
    inputs = PrivilegedInput(MODALITIES, student=("t1ce",))
    return DistillationWrapper(teacher, student or network(), objective=objective, inputs=inputs)


def train(task, samples=None, validation=None, *, kd=None, batch=2, shuffle=True, **loading):
    """Train on five subjects, validate on three; return the student."""
    loading = {"workers": 0} | loading
    batches = build_loader(
        samples or Samples(5), batch, shuffle=shuffle, seed=3, flips=shuffle, **loading
    )
    others = build_loader(
        validation or Samples(3), 2, shuffle=False, seed=3, flips=False, workers=0
    )
    with kd or wrapper() as wrapped:
        fit(Fabric(accelerator="cpu", devices=1), wrapped, batches, others, task)
        return wrapped.student


def weights(task):
    return load_file(task.folder.model) | {
        f"last.{k}": v for k, v in load_file(task.folder.last).items()
    }


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def losses(task):
    """Rows of the history, but for the time that they took."""
    rows = read_history(task.folder.history)
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
