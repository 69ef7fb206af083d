"""Two gloo processes against one process on the joined batch."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from privdistill import (
    DistillationWrapper,
    GroundTruth,
    LatentKL,
    LifecycleError,
    PrivilegedInput,
    SoftTargetDiceBCE,
)


def build(arrange=None, objective=None):
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
    if arrange == "student first":
        fully_shard(student)
    return DistillationWrapper(
        teacher,
        student,
        objective=objective or SoftTargetDiceBCE() + GroundTruth() + 10 * LatentKL(),
        inputs=PrivilegedInput(("t1", "t1ce"), student=("t1ce",)),
        example=torch.zeros(1, 2, 8, 8),
    )


def batch():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, 2, 8, 8, generator=generator)
    return image, torch.randint(0, 3, (4, 8, 8), generator=generator)


def train_shard(rank, folder, arrange):
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        if arrange == "student first":
            with pytest.raises(LifecycleError, match=r"then call fully_shard\(kd\)"):
                build(arrange)
            return
        kd = build(arrange, objective=local() if arrange == "batch dice" else None)
        model = (
            DistributedDataParallel(kd) if arrange in ("ddp", "batch dice") else shard(kd, arrange)
        )
        image, target = (part[2 * rank : 2 * rank + 2] for part in batch())
        model(image, target).loss.backward()
        gradients = {name: whole(p.grad) for name, p in kd.named_parameters()}
        torch.save(gradients, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def shard(kd, arrange):
    if arrange == "wrapper last":
        fully_shard(kd.student)
    # the adapters too, which only the wrapper holds
    return fully_shard(kd)


def whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def local():
    return 1.0 * GroundTruth(batch_dice=True)


def gradients_of_two_processes(arrange):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train_shard, args=(folder, arrange), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("arrange", ["ddp", "wrapper last", "wrapper alone"])
def test_promise_12_gradients_equal_those_of_the_joined_batch(arrange):
    kd = build()
    kd(*batch()).loss.backward()
    assert len(kd.adapters) == 1
    for found in gradients_of_two_processes(arrange):
        for name, parameter in kd.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_promise_12_a_student_that_is_sharded_already_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train_shard, args=(folder, "student first"), nprocs=2)


@pytest.mark.slow
def test_promise_12_batch_dice_is_each_processes_own():
    kd = build(objective=local())
    image, target = batch()
    halves = [kd(image[part], target[part]).loss for part in (slice(0, 2), slice(2, 4))]
    (sum(halves) / 2).backward()
    found = gradients_of_two_processes("batch dice")[0]
    for name, parameter in kd.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-5)
