"""Runs on the meta device: whatever would stay on the CPU beside a GPU is found without one."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from privdistill import (
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
META = torch.device("meta")


class NoStrays(TorchDispatchMode):
    """Refuse operations on tensors of two devices, which a GPU would refuse or wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {t.device.type for t in found}
        copies = func.overloadpacket.__name__ in ("copy_", "_to_copy")
        assert len(devices) < 2 or copies, f"{func} mixes {devices}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def meta(tiny_unet, build):
    def make(**options):
        options = {"teacher": tiny_unet(4), "student": tiny_unet(1)} | options
        return build(**options).to(META)

    return make


def run(kd, target=None, **options):
    """A step, its backward pass and an optimizer step; every tensor must be on meta."""
    image = torch.zeros(2, 4, 8, 8, device=META)
    if target is None:
        target = torch.zeros(2, 8, 8, dtype=torch.long, device=META)
    with NoStrays():
        out = kd(image, target, **options)
        out.loss.backward()
        prediction = kd.predict(image)
    torch.optim.SGD(kd.parameters(), lr=0.1).step()
    tensors = [
        leaf for leaf in tree_leaves((tuple(out), prediction)) if isinstance(leaf, torch.Tensor)
    ]
    assert {t.device.type for t in tensors} == {"meta"}
    return out


OBJECTIVES = {
    "kd-net": SoftTargetDiceBCE() + GroundTruth() + 10 * LatentKL(),
    "options": GroundTruth(squared_denominator=True, batch_dice=True, include_background=False)
    + SoftTargetDiceBCE(temperature=1.0),
    **{
        name: 1.0 * LatentKL(normalisation=name)
        for name in ("softmax", "softmax_channel", "softmax_spatial", "l1")
    },
}


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_term_runs_where_its_inputs_are(meta, objective, activation):
    hot = torch.zeros(2, 3, 8, 8, device=META)
    run(meta(objective=OBJECTIVES[objective], activation=activation), target=hot)


def test_label_maps_run_where_they_are(meta):
    run(meta())


class Deep(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        out = self.net(x)
        return [out, nn.functional.avg_pool2d(out, 2)]


VARIANTS = {
    "adapter": lambda unet: {"teacher": unet(4, width=6)},
    "two teachers": lambda unet: {"teacher": [unet(4), unet(4)]},
    "heads": lambda unet: {"student": Deep(unet(1))},
    "average": lambda unet: {
        "teacher": MovingAverage(),
        "inputs": PrivilegedInput(NAMES, student=("t1",), teacher=("t1",)),
    },
    "joint": lambda unet: {
        "teacher": JointTeacher(unet(4)),
        "objective": GroundTruth() + GroundTruth(of="teacher") + LatentKL(),
    },
    "dropout": lambda unet: {
        "student": unet(4),
        "inputs": PrivilegedInput(NAMES, student=NAMES, dropout=0.5),
    },
    "input of a layer": lambda unet: {
        "taps": {"bottleneck": Tap(Layer("up", at="input"), Layer("up", at="input"))}
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_path_of_the_wrapper_runs_where_its_inputs_are(meta, tiny_unet, variant):
    run(meta(**VARIANTS[variant](tiny_unet)))


def test_presence_masks_run_where_they_are(meta):
    run(meta(), present=torch.ones(2, 4, dtype=torch.bool, device=META))


def test_copies_and_checkpoints_run_where_they_are(meta):
    kd = meta()
    run(copy.deepcopy(kd))
    kd.load_state_dict(kd.state_dict())
    run(kd)


def test_networks_built_on_the_device_are_wrapped_there(tiny_unet, build):
    with META:
        kd = build(teacher=tiny_unet(4), student=tiny_unet(1))
    run(kd)
