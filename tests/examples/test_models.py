import sys
from dataclasses import replace

import pytest
import torch
from quick import STUDENT
from torch import nn

from kdnet.errors import UserError
from kdnet.models import (
    KDNet,
    MultiResUNet,
    build_network,
    check_axes,
    chosen_arguments,
    with_known,
)
from kdnet.training.checkpoint import load_model, save_model


def parameters(network: nn.Module) -> int:
    return sum(weights.numel() for weights in network.parameters())


@pytest.mark.parametrize(("modalities", "count"), [(1, 14_490_664), (4, 14_493_094)])
def test_network_of_figure_one_has_the_published_number_of_parameters(modalities, count):
    assert parameters(KDNet(modalities, 4)) == count


def test_arguments_that_are_defaults_need_no_mention():
    paper = {"channels": [30, 60, 120, 240, 480]}
    assert chosen_arguments("kdnet", paper | {"prior": 0.01}) == {"prior": 0.01}
    assert chosen_arguments("kdnet", {"channels": [8, 16]}) == {"channels": [8, 16]}
    assert chosen_arguments("torch.nn.Linear", {"bias": True, "width": 3}) == {"width": 3}


def test_without_skip_connections_only_the_fusing_convolutions_shrink():
    with_skips = KDNet(1, 4, channels=(4, 8, 16), skip_connections=2)
    without = KDNet(1, 4, channels=(4, 8, 16), skip_connections=0)
    assert parameters(with_skips) - parameters(without) == 27 * (4 * 4 + 8 * 8)
    assert len(without.encoder) == len(with_skips.encoder)


@pytest.mark.parametrize("size", [(16, 16, 16), (17, 20, 23), (17, 20)])
def test_kdnet_keeps_any_size_and_has_the_last_width_at_the_coarsest(size):
    network, seen = KDNet(2, 3, channels=(2, 4, 8), spatial_dims=len(size)), []
    network.bottleneck.register_forward_hook(lambda *call: seen.append(call[2].shape))
    assert network(torch.zeros(1, 2, *size)).shape == (1, 3, *size)
    assert seen == [(1, 8, *(n // 4 for n in size))]


def test_with_a_prior_every_region_begins_with_about_that_share_of_voxels():
    plain, rare = (KDNet(1, 3, channels=(4, 8), prior=prior) for prior in (None, 0.01))
    image = torch.randn(2, 1, 8, 8, 8)
    shares = [network(image).sigmoid().mean().item() for network in (plain, rare)]
    assert 0.25 < shares[0] < 0.75
    assert 0.003 < shares[1] < 0.03
    exclusive = KDNet(1, 3, channels=(4, 8), prior=0.01, exclusive=True)
    background, *classes = exclusive(image).softmax(1).mean((0, 2, 3, 4)).tolist()
    assert background > 0.9
    assert all(0.003 < share < 0.03 for share in classes)
    with pytest.raises(UserError, match="prior"):
        build_network("kdnet", {"channels": [4, 8], "prior": 1}, in_channels=1, out_channels=3)


def test_single_voxel_at_the_bottleneck_is_refused_with_a_size_that_works():
    network = KDNet(1, 2, channels=(2, 4, 8))
    with pytest.raises(ValueError, match=r"at least 4 voxels along each axis and 8 along one"):
        network(torch.zeros(1, 1, 4, 4, 4))
    assert network(torch.zeros(1, 1, 8, 4, 4)).shape == (1, 2, 8, 4, 4)


@pytest.mark.parametrize(
    "network", [KDNet(1, 4, channels=(2, 4, 8)), MultiResUNet(1, 4, (4, 8, 16))]
)
def test_every_weight_receives_a_gradient(network):
    network(torch.randn(1, 1, 16, 16, 16)).square().mean().backward()
    assert all(weights.grad is not None for weights in network.parameters())


def test_multires_block_has_the_widths_of_the_original():
    block = MultiResUNet(1, 1).encoder[0]
    widths = [block.convolutions[i].convolution.out_channels for i in range(3)]
    assert widths == [8, 17, 26]  # 0.167, 0.333 and 0.5 of 1.67 * 32, rounded down
    assert block.out_channels == 51
    assert [len(path.convolutions) for path in MultiResUNet(1, 1).paths] == [4, 3, 2, 1]


def test_multiresunet_refuses_sizes_that_do_not_halve():
    with pytest.raises(ValueError, match="multiples of 4"):
        MultiResUNet(1, 1, (4, 8, 16))(torch.zeros(1, 1, 18, 16, 16))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("kdnet", {"channels": [4, 8]}),
        ("no_new_net", {"channels": [4, 8]}),
        ("multiresunet", {"filters": [4, 8]}),
        ("hemis", {"channels": [4, 8]}),
        ("uhved", {"channels": [4, 8]}),
        ("gated_fusion", {"channels": [4, 8], "style_channels": 2}),
        ("synthesis", {"segmenter_arguments": {"channels": [4, 8]}, "synthesised": 1}),
    ],
)
def test_every_built_in_network_comes_back_from_its_model_file(tmp_path, name, arguments):
    network = build_network(name, arguments, in_channels=3, out_channels=4).eval()
    view = {"in_channels": 3, "modalities": ("flair", "t1ce", "t2")}
    metadata = replace(STUDENT, backbone=name, backbone_arguments=arguments, **view)
    save_model(tmp_path / "model.safetensors", network, metadata)
    again, found = load_model(tmp_path / "model.safetensors")
    image = torch.randn(2, 3, 8, 8, 8)
    assert found == metadata
    assert not again.training
    assert torch.equal(again(image), network(image))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("kdnet", {"in_channels": 2}, "in_channels follow from"),
        ("resnet", {}, "expected one of kdnet, multiresunet, .*, or the import path"),
        ("no.such.Network", {}, "cannot be imported"),
        ("os.system", {}, "not a subclass of torch.nn.Module"),
        ("torch.nn.ReLU", {}, "no argument for its channels"),
        ("kdnet", {"width": 3}, "unexpected keyword argument 'width'"),
        ("kdnet", {"skip_connections": 9}, "0 to 4 skip connections, not 9"),
        ("kdnet", {"channels": [8]}, "two widths or more"),
        ("kdnet", {"spatial_dims": 4}, "spatial_dims is 2 or 3, not 4"),
        ("synthesis", {"synthesised": 0}, "synthesised is 1 or more, not 0"),
        ("synthesis", {"segmenter_arguments": {"width": 3}}, "'width'"),
        ("synthesis", {"segmenter": "gan"}, "Unknown network 'gan'"),
    ],
)
def test_unknown_networks_and_arguments_are_named(name, arguments, message):
    with pytest.raises(UserError, match=message):
        build_network(name, arguments, in_channels=1, out_channels=4)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("multiresunet", {}, {"spatial_dims": 2}),
        ("monai.networks.nets.SegResNet", {"norm": "x"}, {"norm": "x", "spatial_dims": 2}),
        ("kdnet", {"spatial_dims": 3}, {"spatial_dims": 3}),
        ("timm_unet", {}, {}),
    ],
)
def test_networks_that_know_two_dimensions_are_told_so(name, arguments, expected):
    assert with_known(name, arguments, spatial_dims=2) == expected


@pytest.mark.parametrize("axes", [2, 3])
def test_a_network_of_other_axes_is_refused(axes):
    network = KDNet(1, 2, channels=(2, 4), spatial_dims=5 - axes)
    with pytest.raises(UserError, match=f"{5 - axes}-D convolutions.* {axes}-D images.* --slices"):
        check_axes("net", network, axes)
    check_axes("net", network, 5 - axes)
    check_axes("net", nn.Linear(2, 2), axes)


def test_a_network_of_the_users_own_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "class Tiny(nn.Conv3d):\n"
        "    def __init__(self, in_channels, out_channels):\n"
        "        super().__init__(in_channels, out_channels, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert build_network("mynet.Tiny", {}, in_channels=1, out_channels=4).out_channels == 4
