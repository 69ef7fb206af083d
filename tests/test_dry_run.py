import torch
from torch import nn

from privdistill.sides import trial
from privdistill.step import find_heads
from privdistill.taps.recorder import Recorder


def noisy():
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(), nn.ReLU(inplace=True))


def test_modes_buffers_and_random_state_are_restored():
    net = noisy()
    net[2].eval()
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    state = torch.get_rng_state()
    recorder = Recorder(net, {}, role="student")
    trial.run(net, torch.ones(1, 1, 4, 4), recorder, find_heads, training=True)
    assert [module.training for module in net] == [True, True, False, True]
    assert all(torch.equal(value, buffers[name]) for name, value in net.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_overwritten_in_place_are_marked_for_cloning():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True))
    recorder = Recorder(net, {"a": "0", "b": "1"}, role="student")
    trial.run(net, torch.ones(1, 1, 4, 4), recorder, find_heads)
    assert recorder.cloned == {"a"}


def test_batch_norm_on_single_voxels_survives_a_batch_of_one():
    net = nn.Sequential(nn.Conv2d(1, 2, 4), nn.BatchNorm2d(2))
    recorder = Recorder(net, {}, role="student")
    found = trial.run(net, torch.ones(1, 1, 4, 4), recorder, find_heads, training=True)
    assert [head.shape for head in found.heads] == [(2, 2, 1, 1)]


def test_the_example_follows_the_network_in_dtype():
    net = nn.Conv2d(1, 2, 1).double()
    recorder = Recorder(net, {}, role="student")
    (head,) = trial.run(net, torch.ones(1, 1, 4, 4), recorder, find_heads).heads
    assert (head.shape, head.dtype) == ((1, 2, 4, 4), torch.float64)


def test_a_replaced_buffer_is_put_back():
    class Counter(nn.Conv2d):
        def __init__(self):
            super().__init__(1, 2, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x)

    net = Counter()
    calls = net.calls
    trial.run(net, torch.ones(1, 1, 4, 4), Recorder(net, {}, role="student"), find_heads)
    assert net.calls is calls
    assert net.calls == 0
