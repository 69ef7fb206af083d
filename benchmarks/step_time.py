"""Time of a distillation step with the wrapper, as a ratio to the same step written by hand.

Both loops train copies of one small 3-D U-Net on one batch with the same objective; they take turns
within each round, the one that starts alternates, and the ratio is that of each round's pair.

    python benchmarks/step_time.py --rounds 40
    python benchmarks/step_time.py --rounds 400 --size 8 --width 2     # overhead in microseconds
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from privdistill import (
    DistillationWrapper,
    GroundTruth,
    LatentKL,
    PrivilegedInput,
    SoftTargetDiceBCE,
)
from privdistill.output import Step, TapPair

MODALITIES = ("flair", "t1", "t1ce", "t2")
Train = Callable[[], float]


class UNet(nn.Module):
    """Three levels, instance norm, skip connections."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.stem = block(in_channels, width)
        self.middle = nn.Sequential(nn.MaxPool3d(2), block(width, 2 * width))
        self.bottleneck = nn.Sequential(nn.MaxPool3d(2), block(2 * width, 4 * width))
        self.up = nn.Upsample(scale_factor=2, mode="trilinear")
        self.decoders = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.head = nn.Conv3d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = self.middle(fine)
        x = self.decoders[0](torch.cat((coarse, self.up(self.bottleneck(coarse))), 1))
        return self.head(self.decoders[1](torch.cat((fine, self.up(x)), 1)))


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, padding=1), nn.InstanceNorm3d(outputs), nn.LeakyReLU()
    )


def objective() -> nn.Module:
    return 0.75 * SoftTargetDiceBCE(temperature=5.0) + 0.25 * GroundTruth() + 10.0 * LatentKL()


def by_hand(teacher: nn.Module, student: nn.Module, image: Tensor, target: Tensor) -> Train:
    """Two plain hooks and no library around the forward passes."""
    teacher.eval().requires_grad_(False)
    features: dict[str, Tensor] = {}
    teacher.bottleneck.register_forward_hook(lambda _m, _i, o: features.update(teacher=o))
    student.bottleneck.register_forward_hook(lambda _m, _i, o: features.update(student=o))
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    loss_of = objective()

    def step() -> float:
        with torch.no_grad():
            soft = teacher(image)
        logits = student(image[:, 2:3])
        taps = {"bottleneck": TapPair(features.pop("student"), features.pop("teacher"))}
        loss, _ = loss_of(Step(logits, soft, target, taps, validate=False))
        return finish(loss, optimizer)

    return step


def with_wrapper(teacher: nn.Module, student: nn.Module, image: Tensor, target: Tensor) -> Train:
    kd = DistillationWrapper(
        teacher,
        student,
        objective=objective(),
        inputs=PrivilegedInput(MODALITIES, student=("t1ce",)),
        example=image[:1],
    )
    optimizer = torch.optim.Adam(kd.parameters(), 1e-3)
    return lambda: finish(kd(image, target).loss, optimizer)


def finish(loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def seconds(step: Train) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(rounds: int, size: int, width: int) -> dict[str, float]:
    torch.manual_seed(0)
    teacher, student = UNet(4, width), UNet(1, width)
    image = torch.randn(2, 4, size, size, size)
    target = torch.randint(0, 4, (2, size, size, size))
    hand = by_hand(copy.deepcopy(teacher), copy.deepcopy(student), image, target)
    wrapped = with_wrapper(teacher, student, image, target)
    for _ in range(3):
        torch.testing.assert_close(hand(), wrapped(), atol=1e-5, rtol=1e-5)
    pairs = []
    for number in range(rounds):
        order = (hand, wrapped) if number % 2 else (wrapped, hand)
        times = {step: seconds(step) for step in order}
        pairs.append((times[wrapped], times[hand]))
    ratios = sorted(mine / theirs for mine, theirs in pairs)
    extra = statistics.median(mine - theirs for mine, theirs in pairs)
    return {
        "ratio_median": statistics.median(ratios),
        "ratio_quartile_low": ratios[rounds // 4],
        "ratio_quartile_high": ratios[(3 * rounds) // 4],
        "extra_microseconds_median": extra * 1e6,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--size", type=int, default=32, help="edge of the cubic patch, voxels")
    parser.add_argument("--width", type=int, default=8, help="channels of the first level")
    options = parser.parse_args()
    print(json.dumps(measure(options.rounds, options.size, options.width), indent=2))


if __name__ == "__main__":
    main()
