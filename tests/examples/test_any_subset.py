"""HeMIS, U-HVED and gated fusion: what networks for any subset of modalities have in common."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from kdnet.models import UHVED, GatedFusionNet, HeMIS
from kdnet.models.gated_fusion import GatedFusion, modulate
from kdnet.models.hemis import Moments
from kdnet.models.uhved import Gaussian, divergence, multiply, read_evidence, subset_divergence


def gated(modalities=3, **options):
    usual = {"style_channels": 2, "code": 3, "blocks": 1, "dropout": 0.0}
    return GatedFusionNet(modalities, 2, (4, 4, 8), **usual | options)


NETWORKS = {
    "hemis": lambda **options: HeMIS(3, 2, (4, 8, 8), **options),
    "uhved": lambda **options: UHVED(3, 2, (4, 8, 8), **options),
    "gated_fusion": lambda **options: gated(3, **options),
}
#: What is returned beside logits in train mode, for a batch of two.
RETURNED = {
    "hemis": {},
    "uhved": {"reconstruction": (2, 3, 8, 8, 8), "divergence": (2,), "present": (2, 3)},
    "gated_fusion": {
        "reconstruction": (2, 3, 8, 8, 8),
        "style_mean": (2, 3, 8),
        "style_log_variance": (2, 3, 8),
        "present": (2, 3),
    },
}


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


@pytest.fixture
def small(name):
    return NETWORKS[name]


def values(output):
    """All that a network returned, by name."""
    return output if isinstance(output, dict) else {"out": output}


def test_train_mode_returns_what_its_loss_needs_and_eval_mode_logits(small, name):
    network, image, seen = small(), torch.randn(2, 3, 8, 8, 8), []
    network.bottleneck.register_forward_hook(lambda *call: seen.append(call[2].shape[2:]))
    shapes = {key: tuple(value.shape) for key, value in values(network(image)).items()}
    assert shapes == {"out": (2, 2, 8, 8, 8), **RETURNED[name]}
    assert network.eval()(image).shape == (2, 2, 8, 8, 8)
    assert seen == [(2, 2, 2)] * 2


def test_the_encoder_of_an_absent_modality_gets_no_gradient(small):
    network, image = small(), torch.randn(2, 3, 8, 8, 8)
    image[:, 1] = 0
    values(network(image))["out"].square().mean().backward()
    assert all(not weights.grad.any() for weights in network.encoders[1].parameters())
    assert any(weights.grad.any() for weights in network.encoders[2].parameters())


def test_every_weight_receives_a_gradient_from_the_whole_loss(small):
    network = small()
    output = values(network(torch.randn(1, 3, 9, 6, 8)))
    sum(value.square().mean() for key, value in output.items() if key != "present").backward()
    assert all(weights.grad is not None for weights in network.parameters())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("size", [(4, 4, 4), (9, 6, 13)])
def test_any_size_and_no_modality_at_all_give_finite_numbers(small, mode, size):
    network = small().train(mode)
    for image in (torch.zeros(1, 3, *size), torch.randn(1, 3, *size)):
        output = values(network(image))
        assert all(torch.isfinite(value).all() for value in output.values())
        assert output["out"].shape[2:] == size


@pytest.mark.parametrize("kind", [HeMIS, UHVED])
def test_modalities_and_their_encoders_may_be_listed_in_any_order(kind):
    network, image = kind(3, 2, (4, 8, 8)).eval(), torch.randn(1, 3, 8, 8, 8)
    before = network(image)
    network.encoders = torch.nn.ModuleList([network.encoders[i] for i in (2, 0, 1)])
    assert torch.allclose(network(image[:, [2, 0, 1]]), before, atol=1e-5)


def test_samples_of_one_batch_may_have_different_modalities(small):
    network, image = small().eval(), torch.randn(2, 3, 8, 8, 8)
    image[1, 0] = 0
    apart = torch.cat([network(image[:1]), network(image[1:])])
    assert torch.allclose(network(image), apart, atol=1e-5)


def test_they_work_in_two_dimensions(small):
    output = values(small(spatial_dims=2)(torch.randn(1, 3, 8, 6)))
    assert output["out"].shape == (1, 2, 8, 6)


@pytest.mark.parametrize("kind", [UHVED, GatedFusionNet])
def test_train_mode_draws_subsets_of_what_is_there(kind):
    network, seen = kind(3, 2, (4, 8, 8)), set()
    network.bottleneck.register_forward_hook(
        lambda module, inputs, output: seen.update(map(tuple, inputs[1].tolist()))
    )
    image = torch.randn(40, 3, 4, 4, 4)
    image[:, 1] = 0
    network(image)
    assert seen == {(True, False, False), (False, False, True), (True, False, True)}


# HeMIS


def block(inputs, width, outputs):
    """Two norms (scale, shift) and two convolutions of kernel 3 with bias."""
    return 2 * inputs + (27 * inputs + 1) * width + 2 * width + (27 * width + 1) * outputs


def test_published_widths_of_hemis_give_the_parameters_worked_out_by_hand():
    encoder = 2 * 8 + block(8, 8, 4) + block(4, 16, 8) + block(8, 32, 16) + block(16, 64, 32)
    decoder = block(64 + 32, 32, 16) + block(16 + 16, 16, 8) + block(8 + 8, 8, 4) + 4 * 4 + 4
    found = sum(weights.numel() for weights in HeMIS(4, 4).parameters())
    assert found == 4 * encoder + decoder == 566_728


def test_mean_and_variance_are_over_what_is_present():
    features = torch.tensor([1.0, 3.0, 100.0]).reshape(1, 3, 1, 1, 1, 1)
    for present, expected in (
        ((True, True, False), [2.0, 1.0]),
        ((True, False, False), [1.0, 0.0]),
        ((False, False, False), [0.0, 0.0]),
    ):
        assert Moments()(features, torch.tensor([present])).flatten().tolist() == expected


def test_features_of_an_absent_modality_have_no_influence_even_where_they_are_not_finite():
    features = torch.tensor([1.0, float("nan")]).reshape(1, 2, 1, 1, 1).requires_grad_()
    Moments()(features, torch.tensor([[True, False]])).sum().backward()
    assert features.grad.flatten().tolist() == [1.0, 0.0]
    fusion, contents = GatedFusion(3, 2, 4), torch.randn(1, 2, 4, 3, 3, 3)
    present = torch.tensor([[True, False]])
    before = fusion(contents, present)
    contents[:, 1] = float("nan")
    assert torch.equal(fusion(contents, present), before)


# U-HVED


def latent(means, variances):
    """Evidence of one latent number for each modality of one sample."""
    pairs = torch.stack([torch.tensor(means), torch.tensor(variances).log()], dim=1)
    return read_evidence(pairs.double().reshape(1, len(means), 2, 1))


def chosen(*modalities):
    return torch.tensor([modalities])


def test_a_product_of_gaussians_has_the_sum_of_the_precisions():
    evidence = latent([1.0, 3.0], [1.0, 0.5])
    # Precisions 1 and 2, and 1 of the prior: (1 * 1 + 2 * 3) / 4 and 1 / 4.
    for modalities, mean, variance in (
        ((True, True), 1.75, 0.25),
        ((True, False), 0.5, 0.5),
        ((False, False), 0.0, 1.0),
    ):
        found = multiply(evidence, chosen(*modalities))
        assert found.mean.item() == pytest.approx(mean, abs=1e-6)
        assert found.log_variance.exp().item() == pytest.approx(variance, abs=1e-6)


def test_extreme_log_variances_are_cut_off():
    features = torch.tensor([1.0, -1e4, 2.0, 1e4]).reshape(1, 2, 2, 1)
    both = multiply(read_evidence(features), chosen(True, True))
    assert both.mean.item() == pytest.approx(1.0)
    assert torch.isfinite(both.log_variance).all()


def test_divergence_is_that_of_normal_distributions():
    numbers = torch.randn(4, 2, 3, 5, dtype=torch.float64)
    first, second = Gaussian(numbers[0], numbers[1]), Gaussian(numbers[2], numbers[3])
    normals = [Normal(mean, (spread / 2).exp()) for mean, spread in (first, second)]
    expected = kl_divergence(*normals).flatten(1).mean(1)
    assert torch.allclose(divergence(first, second), expected)
    assert divergence(first, first).abs().max() < 1e-12


def test_subsets_are_compared_with_all_and_with_the_prior():
    evidence = latent([1.0, 1.0], [1.0, 1.0])
    # One modality leaves N(1/2, 1/2), both N(2/3, 1/3).
    one, both, prior = (Normal(m, v**0.5) for m, v in ((0.5, 0.5), (2 / 3, 1 / 3), (0.0, 1.0)))
    between = float(kl_divergence(both, one))
    from_prior = float(2 * kl_divergence(one, prior) + kl_divergence(both, prior)) / 3
    for present, expected in (
        ((True, True), between + from_prior),
        ((True, False), float(kl_divergence(one, prior))),
        ((False, False), 0.0),
    ):
        found = subset_divergence(evidence, chosen(*present)).item()
        assert found == pytest.approx(expected, abs=1e-5)


def test_divergence_can_be_differentiated():
    features = torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    present = chosen(True, False, True)
    torch.autograd.gradcheck(lambda x: subset_divergence(read_evidence(x), present), features)


def test_eval_mode_takes_the_mean():
    image = torch.randn(1, 3, 8, 8, 8)
    network = UHVED(3, 2, (4, 8, 8)).eval()
    assert torch.equal(network(image), network(image))


# Gated fusion


def test_modulation_replaces_mean_and_deviation():
    features = torch.tensor([1.0, 3.0]).reshape(1, 1, 2, 1)
    styled = modulate(features, torch.tensor([[10.0]]), torch.tensor([[5.0]]))
    assert torch.allclose(styled.flatten(), torch.tensor([-5.0, 15.0]), atol=1e-3)
    voxel = torch.full((1, 1, 1, 1, 1), 2.0)
    assert modulate(voxel, torch.tensor([[10.0]]), torch.tensor([[5.0]])).item() == 25.0


def test_segmentation_does_not_see_the_appearance():
    network = gated()
    network(torch.randn(1, 3, 8, 8, 8))["out"].square().mean().backward()
    for part in (network.appearances, network.reconstructors):
        assert all(weights.grad is None for weights in part.parameters())


def test_a_modality_that_was_not_drawn_is_reconstructed_from_the_content_of_others():
    network, seen = gated(), []
    network.bottleneck.register_forward_hook(lambda *call: seen.append(call[1][1]))
    output = network(torch.randn(8, 3, 8, 8, 8))
    dropped = ~seen[0][:, 1]
    assert dropped.any()
    output["reconstruction"][dropped][:, 1].square().sum().backward()
    assert any(weights.grad.any() for weights in network.appearances[1].parameters())
    assert any(weights.grad.any() for weights in network.encoders[0].parameters())
    assert all(not weights.grad.any() for weights in network.encoders[1].parameters())
