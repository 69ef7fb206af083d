"""A training of seconds, whose samples and network can be made to fail."""

import torch
from rich.console import Console
from torch import nn

from kdnet.config import TrainingConfig
from kdnet.data.description import load_description
from kdnet.training.checkpoint import ModelMetadata
from kdnet.training.task import Task
from privdistill import DistillationWrapper, GroundTruth, HintonKL, PrivilegedInput

DESCRIPTION = load_description("brats2021")
MODALITIES = tuple(DESCRIPTION.modalities)
GRID = (4, 4, 4)
NAN, INFINITY = float("nan"), float("inf")


class Samples(torch.utils.data.Dataset):
    """Random volumes, one of which may hold a value in one modality."""

    def __init__(self, count, case=None, modality="t2", value=NAN):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 4, *GRID, generator=generator)
        self.labels = torch.randint(0, 4, (count, 1, *GRID), generator=generator).byte()
        if case is not None:
            self.images[case, MODALITIES.index(modality), 0, 1, 2] = value

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.labels[index], "name": f"case{index}"}


class Network(nn.Module):
    """One convolution; a voxel above a limit overflows, and a number of gradients is spoilt."""

    def __init__(self, channels=1, limit=INFINITY, spoil_from=None):
        super().__init__()
        self.norm = nn.BatchNorm3d(channels)
        self.head = nn.Conv3d(channels, 4, 1)
        self.limit = limit
        self.calls = 0
        self.spoil_from = spoil_from

    def forward(self, x):
        logits = self.head(self.norm(x))
        too_large = (x > self.limit).flatten(1).any(1)
        self.calls += 1
        if self.spoil_from is not None and self.calls >= self.spoil_from and logits.requires_grad:
            self.head.weight.register_hook(lambda slope: slope * NAN)
        return logits + torch.where(too_large, INFINITY, 0.0)[:, None, None, None, None]


def task(folder):
    metadata = ModelMetadata(
        role="student",
        backbone="kdnet",
        backbone_arguments={},
        in_channels=1,
        out_channels=4,
        modalities=("t1ce",),
        activation="softmax",
        description=DESCRIPTION,
        crop=None,
        grid=GRID,
    )
    return Task(
        metadata=metadata,
        settings=TrainingConfig(epochs=3, batch_size=2, schedule="constant"),
        folder=folder / "student",
        scalars=folder / "tensorboard",
        memory_format="contiguous",
        console=Console(quiet=True),
    )


def wrapper(student=None, teacher=None):
    objective = GroundTruth() + HintonKL() if teacher else 1.0 * GroundTruth()
    inputs = PrivilegedInput(MODALITIES, student=("t1ce",))
    return DistillationWrapper(teacher, student or Network(), objective=objective, inputs=inputs)
