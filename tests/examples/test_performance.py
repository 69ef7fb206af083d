import pytest
import torch
from torch import nn

from errors import UserError
from models import KDNet
from training import performance
from training.performance import (
    Stopwatch,
    choose_memory_format,
    choose_precision,
    peak_memory,
    torch_format,
    unsafe_in_bf16,
)

NETWORK, SHAPE = KDNet(1, 2, channels=(2, 4, 8)), (1, 1, 16, 16, 16)


@pytest.mark.parametrize(("faster", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_cpu_takes_bf16_only_where_a_trial_shows_it_faster(monkeypatch, faster, precision):
    monkeypatch.setattr(performance, "_bf16_is_faster_on_cpu", lambda: faster)
    assert choose_precision("auto", "cpu", NETWORK, SHAPE) == precision


def test_a_given_precision_stays():
    assert choose_precision("32-true", "cpu", NETWORK, SHAPE) == "32-true"
    assert choose_precision("16-mixed", "cuda", NETWORK, SHAPE) == "16-mixed"


def test_depth_two_keeps_a_cpu_from_bf16(monkeypatch):
    monkeypatch.setattr(performance, "_bf16_is_faster_on_cpu", lambda: True)
    assert choose_precision("auto", "cpu", NETWORK, (1, 1, 8, 8, 8)) == "32-true"
    with pytest.raises(UserError, match=r"depth 2, as here: bottleneck.convolution"):
        choose_precision("bf16-mixed", "cpu", NETWORK, (1, 1, 8, 8, 8))


def test_layers_of_depth_two_are_found_and_the_network_left_as_it_was():
    network = KDNet(1, 2, channels=(2, 4, 8)).train()
    assert unsafe_in_bf16(network, (1, 1, 16, 8, 8)) == []
    found = ["bottleneck.convolution", "decoder.0.reduce.convolution"]
    assert unsafe_in_bf16(network, (1, 1, 8, 16, 16)) == found
    assert network.training
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_the_faster_memory_format_is_taken(monkeypatch):
    def seconds(network, image, *, precision):
        return 1.0 if image.is_contiguous(memory_format=torch.channels_last_3d) else 2.0

    monkeypatch.setattr(performance, "step_seconds", seconds)
    network = nn.Conv3d(2, 2, 3)
    chosen = choose_memory_format(
        "auto", network, (1, 2, 4, 4, 4), precision="32-true", device="cpu"
    )
    assert chosen == "channels_last"
    assert network.weight.is_contiguous()


def test_a_given_memory_format_needs_no_trial():
    for name in ("channels_last", "contiguous"):
        assert choose_memory_format(name, None, (), precision="32-true", device="cpu") == name
    assert torch_format("channels_last") is torch.channels_last_3d


def test_a_step_of_any_output_form_can_be_timed():
    class Forms(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv3d(1, 1, 1)

        def forward(self, image):
            return {"out": [self.convolution(image)]}

    network = Forms()
    assert performance.step_seconds(network, torch.zeros(1, 1, 2, 2, 2), precision="32-true") > 0
    assert network.convolution.weight.grad is None


def test_phases_add_up_also_after_an_exception():
    watch = Stopwatch({"teacher": 5.0})
    with pytest.raises(RuntimeError, match="stop"), watch.phase("teacher"):
        raise RuntimeError("stop")
    assert watch.seconds["teacher"] >= 5.0


def test_peak_memory_is_that_of_a_python_process():
    assert 20 < peak_memory()["process"] < 100_000
