import os
import subprocess
import sys

import torch
from torch import nn

from privdistill.cache.fingerprint import Fingerprint, written


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def current(network, asked="view t1"):
    return Fingerprint([network]).current(asked)


def test_equal_weights_have_equal_fingerprints():
    assert current(network()) == current(network())


def test_every_weight_buffer_layer_and_word_counts():
    changed = {"nothing": network()}
    for name in ("0.weight", "0.bias", "1.running_mean", "1.num_batches_tracked"):
        changed[name] = network()
        changed[name].state_dict()[name].add_(1)
    changed["layer"] = nn.Sequential(network()[0], nn.BatchNorm2d(2, eps=1e-3))
    changed["dtype"] = network().double()
    found = {current(net) for net in changed.values()} | {current(network(), "view t2")}
    assert len(found) == len(changed) + 1


def test_a_weight_that_changes_is_noticed():
    net = network()
    fingerprint = Fingerprint([net])
    before = fingerprint.current("")
    with torch.no_grad():
        net[0].weight[0] += 1
    assert fingerprint.current("") != before
    with torch.no_grad():
        net[0].weight[0] -= 1
    net.load_state_dict(network().state_dict())
    assert fingerprint.current("") == before


def test_weights_are_hashed_once(monkeypatch):
    fingerprint = Fingerprint([network()])
    before = fingerprint.current("")
    monkeypatch.setattr(fingerprint, "_hashed", lambda _tensors: "hashed again")
    assert fingerprint.current("") == before


def test_a_moved_teacher_keeps_its_fingerprint():
    net = network()
    fingerprint = Fingerprint([net])
    before = fingerprint.current("")
    net.to(torch.float64).to(torch.float32)
    assert fingerprint.current("") == before


class Scaled(nn.Module):
    def __init__(self, scale=1.0, act=torch.relu):
        super().__init__()
        self.layer, self.scale, self.act = network(), scale, act

    def forward(self, x):
        return self.act(self.layer(x)) * self.scale


def doubled(self, x):
    return 2 * self.layer(x)


def test_what_is_no_weight_counts_too():
    hooked, replaced = Scaled(), Scaled()
    hooked.layer[0].register_forward_hook(lambda _m, _i, out: 2 * out)
    replaced.forward = doubled.__get__(replaced)
    others = [Scaled(5.0), Scaled(act=torch.tanh), Scaled(torch.tensor(5.0)), hooked, replaced]
    assert len({current(net) for net in (Scaled(), *others)}) == 6
    assert current(Scaled()) == current(Scaled())


def test_sets_in_code_do_not_depend_on_the_process():
    program = (
        "from privdistill.cache.fingerprint import written\n"
        "print(written(lambda m: m in {'up', 'down', 'left', 'right'} and [i for i in m]))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(seen) == 1


def test_addresses_in_memory_do_not_count():
    class Named(nn.Module):
        def extra_repr(self):
            return repr(object())

    assert current(Named()) == current(Named())


def choose(index):
    return lambda output: output[index]


def test_functions_are_told_apart_by_what_they_do():
    assert written(choose(0)) == written(choose(0))
    assert written(choose(0)) != written(choose(1))
    assert written(None) == written(None) != written(choose(0))
    assert written(Pick("a")) != written(Pick("b"))
    assert written(Pick("a").__call__) != written(Pick("b").__call__)


class Pick:
    def __init__(self, name):
        self.name = name

    def __call__(self, output):
        return output[self.name]
