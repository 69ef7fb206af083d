"""Two gloo processes against one process on the joined batch."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from privdistill import (
    DistillationWrapper,
    GroundTruth,
    LatentKL,
    PrivilegedInput,
    SoftTargetDiceBCE,
)


def build():
    def network(channels, width):
        torch.manual_seed(channels)
        return nn.Sequential(
            nn.Conv2d(channels, width, 2, stride=2),
            nn.LeakyReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, 3, 1),
        )

    teacher, student = network(2, width=6), network(1, width=4)
    torch.manual_seed(9)
    return DistillationWrapper(
        teacher,
        student,
        objective=SoftTargetDiceBCE() + GroundTruth() + 10 * LatentKL(),
        inputs=PrivilegedInput(("t1", "t1ce"), student=("t1ce",)),
        example=torch.zeros(1, 2, 8, 8),
    )


def batch():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, 2, 8, 8, generator=generator)
    return image, torch.randint(0, 3, (4, 8, 8), generator=generator)


def train_shard(rank, folder):
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        kd = build()
        model = DistributedDataParallel(kd)
        image, target = (part[2 * rank : 2 * rank + 2] for part in batch())
        model(image, target).loss.backward()
        gradients = {name: p.grad for name, p in kd.named_parameters()}
        torch.save(gradients, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_promise_12_gradients_equal_those_of_the_joined_batch():
    kd = build()
    kd(*batch()).loss.backward()
    assert len(kd.adapters) == 1
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train_shard, args=(folder,), nprocs=2)
        for rank in range(2):
            found = torch.load(Path(folder) / f"{rank}.pt", weights_only=True)
            for name, parameter in kd.named_parameters():
                torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-5)
