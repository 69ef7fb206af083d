import pytest
import torch
from torch.distributions import Normal, kl_divergence

from kdnet.models import UHVED
from kdnet.models.uhved import Gaussian, divergence, multiply, read_evidence, subset_divergence


def small(**options):
    return UHVED(3, 2, (4, 8, 8), **options)


def latent(means, variances):
    """Evidence of one latent number for each modality of one sample."""
    pairs = torch.stack([torch.tensor(means), torch.tensor(variances).log()], dim=1)
    return read_evidence(pairs.double().reshape(1, len(means), 2, 1))


def chosen(*modalities):
    return torch.tensor([modalities])


def test_a_product_of_gaussians_has_the_sum_of_the_precisions():
    evidence = latent([1.0, 3.0], [1.0, 0.5])
    # Precisions 1 and 2, and 1 of the prior: (1 * 1 + 2 * 3) / 4 and 1 / 4.
    both = multiply(evidence, chosen(True, True))
    assert both.mean.item() == pytest.approx(1.75, abs=1e-6)
    assert both.log_variance.exp().item() == pytest.approx(0.25, abs=1e-6)
    first = multiply(evidence, chosen(True, False))
    assert first.mean.item() == pytest.approx(0.5, abs=1e-6)
    assert first.log_variance.exp().item() == pytest.approx(0.5, abs=1e-6)


def test_without_evidence_the_prior_is_left():
    none = multiply(latent([1.0, 3.0], [1.0, 0.5]), chosen(False, False))
    assert none.mean.item() == 0
    assert none.log_variance.item() == 0


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
    found = subset_divergence(evidence, chosen(True, True))
    assert found.item() == pytest.approx(between + from_prior, abs=1e-5)


def test_subsets_with_absent_modalities_do_not_count():
    evidence, prior = latent([1.0, 9.0], [1.0, 0.1]), Normal(0.0, 1.0)
    alone = float(kl_divergence(Normal(0.5, 0.5**0.5), prior))
    assert subset_divergence(evidence, chosen(True, False)).item() == pytest.approx(alone, abs=1e-5)
    assert subset_divergence(evidence, chosen(False, False)).item() == 0


def test_modalities_that_say_nothing_leave_no_divergence():
    features = torch.tensor([5.0, 50.0, -5.0, 50.0]).reshape(1, 2, 2, 1)
    found = subset_divergence(read_evidence(features), chosen(True, True))
    assert found.item() == pytest.approx(0.0, abs=1e-6)


def test_divergence_can_be_differentiated():
    features = torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    present = chosen(True, False, True)
    torch.autograd.gradcheck(lambda x: subset_divergence(read_evidence(x), present), features)


def test_train_mode_returns_what_its_loss_needs_and_eval_mode_logits():
    network, image = small(), torch.randn(2, 3, 8, 8, 8)
    output = network(image)
    assert {name: tuple(value.shape) for name, value in output.items()} == {
        "out": (2, 2, 8, 8, 8),
        "reconstruction": (2, 3, 8, 8, 8),
        "divergence": (2,),
        "present": (2, 3),
    }
    assert network.eval()(image).shape == (2, 2, 8, 8, 8)


def test_eval_mode_takes_the_mean_unless_samples_are_asked_for():
    image = torch.randn(1, 3, 8, 8, 8)
    network = small().eval()
    assert torch.equal(network(image), network(image))
    network = small(sample_in_eval=True).eval()
    assert not torch.equal(network(image), network(image))


def test_train_mode_draws_subsets_of_what_is_there():
    network, seen = small(), set()
    network.bottleneck.register_forward_hook(
        lambda module, inputs, output: seen.update(map(tuple, inputs[1].tolist()))
    )
    image = torch.randn(40, 3, 4, 4, 4)
    image[:, 1] = 0
    network(image)
    assert seen == {(True, False, False), (False, False, True), (True, False, True)}


def test_an_absent_modality_has_no_influence_and_no_gradient():
    network, image = small(), torch.randn(2, 3, 8, 8, 8)
    image[:, 1] = 0
    output = network(image)
    (output["out"].square().mean() + output["divergence"].mean()).backward()
    assert all(not weights.grad.any() for weights in network.encoders[1].parameters())
    assert any(weights.grad.any() for weights in network.encoders[2].parameters())


def test_modalities_and_their_encoders_may_be_listed_in_any_order():
    network, image = small().eval(), torch.randn(1, 3, 8, 8, 8)
    before = network(image)
    network.encoders = torch.nn.ModuleList([network.encoders[i] for i in (2, 0, 1)])
    assert torch.allclose(network(image[:, [2, 0, 1]]), before, atol=1e-5)


@pytest.mark.parametrize("mode", [True, False])
def test_without_any_modality_everything_is_finite(mode):
    output = small().train(mode)(torch.zeros(1, 3, 4, 4, 4))
    values = output.values() if mode else [output]
    assert all(torch.isfinite(value).all() for value in values)


def test_every_weight_receives_a_gradient_from_the_whole_loss():
    network, image = small(), torch.randn(1, 3, 9, 6, 8)
    output = network(image)
    parts = (output["out"].square(), output["reconstruction"].square(), output["divergence"])
    sum(part.mean() for part in parts).backward()
    assert all(weights.grad is not None for weights in network.parameters())


def test_encoders_pass_on_their_whole_width_and_decoders_read_half_of_it():
    network = UHVED(4, 4)
    widths = [level[-1].out_channels for level in network.encoders[0].levels]
    assert widths == [8, 16, 32, 64]
    assert [level[2].in_channels for level in network.decoder.levels] == [32 + 16, 16 + 8, 8 + 4]
    assert len(network.reconstructors) == 4
