"""Every path through the wrapper, for tests that run all of them compiled, cast or elsewhere."""

import torch
from torch import nn

from privdistill import (
    Ensemble,
    GroundTruth,
    JointTeacher,
    LatentKL,
    Layer,
    MovingAverage,
    PrivilegedInput,
    SoftTargetDiceBCE,
    Tap,
)

NAMES = ("flair", "t1", "t1ce", "t2")
ONE = PrivilegedInput(NAMES, student=("t1ce",), teacher=("t1ce",))
EVERY = PrivilegedInput(NAMES, student=NAMES)
KL = ("softmax", "softmax_channel", "softmax_spatial")

_random = torch.Generator().manual_seed(0)
IMAGE = torch.randn(2, 4, 8, 8, generator=_random)
LABELS = torch.randint(0, 3, (2, 8, 8), generator=_random)
HOT = nn.functional.one_hot(LABELS, 3).movedim(-1, 1).float()
PRESENT = torch.tensor([[True, False, True, True], [True, True, True, False]])


class Deep(nn.Module):
    """Heads at two resolutions, in train mode."""

    def __init__(self, net):
        super().__init__()
        self.net, self.coarse = net, nn.Conv2d(8, 3, 1)

    def forward(self, x):
        skip = self.net.encoder(x)
        bottom = self.net.bottleneck(self.net.down(skip))
        fine = self.net.head(torch.cat((skip, self.net.up(bottom)), dim=1))
        return [fine, self.coarse(bottom)] if self.training else fine


class Stages(nn.Module):
    """An encoder that returns all its stages."""

    def __init__(self, net):
        super().__init__()
        self.encoder, self.down, self.bottleneck = net.encoder, net.down, net.bottleneck

    def forward(self, x):
        skip = self.encoder(x)
        return [skip, self.bottleneck(self.down(skip))]


class Staged(nn.Module):
    """The same network around such an encoder."""

    def __init__(self, net):
        super().__init__()
        self.stages, self.up, self.head = Stages(net), net.up, net.head

    def forward(self, x):
        skip, bottom = self.stages(x)
        return self.head(torch.cat((skip, self.up(bottom)), dim=1))


def both(layer):
    return Tap(layer, layer)


# What differs from the usual wrapper; `unet` makes a network of so many channels.
PATHS = {
    "usual": lambda unet: {},
    "sigmoid": lambda unet: {"activation": "sigmoid"},
    "options": lambda unet: {
        "objective": SoftTargetDiceBCE(include_background=False)
        + GroundTruth(squared_denominator=True, batch_dice=True, include_background=False)
    },
    "adapter": lambda unet: {"teacher": unet(4, width=6)},
    "several taps": lambda unet: {
        "teacher": unet(4, width=6),
        "taps": {name: both(name) for name in ("encoder", "down", "bottleneck")},
        "objective": GroundTruth() + LatentKL() + LatentKL("encoder") + LatentKL("down"),
    },
    "normalisations": lambda unet: {
        "taps": {name: both("bottleneck") for name in KL},
        "objective": sum((LatentKL(name, normalisation=name) for name in KL), 1.0 * GroundTruth()),
    },
    "l1": lambda unet: {"objective": GroundTruth() + LatentKL(normalisation="l1")},
    "input of a layer": lambda unet: {"taps": {"bottleneck": both(Layer("up", at="input"))}},
    "entry of a list": lambda unet: {
        "teacher": Staged(unet(4)),
        "student": Staged(unet(1)),
        "taps": {"bottleneck": both(Layer("stages", select=-1))},
    },
    "heads": lambda unet: {"student": Deep(unet(1))},
    "ensemble": lambda unet: {
        "teacher": Ensemble([unet(4), unet(4)], weights=[3, 1]),
        "taps": {"bottleneck": Tap(Layer("bottleneck", network=1), "bottleneck")},
    },
    "average": lambda unet: {"teacher": MovingAverage(0.5), "inputs": ONE},
    "joint": lambda unet: {
        "teacher": JointTeacher(unet(4)),
        "objective": GroundTruth() + GroundTruth(of="teacher").named("teacher") + LatentKL(),
    },
    "no teacher": lambda unet: {"teacher": None, "objective": GroundTruth()},
}


def all_at_once(unet):
    """Options of a wrapper with adapters, which looks at layers in every way."""
    taps = {
        "bottleneck": both(Layer("stages", select=-1)),
        "encoder": both("stages.encoder"),
        "down": both("stages.down"),
        "up": both(Layer("up", at="input")),
    }
    kinds = zip(taps, (*KL, "l1"), strict=True)
    terms = [LatentKL(name, normalisation=kind) for name, kind in kinds]
    supervised = GroundTruth(squared_denominator=True, batch_dice=True, include_background=False)
    return {
        "teacher": Staged(unet(4, width=6)),
        "student": Staged(unet(1)),
        "taps": taps,
        "objective": sum(terms, SoftTargetDiceBCE(include_background=False) + supervised),
    }


def target(kd):
    """Labels where classes exclude each other, else one channel per region."""
    return LABELS if kd.activation == "softmax" else HOT


def trained(kd):
    """All that learns: the student, adapters, and a teacher that is trained too."""
    return [p for p in kd.parameters() if p.requires_grad]


def train(kd, run=None, *, device="cpu", steps=3, dtype=torch.float32, **options):
    """Losses of a few steps, and the last gradients; `run` is what stands for the wrapper."""
    run = kd if run is None else run
    image, reference = IMAGE.to(device, dtype), target(kd).to(device)
    optimizer = torch.optim.SGD(trained(kd), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = run(image, reference, **options).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in trained(kd))]


def assert_close(found, wanted, tolerance=1e-5):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), atol=tolerance, rtol=tolerance)
