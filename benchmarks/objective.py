"""Time and extra memory of the KD-Net objective, against the same one built from other libraries.

The other one takes MONAI's `DiceLoss`, torch's binary cross-entropy and torch's `kl_div`. Forward
and backward, from logits and features that are there already; both alternate in one process, and
only their ratio is reported. Memory is what the process grows by at its peak, each in a process of
its own.

    python benchmarks/objective.py
    python benchmarks/objective.py --sizes 2x4x64x64x64 --rounds 20 --json rows.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor

from memory import in_fresh_process, peak_growth
from privdistill import GroundTruth, LatentKL, SoftTargetDiceBCE, Step, TapPair

OURS = 0.75 * SoftTargetDiceBCE() + 0.25 * GroundTruth() + 10.0 * LatentKL()
HEADER = (
    "size              activation  threads  time, ms: ours  others  ratio (quartiles)"
    "    memory, MiB: ours  others  ratio"
)
ROW = (
    "{size:16}  {activation:10}  {threads:7}  {ms:14.1f}  {others_ms:6.1f}  "
    "{time_ratio:5.2f} ({low:.2f} to {high:.2f})  {mib:17.0f}  {others_mib:6.0f}  "
    "{memory_ratio:5.2f}"
)


def inputs(size: tuple[int, ...], activation: str) -> Step:
    """Make random logits, a bottleneck of the paper's size, and a reference."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(size, generator=generator, requires_grad=True)
    latent = torch.randn(size[0], 480, 4, 4, 4, generator=generator, requires_grad=True)
    classes = torch.randint(0, size[1], (size[0], *size[2:]), generator=generator)
    target = F.one_hot(classes, size[1]).movedim(-1, 1).float().contiguous()
    teacher = torch.randn(size, generator=generator)
    pair = TapPair(latent, torch.randn(latent.shape, generator=generator))
    return Step(
        student,
        teacher,
        target=target,
        taps={"bottleneck": pair},
        activation=activation,
        validate=False,
    )


def ours(step: Step) -> Tensor:
    """Equation (5) by this library."""
    return OURS(step)[0]


def theirs(step: Step) -> Tensor:
    """Equation (5) by MONAI's Dice and torch's cross-entropy and divergence."""
    softmax = step.activation == "softmax"
    dice = DiceLoss(softmax=softmax, sigmoid=not softmax)
    teacher, pair = step.teacher, step.taps["bottleneck"]
    if softmax:
        soft = (teacher / 5).softmax(1)
        hard = F.one_hot(teacher.argmax(1), teacher.shape[1]).movedim(-1, 1).float()
    else:
        soft, hard = (teacher / 5).sigmoid(), (teacher > 0).float()

    def bce(target: Tensor) -> Tensor:
        if softmax:
            return F.binary_cross_entropy(step.student.softmax(1), target)
        return F.binary_cross_entropy_with_logits(step.student, target)

    latent = F.kl_div(
        pair.student.flatten(1).log_softmax(1),
        pair.teacher.flatten(1).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    imitation = dice(step.student, soft) + bce(hard)
    supervised = dice(step.student, step.target) + bce(step.target)
    return 0.75 * imitation + 0.25 * supervised + 10 * latent


def seconds(loss: Callable[[Step], Tensor], step: Step) -> float:
    """Time one forward and backward pass."""
    step.student.grad = step.taps["bottleneck"].student.grad = None
    begin = time.perf_counter()
    loss(step).backward()
    return time.perf_counter() - begin


def peak(name: str, size: str, activation: str, threads: int) -> float:
    """Peak growth of a fresh process over one pass, in MiB."""
    options = ("--sizes", size, "--activation", activation, "--threads", str(threads))
    return in_fresh_process(__file__, "--only", name, *options, threads=threads)


def grown(name: str, step: Step) -> float:
    """Growth of this process's memory to its peak within one pass, in MiB."""
    loss = ours if name == "ours" else theirs
    # What is loaded and started in the first pass is no memory of the second one.
    seconds(loss, inputs((1, 2, 4, 4, 4), step.activation))
    return peak_growth(lambda: loss(step).backward())


def compare(size: str, activation: str, rounds: int, threads: int) -> dict[str, str | float]:
    """One row of the table: medians in ms, ratios, and peaks in MiB."""
    step = inputs(tuple(map(int, size.split("x"))), activation)
    for loss in (ours, theirs):
        seconds(loss, step)
    pairs = [(seconds(ours, step), seconds(theirs, step)) for _ in range(rounds)]
    low, ratio, high = statistics.quantiles([mine / other for mine, other in pairs], n=4)
    mine, other = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    memory, others = (peak(name, size, activation, threads) for name in ("ours", "theirs"))
    times = {"ms": mine, "others_ms": other, "time_ratio": ratio, "low": low, "high": high}
    memories = {"mib": memory, "others_mib": others, "memory_ratio": memory / others}
    return {"size": size, "activation": activation, "threads": threads, **times, **memories}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["2x4x64x64x64", "2x3x128x128x128"])
    parser.add_argument("--activation", choices=("softmax", "sigmoid"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the rows of the table")
    parser.add_argument("--only", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        size = tuple(map(int, options.sizes[0].split("x")))
        print(grown(options.only, inputs(size, options.activation)))
        return
    print(HEADER)
    rows = []
    for size in options.sizes:
        for activation in [options.activation] if options.activation else ("softmax", "sigmoid"):
            rows.append(compare(size, activation, options.rounds, options.threads))
            print(ROW.format(**rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
