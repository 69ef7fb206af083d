"""Throughput of the distillation step in two processes, as a share of twice that of one.

Each process has one thread and its own batch; gradients are averaged by DDP over gloo. In every
round one process trains alone, then two train together, then two train without exchanging anything:
what the last lose, the machine takes (memory, caches, other work), not the exchange.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --rounds 20 --size 64 --channels 8 16 32 64 128 --batch 1
"""

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "brats_kdnet"))

from kdnet.models import KDNet  # noqa: E402
from privdistill import (  # noqa: E402
    DistillationWrapper,
    GroundTruth,
    LatentKL,
    PrivilegedInput,
    SoftTargetDiceBCE,
)

MODALITIES = ("flair", "t1", "t1ce", "t2")


def step_of(model: nn.Module, options: argparse.Namespace, seed: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(seed)
    size = (options.size,) * 3
    image = torch.randn(options.batch, len(MODALITIES), *size, generator=generator)
    target = torch.randint(0, 4, (options.batch, *size), generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def step() -> None:
        model(image, target).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def wrapper(options: argparse.Namespace) -> DistillationWrapper:
    torch.manual_seed(0)
    channels = tuple(options.channels)
    return DistillationWrapper(
        KDNet(4, 4, channels=channels),
        KDNet(1, 4, channels=channels),
        objective=0.75 * SoftTargetDiceBCE() + 0.25 * GroundTruth() + 10.0 * LatentKL(),
        inputs=PrivilegedInput(MODALITIES, student=("t1ce",)),
        example=torch.zeros(1, 4, *(options.size,) * 3),
    )


def speed(fabric: Fabric, step: Callable[[], None], options: argparse.Namespace) -> float:
    """Samples per second of this process; all begin together."""
    fabric.barrier()
    start = time.perf_counter()
    for _ in range(options.steps):
        step()
    return options.steps * options.batch / (time.perf_counter() - start)


def work(rank: int, port: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    alone = step_of(wrapper(options), options, rank)
    together = step_of(fabric.setup_module(wrapper(options)), options, rank)
    for step in (alone, together):
        step()
    rounds = []
    for _ in range(options.rounds):
        one = speed(fabric, alone if rank == 0 else lambda: None, options)
        two = speed(fabric, together, options)
        apart = speed(fabric, alone, options)
        both = fabric.all_reduce(torch.tensor([two, apart]), reduce_op="sum").tolist()
        rounds.append((one, *both))
    if rank == 0:
        report(rounds, options)
    torch.distributed.destroy_process_group()


def report(rounds: list[tuple[float, ...]], options: argparse.Namespace) -> None:
    one, two, apart = (statistics.median(values) for values in zip(*rounds, strict=True))
    shares = sorted(both / (2 * alone) for alone, both, _ in rounds)
    rest = len(shares) // 4
    found = {
        "samples_per_second_one_process": one,
        "samples_per_second_two_processes": two,
        "samples_per_second_two_without_exchange": apart,
        "share_of_ideal_median": statistics.median(shares),
        "share_of_ideal_quartiles": [shares[rest], shares[-1 - rest]],
        "share_without_exchange_median": statistics.median(n / (2 * one) for one, _, n in rounds),
        "exchange_share_median": statistics.median(two / apart for _, two, apart in rounds),
        "threads_per_process": 1,
        "torch": torch.__version__,
    } | {name: value for name, value in vars(options).items() if name != "out"}
    text = json.dumps(found, indent=2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="in each part of a round")
    parser.add_argument("--size", type=int, default=32, help="edge of the cubic patch, voxels")
    parser.add_argument("--channels", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--batch", type=int, default=2, help="of each process")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance" / "scaling.json")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(port, options), nprocs=2)


if __name__ == "__main__":
    main()
