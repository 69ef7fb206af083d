import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.testing._internal.two_tensor import TwoTensor

from privdistill.cache.fingerprint import Fingerprint, digest, hashed


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def current(*networks, asked="view t1"):
    return Fingerprint(networks).current(asked)


def test_every_weight_buffer_class_and_word_counts():
    assert current(network()) == current(network())
    changed = {"nothing": network(), "elsewhere": network().to("meta")}
    for name in ("0.weight", "0.bias", "1.running_mean", "1.num_batches_tracked"):
        changed[name] = network()
        changed[name].state_dict()[name].add_(1)
    changed["class"] = nn.Sequential(network()[0], nn.SyncBatchNorm(2))
    changed["dtype"] = network().double()
    changed["name"] = nn.Sequential(network())
    found = {current(net) for net in changed.values()}
    found |= {current(network(), asked="view t2"), current(network(), network())}
    assert len(found) == len(changed) + 2


def test_a_weight_that_changes_is_noticed():
    net = network()
    fingerprint = Fingerprint([net])
    before = fingerprint.current("")
    with torch.no_grad():
        net[0].weight[0] += 1
    assert fingerprint.current("") != before
    net.load_state_dict(network().state_dict())
    assert fingerprint.current("") == before
    net[0].weight.data = torch.zeros(2, 1, 1, 1)
    assert fingerprint.current("") != before


def test_weights_are_hashed_once(monkeypatch):
    fingerprint = Fingerprint([network()])
    before = fingerprint.current("")
    monkeypatch.setattr(nn.Module, "state_dict", None)
    assert fingerprint.current("") == before


def test_modes_gradients_layouts_and_moves_change_nothing():
    others = [network().eval(), network().requires_grad_(False), network().double().float()]
    others.append(network().to(memory_format=torch.channels_last))
    assert {current(net) for net in others} == {current(network())}


@pytest.mark.parametrize(
    "compiled",
    [
        torch.compile,
        lambda net: net.compile() or net,
        lambda net: nn.Sequential(torch.compile(net[0]), net[1]),
        lambda net: torch.compile(nn.Sequential(net[0], torch.compile(net[1]))),
    ],
)
def test_a_compiled_teacher_is_the_teacher(compiled):
    assert current(compiled(network())) == current(network())
    assert current(compiled(network(1))) != current(network())


def test_a_scripted_teacher_is_told_by_its_weights():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, same, other = (torch.jit.script(network(seed)) for seed in (0, 0, 1))
    assert current(first) == current(same) != current(other)


class Noted(nn.Module):
    """Keeps sets and addresses: as attributes, in its text and in its state."""

    def __init__(self, names="abcdefghij"):
        super().__init__()
        self.layer = network()
        self.names = set(names)
        self.anything = object()

    def extra_repr(self):
        return f"{self.names} {self.anything}"

    def get_extra_state(self):
        return {"names": self.names, "kinds": [frozenset(self.names)], "any": self.anything}

    def set_extra_state(self, state):
        self.names = state["names"]


def test_the_order_of_sets_and_addresses_change_nothing():
    one, other = Noted([0, 8]), Noted([8, 0])
    assert [*one.names] != [*other.names]
    assert current(one) == current(other)


@pytest.mark.slow
def test_every_process_takes_the_same_fingerprint():
    program = "from test_fingerprint import *; print(current(Noted()), current(quantised(0)))"
    # This process has another order of sets, drawn at random.
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert found == f"{current(Noted())} {current(quantised(0))}\n"


def quantised(seed):
    torch.manual_seed(seed)
    net = nn.ModuleList([nn.Linear(3, 4), nn.LSTM(4, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(net, {nn.Linear, nn.LSTM}, dtype=torch.qint8)


def test_quantised_teachers_are_told_by_their_packed_weights():
    assert current(quantised(0)) == current(quantised(0))
    linear, lstm = (quantised(0) for _ in range(2))
    linear[0], lstm[1] = quantised(1)[0], quantised(1)[1]
    assert len({current(net) for net in (quantised(0), linear, lstm)}) == 3


class Scaled(torch.Tensor):
    """Numbers in eight bits and a scale, without memory of its own, as quantisers make them."""

    @staticmethod
    def __new__(cls, levels, scale):
        del scale
        return torch.Tensor._make_wrapper_subclass(cls, levels.shape, dtype=torch.float32)

    def __init__(self, levels, scale):
        self.levels, self.scale = levels, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].levels, args[0].scale)
        raise NotImplementedError(func)


def holding(tensor):
    """A network whose weight, and whose buffer, are something else than plain numbers."""
    net = nn.Module()
    net.register_buffer("kept", tensor)
    if tensor.is_floating_point() and not tensor.is_quantized:
        net.weight = nn.Parameter(tensor, requires_grad=False)
    return net


def per_tensor(value, scale=0.1):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.full((2, 3), value), scale, 0, torch.qint8)


UNUSUAL = {
    "wrapped": lambda v: Scaled(torch.full((3,), int(v), dtype=torch.int8), torch.ones(1)),
    "scaled": lambda v: Scaled(torch.ones(3, dtype=torch.int8), torch.full((1,), v)),
    "nested": lambda v: TwoTensor(torch.ones(2), TwoTensor(torch.ones(2), torch.full((2,), v))),
    "quantised": per_tensor,
    "quantised by another scale": lambda v: per_tensor(v, v / 10),
    "sparse": lambda v: (torch.eye(3) * v).to_sparse(),
    "expanded": lambda v: torch.full((1,), v).expand(5),
    "strided": lambda v: torch.arange(6.0).reshape(2, 3).T * v,
    "bfloat16": lambda v: torch.full((2,), v, dtype=torch.bfloat16),
    "empty": lambda v: torch.zeros(0, int(v)),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_tensors_of_every_kind_are_told_by_their_numbers(kind):
    first, same, other = (holding(UNUSUAL[kind](value)) for value in (1.0, 1.0, 2.0))
    assert current(first) == current(same) != current(other)


def test_weights_made_under_inference_mode_are_hashed():
    with torch.inference_mode():
        net = network()
    assert current(net) == current(network())


def distance(one, other):
    """How far two digests are apart, as a share of the image's norm."""
    return ((one - other).abs().max() / one[0, 0]).item()


def test_numbers_side_by_side_are_told_apart():
    assert hashed([1, 23]) != hashed([12, 3])
    assert hashed(["a", "b"]) != hashed(["ab", ""])
    assert hashed([[1], 2]) != hashed([1, [2]])


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 3, 9, 7), (2, 3, 9, 7, 5), (1, 1, 200, 2, 2)])
def test_digests_do_not_depend_on_the_memory_layout(shape):
    view = torch.rand(shape)
    other = view.movedim(1, -1).contiguous().movedim(-1, 1)
    assert len(digest(other)) == shape[0]
    assert distance(digest(view)[:1], digest(other)[:1]) < 1e-6


CHANGES = {
    "flip of axis 0": lambda v: v.flip(2),
    "flip of axis 1": lambda v: v.flip(3),
    "flip of axis 2": lambda v: v.flip(4),
    "noise": lambda v: v + 0.02 * torch.randn_like(v),
    "contrast": lambda v: v * 1.05,
    "shift by one voxel": lambda v: v.roll(1, 4),
    "a hole of 8 voxels a side": lambda v: v.clone().index_fill_(2, torch.arange(9, 17), 0.0),
    "other modalities": lambda v: v.flip(1),
    "one voxel": lambda v: v.index_put(
        [torch.tensor(i) for i in (0, 0, 9, 9, 9)], torch.tensor(2.0)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_digests_tell_another_input(change):
    axis = torch.linspace(-1, 1, 32)
    ball = (1 - axis[:, None, None] ** 2 - axis[:, None] ** 2 - axis**2).clamp_min(0)
    view = torch.stack((ball * (1 + 0.3 * axis), ball**2 + 0.1 * axis[:, None, None]))[None]
    view += 0.05 * torch.randn_like(view)
    assert distance(digest(view), digest(CHANGES[change](view))) > 1e-3


@pytest.mark.parametrize("missing", [float("nan"), float("inf")])
def test_digests_see_what_surrounds_missing_values(missing):
    view = torch.rand(1, 1, 8, 8)
    view[..., 3] = missing
    other = view.clone()
    assert distance(digest(view), digest(other)) == 0
    other[..., 5] += 1
    assert distance(digest(view), digest(other)) > 1e-3
    assert distance(digest(view), digest(view.roll(1, 3))) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_digests_are_taken_of_every_precision_under_autocast_too(dtype):
    view = torch.randint(0, 9, (1, 2, 8, 8)).to(dtype)
    with torch.autocast("cpu"):
        found = digest(view)
    assert distance(found, digest(view.float())) < 1e-6
