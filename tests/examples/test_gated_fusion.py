import pytest
import torch

from kdnet.models import GatedFusionNet
from kdnet.models.gated_fusion import GatedFusion, modulate


def small(**options):
    usual = {"style_channels": 2, "code": 3, "blocks": 1, "dropout": 0.0}
    return GatedFusionNet(3, 2, (4, 4, 8), **usual | options)


def test_modulation_replaces_mean_and_deviation():
    features = torch.tensor([1.0, 3.0]).reshape(1, 1, 2, 1)
    styled = modulate(features, torch.tensor([[10.0]]), torch.tensor([[5.0]]))
    assert torch.allclose(styled.flatten(), torch.tensor([-5.0, 15.0]), atol=1e-3)
    voxel = torch.full((1, 1, 1, 1, 1), 2.0)
    assert modulate(voxel, torch.tensor([[10.0]]), torch.tensor([[5.0]])).item() == 25.0


def test_gates_weigh_each_modality_voxel_by_voxel():
    fusion, seen = GatedFusion(2, 4, 3), []
    fusion.gates.register_forward_hook(lambda *call: seen.append(call[2]))
    fusion(torch.randn(1, 2, 4, 3, 3, 3), torch.tensor([[True, True]]))
    (gates,) = seen
    assert gates.shape == (1, 2, 3, 3, 3)
    assert ((gates > 0) & (gates < 1)).all()


def test_an_absent_modality_has_no_influence_even_where_its_content_is_not_finite():
    fusion, contents = GatedFusion(2, 4, 3), torch.randn(1, 2, 4, 3, 3, 3)
    present = torch.tensor([[True, False]])
    before = fusion(contents, present)
    contents[:, 1] = float("nan")
    assert torch.equal(fusion(contents, present), before)


def test_widths_are_the_published_ones():
    network = GatedFusionNet(4, 4)
    contents = [level.third[0].out_channels for level in network.encoders[0].levels]
    assert contents == [16, 32, 64, 128]
    style = network.reconstructors[0].style
    assert (style.mean.out_features, style.log_variance.out_features) == (128, 128)
    assert len(network.reconstructors[0].blocks) == 4
    appearance = [part.out_channels for part in network.appearances[0] if hasattr(part, "stride")]
    assert appearance == [32, 64, 128, 128, 128, 8]


def test_train_mode_returns_what_its_loss_needs_and_eval_mode_logits():
    network, image = small(), torch.randn(2, 3, 8, 8, 8)
    output = network(image)
    assert {name: tuple(value.shape) for name, value in output.items()} == {
        "out": (2, 2, 8, 8, 8),
        "reconstruction": (2, 3, 8, 8, 8),
        "style_mean": (2, 3, 8),
        "style_log_variance": (2, 3, 8),
        "present": (2, 3),
    }
    assert network.eval()(image).shape == (2, 2, 8, 8, 8)


def test_segmentation_does_not_see_the_appearance():
    network, image = small(), torch.randn(1, 3, 8, 8, 8)
    network(image)["out"].square().mean().backward()
    assert all(weights.grad is None for weights in network.appearances.parameters())
    assert all(weights.grad is None for weights in network.reconstructors.parameters())


def test_a_modality_that_was_not_drawn_is_reconstructed_from_the_content_of_others():
    network, seen = small(), []
    network.bottleneck.register_forward_hook(lambda *call: seen.append(call[1][1]))
    image = torch.randn(8, 3, 8, 8, 8)
    output = network(image)
    dropped = ~seen[0][:, 1]
    assert dropped.any()
    output["reconstruction"][dropped][:, 1].square().sum().backward()
    assert any(weights.grad.any() for weights in network.appearances[1].parameters())
    assert any(weights.grad.any() for weights in network.encoders[0].parameters())
    assert all(not weights.grad.any() for weights in network.encoders[1].parameters())


def test_the_encoder_of_an_absent_modality_gets_no_gradient():
    network, image = small(), torch.randn(2, 3, 8, 8, 8)
    image[:, 1] = 0
    network(image)["out"].square().mean().backward()
    assert all(not weights.grad.any() for weights in network.encoders[1].parameters())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("size", [(4, 4, 4), (9, 6, 13)])
def test_any_size_and_no_modality_at_all_give_finite_numbers(mode, size):
    network = small().train(mode)
    for image in (torch.zeros(1, 3, *size), torch.randn(1, 3, *size)):
        output = network(image)
        values = output.values() if mode else [output]
        assert all(torch.isfinite(value).all() for value in values)
        assert (output["reconstruction"] if mode else output).shape[2:] == size


def test_every_weight_receives_a_gradient_from_the_whole_loss():
    network, image = small(), torch.randn(1, 3, 8, 8, 8)
    output = network(image)
    sum(value.square().mean() for name, value in output.items() if name != "present").backward()
    assert all(weights.grad is not None for weights in network.parameters())


def test_it_works_in_two_dimensions():
    network = GatedFusionNet(2, 3, (4, 8), style_channels=2, spatial_dims=2)
    assert network(torch.randn(1, 2, 8, 6))["reconstruction"].shape == (1, 2, 8, 6)
