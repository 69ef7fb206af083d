"""Two gloo processes that share one folder of teacher outputs."""

from datetime import timedelta
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
    TeacherCache,
    precompute,
)

pytestmark = pytest.mark.slow
KEYS = ["a", "b", "c", "d"]


def network(channels):
    down = nn.Conv2d(channels, 4, 2, stride=2)
    return nn.Sequential(down, nn.LeakyReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 1))


def build(cache):
    torch.manual_seed(0)
    return DistillationWrapper(
        network(2),
        network(1),
        objective=SoftTargetDiceBCE() + GroundTruth() + 10 * LatentKL(),
        inputs=PrivilegedInput(("t1", "t1ce"), student=("t1ce",)),
        example=torch.zeros(1, 2, 8, 8),
        cache=cache,
    )


def train(kd, model, part):
    """Weights after four steps in which the samples change places."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, 2, 8, 8, generator=generator)
    target = torch.randint(0, 3, (4, 8, 8), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for turn in range(4):
        order = torch.arange(4).roll(2 * turn)[part]
        keys = [KEYS[i] for i in order.tolist()]
        model(image[order], target[order], key=keys).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in kd.parameters()]


def work(rank, folder):
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    part = slice(2 * rank, 2 * rank + 2)
    plain, kd = build(None), build(TeacherCache(Path(folder) / "cache"))
    found = {
        "plain": train(plain, DistributedDataParallel(plain), part),
        "cached": train(kd, DistributedDataParallel(kd), part),
        "statistics": vars(kd.cache.statistics),
    }
    distributed.barrier()
    shared = build(TeacherCache(Path(folder) / "filled"))
    image = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(rank))
    precompute(shared, [(image, KEYS[part])])
    distributed.barrier()
    other = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(1 - rank))
    shared(other, torch.zeros(2, 8, 8).long(), key=KEYS[slice(2 - 2 * rank, 4 - 2 * rank)])
    found["hits of the other's"] = shared.cache.statistics.hits
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_a_shared_cache_changes_no_weight(found):
    for rank in found:
        for plain, cached in zip(rank["plain"], rank["cached"], strict=True):
            assert torch.equal(plain, cached)


def test_cached_processes_equal_one_process_on_the_joined_batch(found):
    kd = build(None)
    for joined, shared in zip(train(kd, kd, slice(0, 4)), found[0]["cached"], strict=True):
        torch.testing.assert_close(shared, joined, atol=1e-5, rtol=1e-5)


def test_what_one_process_has_asked_the_other_finds(found):
    # Each process meets two samples in its first step, and the other's two in the second.
    for rank in found:
        assert rank["statistics"]["hits"] >= 4
        assert rank["hits of the other's"] == 2
