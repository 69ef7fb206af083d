import torch
from torch import nn

from privdistill.cache.fingerprint import Fingerprint, written


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def current(network, description="view t1"):
    return Fingerprint([network], description).current()


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
    fingerprint = Fingerprint([net], "")
    before = fingerprint.current()
    with torch.no_grad():
        net[0].weight[0] += 1
    assert fingerprint.current() != before
    with torch.no_grad():
        net[0].weight[0] -= 1
    net.load_state_dict(network().state_dict())
    assert fingerprint.current() == before


def test_weights_are_hashed_once(monkeypatch):
    fingerprint = Fingerprint([network()], "")
    fingerprint.current()
    monkeypatch.setattr(fingerprint, "_hashed", lambda _tensors: "hashed again")
    assert fingerprint.current() != "hashed again"


def test_a_moved_teacher_keeps_its_fingerprint():
    net = network()
    fingerprint = Fingerprint([net], "")
    before = fingerprint.current()
    net.to(torch.float64).to(torch.float32)
    assert fingerprint.current() == before


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_another_forward_of_the_same_weights_counts():
    plain, scaled = nn.Conv2d(1, 1, 1), Scaled(1, 1, 1)
    scaled.load_state_dict(plain.state_dict())
    before = current(scaled)
    Scaled.forward = lambda self, x: 3 * nn.Conv2d.forward(self, x)
    assert current(scaled) != before
    assert current(scaled) != current(plain)


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
    assert written(None) == "None"
