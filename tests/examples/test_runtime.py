import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from versions import needs_fsdp

from kdnet.config import Config, TrainingConfig
from kdnet.errors import UserError
from kdnet.models import KDNet
from kdnet.runs.unit import launch
from kdnet.training import runtime
from kdnet.training.runtime import (
    check_precision,
    gathered,
    load_optimizer,
    load_weights,
    measure_steps,
    recommend,
    shard,
    timed,
    torch_format,
    unsafe_in_bf16,
    whole,
)

IMAGE = torch.arange(6.0).reshape(2, 3)


def test_depth_two_keeps_a_cpu_from_bf16():
    network, shape = KDNet(1, 2, channels=(2, 4, 8)), (1, 1, 8, 8, 8)
    check_precision("32-true", "cpu", network, shape)
    check_precision("bf16-mixed", "cuda", network, shape)
    with pytest.raises(UserError, match=r"depth 2, as here: bottleneck.convolution"):
        check_precision("bf16-mixed", "cpu", network, shape)


def test_layers_of_depth_two_are_found_and_the_network_left_as_it_was():
    network = KDNet(1, 2, channels=(2, 4, 8))
    assert unsafe_in_bf16(network, (1, 1, 16, 8, 8)) == []
    found = ["bottleneck.convolution", "decoder.0.reduce.convolution"]
    assert unsafe_in_bf16(network, (1, 1, 8, 16, 16)) == found
    assert network.training
    assert not any(module._forward_pre_hooks for module in network.modules())


class Forms(nn.Module):
    """Gives its logits in a list in a dictionary."""

    def __init__(self):
        super().__init__()
        self.convolution, self.dropout = nn.Conv3d(2, 1, 1), nn.Dropout()

    def forward(self, image):
        return {"out": [self.dropout(self.convolution(image))]}


def test_steps_of_any_network_are_measured_and_the_fastest_way_is_named(monkeypatch):
    monkeypatch.setattr(runtime, "_MEASURED_SECONDS", 0.01)
    network, state, shape = Forms(), torch.get_rng_state(), (1, 2, 4, 4, 4)
    seconds = measure_steps(network, shape, "cpu")
    assert len(seconds) == 4
    assert list(seconds.values()) == sorted(seconds.values())
    assert network.convolution.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    settings = TrainingConfig(accelerator="cpu")
    monkeypatch.setattr(runtime, "measure_steps", lambda *_: {("bf16-mixed", "channels_last"): 0.1})
    *_, advice = recommend(settings, network, shape)
    assert "--precision bf16-mixed --memory-format channels_last" in advice


def test_where_bf16_is_wrong_it_is_not_measured(monkeypatch):
    monkeypatch.setattr(runtime, "_MEASURED_SECONDS", 0.0)
    seconds = measure_steps(KDNet(1, 2, channels=(2, 4, 8)), (1, 1, 8, 8, 8), "cpu")
    assert {precision for precision, _ in seconds} == {"32-true"}


def test_memory_formats_are_those_of_volumes():
    assert torch_format("channels_last") is torch.channels_last_3d
    assert torch_format("channels_last", 2) is torch.channels_last


def test_phases_add_up_also_after_an_exception():
    seconds = {"teacher": 5.0}
    with pytest.raises(RuntimeError, match="stop"), timed(seconds, "teacher"):
        raise RuntimeError("stop")
    assert seconds["teacher"] > 5.0


@pytest.mark.parametrize("given", [{"compile": True}, {"precision": "16-mixed"}])
def test_what_a_sharded_network_cannot_take_is_refused_before_any_process_starts(given):
    training = TrainingConfig(strategy="fsdp", accelerator="cpu", **given)
    with pytest.raises(UserError, match="neither --compile true nor --precision 16-mixed"):
        launch(Config(training=training))


@pytest.fixture
def mesh(tmp_path):
    """A group of one process; two of them are in the training's test."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/f", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1))
    distributed.destroy_process_group()


def trained(network):
    """A network after one step, and its optimizer."""
    optimizer = torch.optim.Adam(network.parameters())
    network(IMAGE).square().mean().backward()
    optimizer.step()
    return network, optimizer


@needs_fsdp
def test_states_are_whole_and_those_of_a_network_that_is_not_sharded(mesh):
    plain = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    sharded = shard(copy.deepcopy(plain), mesh)
    for one, other in zip(trained(plain), trained(sharded), strict=True):
        torch.testing.assert_close(whole(other.state_dict()), whole(one.state_dict()))
    with torch.no_grad(), gathered(sharded):
        sharded(IMAGE)
        assert not isinstance(sharded[0].weight, DTensor)
    assert isinstance(sharded[0].weight, DTensor)


@needs_fsdp
def test_a_state_goes_back_into_its_parts(mesh):
    network, optimizer = trained(nn.Linear(3, 2))
    weights, moments = whole(network.state_dict()), whole(optimizer.state_dict())
    other = shard(nn.Linear(3, 2), mesh)
    other_optimizer = torch.optim.Adam(other.parameters(), lr=1.0)
    load_weights(other, weights)
    load_optimizer(other_optimizer, moments)
    assert isinstance(other_optimizer.state[other.weight]["exp_avg"], DTensor)
    torch.testing.assert_close(whole(other.state_dict()), weights)
    torch.testing.assert_close(whole(other_optimizer.state_dict()), moments)
