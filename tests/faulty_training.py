"""A training of seconds whose data set can do something harmful when it is read."""

import torch
from lightning_fabric import Fabric
from rich.console import Console
from safetensors.torch import load_file

from kdnet.config import TrainingConfig
from kdnet.data.description import load_description
from kdnet.data.loading import build_loader
from kdnet.models import build_network
from kdnet.training.checkpoint import ModelMetadata
from kdnet.training.loop import fit
from kdnet.training.task import Task
from privdistill import DistillationWrapper, GroundTruth, PrivilegedInput

DESCRIPTION = load_description("brats2021")
GRID = (4, 4, 4)


class Samples(torch.utils.data.Dataset):
    """Random volumes; reading the chosen one calls a function first."""

    def __init__(self, count, at=None, call=None):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 4, *GRID, generator=generator)
        self.labels = torch.randint(0, 4, (count, 1, *GRID), generator=generator).byte()
        self.reads, self.at, self.call = 0, at, call

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == self.at:
            self.call(self)
        return {"image": self.images[index], "label": self.labels[index], "name": f"case{index}"}


def network(width=2, channels=1, classes=4):
    torch.manual_seed(7)
    arguments = {"channels": [width, 2 * width]}
    return build_network("kdnet", arguments, in_channels=channels, out_channels=classes)


def case(folder, width=2, **settings):
    """A task of four epochs of three steps."""
    metadata = ModelMetadata(
        role="baseline",
        backbone="kdnet",
        backbone_arguments={"channels": [width, 2 * width]},
        in_channels=1,
        out_channels=4,
        modalities=("t1ce",),
        activation="softmax",
        description=DESCRIPTION,
        crop=None,
        grid=GRID,
    )
    usual = {"epochs": 4, "batch_size": 2, "learning_rate": 0.01, "schedule": "onecycle"}
    folder.mkdir(parents=True, exist_ok=True)
    return Task(
        metadata=metadata,
        settings=TrainingConfig(**(usual | settings)),
        folder=folder / "baseline",
        scalars=folder / "tensorboard" / "baseline",
        memory_format="contiguous",
        console=Console(quiet=True),
    )


def train(task, at=None, call=None):
    """Train on five subjects, validate on three."""
    inputs = PrivilegedInput(tuple(DESCRIPTION.modalities), student=("t1ce",))
    loaders = [
        build_loader(dataset, 2, shuffle=shuffle, seed=3, flips=shuffle, workers=0)
        for dataset, shuffle in ((Samples(5, at, call), True), (Samples(3), False))
    ]
    with DistillationWrapper(None, network(), objective=GroundTruth(), inputs=inputs) as kd:
        fit(Fabric(accelerator="cpu", devices=1), kd, *loaders, task)


def weights(task):
    return load_file(task.model_file) | {
        f"last.{k}": v for k, v in load_file(task.last_file).items()
    }


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
