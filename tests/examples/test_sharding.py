"""States of sharded networks, in a group of one process; two of them are in the training's test."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from kdnet.training.sharding import gathered, load_optimizer, load_weights, shard, whole

IMAGE = torch.arange(6.0).reshape(2, 3)


@pytest.fixture
def mesh(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/f", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1))
    distributed.destroy_process_group()


def trained(network):
    """A network after one step, and its optimizer."""
    optimizer = torch.optim.Adam(network.parameters())
    network(IMAGE).square().mean().backward()
    optimizer.step()
    return network, optimizer


def test_states_are_whole_and_those_of_a_network_that_is_not_sharded(mesh):
    plain = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    sharded = shard(copy.deepcopy(plain), mesh)
    for one, other in zip(trained(plain), trained(sharded), strict=True):
        torch.testing.assert_close(whole(other.state_dict()), whole(one.state_dict()))
    assert isinstance(sharded[0].weight, DTensor)


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


def test_in_the_block_weights_stay_whole_from_forward_to_forward(mesh):
    network = shard(nn.Linear(3, 2), mesh)
    with torch.no_grad(), gathered(network):
        network(IMAGE)
        assert not isinstance(network.weight, DTensor)
    assert isinstance(network.weight, DTensor)


def test_a_network_that_is_not_sharded_is_left_alone():
    network = nn.Linear(3, 2)
    with gathered(network):
        assert whole(network.state_dict())["weight"].data_ptr() == network.weight.data_ptr()
    # What PyTorch notes on a state: versions of the layers.
    assert whole(network.state_dict())._metadata == network.state_dict()._metadata
    assert whole({"list": [1, "text"], "none": None}) == {"list": [1, "text"], "none": None}


def test_a_network_without_a_group_is_not_sharded_in_silence():
    with pytest.raises(ValueError, match="process group"):
        shard(nn.Linear(3, 2), None)
