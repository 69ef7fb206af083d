import pytest
import torch

from kdnet.config import Config, TrainingConfig
from kdnet.errors import UserError
from kdnet.models import KDNet
from kdnet.runs.unit import launch
from kdnet.training.performance import (
    Stopwatch,
    check_precision,
    peak_memory,
    recommend,
    torch_format,
    unsafe_in_bf16,
)

NETWORK = KDNet(1, 2, channels=(2, 4, 8))


def test_depth_two_keeps_a_cpu_from_bf16():
    shape = (1, 1, 8, 8, 8)
    check_precision("32-true", "cpu", NETWORK, shape)
    check_precision("bf16-mixed", "cuda", NETWORK, shape)
    with pytest.raises(UserError, match=r"depth 2, as here: bottleneck.convolution"):
        check_precision("bf16-mixed", "cpu", NETWORK, shape)


def test_what_is_recommended_was_measured_and_leaves_the_network_alone():
    settings = TrainingConfig(accelerator="cpu")
    lines = recommend(settings, NETWORK, (1, 1, 16, 16, 16))
    assert len(lines) == 4 + 1
    fastest = lines[0].split("  ")[-1].split(", ")
    assert f"--precision {fastest[0]} --memory_format {fastest[1]}" in lines[-1]
    assert all(weight.grad is None for weight in NETWORK.parameters())


def test_memory_formats_are_those_of_volumes():
    assert torch_format("channels_last") is torch.channels_last_3d
    assert torch_format("channels_last", 2) is torch.channels_last
    assert torch_format("contiguous") is torch.contiguous_format


def test_layers_of_depth_two_are_found_and_the_network_left_as_it_was():
    network = KDNet(1, 2, channels=(2, 4, 8)).train()
    assert unsafe_in_bf16(network, (1, 1, 16, 8, 8)) == []
    found = ["bottleneck.convolution", "decoder.0.reduce.convolution"]
    assert unsafe_in_bf16(network, (1, 1, 8, 16, 16)) == found
    assert network.training
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_phases_add_up_also_after_an_exception():
    watch = Stopwatch({"teacher": 5.0})
    with pytest.raises(RuntimeError, match="stop"), watch.phase("teacher"):
        raise RuntimeError("stop")
    assert watch.seconds["teacher"] >= 5.0


def test_peak_memory_is_that_of_a_python_process():
    assert 20 < peak_memory()["process"] < 100_000


@pytest.mark.parametrize("given", [{"compile": True}, {"precision": "16-mixed"}])
def test_what_a_sharded_network_cannot_take_is_refused_before_any_process_starts(given):
    training = TrainingConfig(strategy="fsdp", accelerator="cpu", **given)
    with pytest.raises(UserError, match="neither --compile true nor --precision 16-mixed"):
        launch(Config(training=training))
