import pytest
import torch

from kdnet.models import HeMIS, KDNet
from kdnet.models.hemis import Moments
from privdistill import DistillationWrapper, GroundTruth, LatentKL, Tap


def small(modalities=3):
    return HeMIS(modalities, 2, (4, 8, 8))


def parameters(network):
    return sum(weights.numel() for weights in network.parameters())


def block(inputs, width, outputs):
    """Two norms (scale, shift) and two convolutions of kernel 3 with bias."""
    return 2 * inputs + (27 * inputs + 1) * width + 2 * width + (27 * width + 1) * outputs


def test_published_widths_give_the_parameters_worked_out_by_hand():
    encoder = 2 * 8 + block(8, 8, 4) + block(4, 16, 8) + block(8, 32, 16) + block(16, 64, 32)
    decoder = block(64 + 32, 32, 16) + block(16 + 16, 16, 8) + block(8 + 8, 8, 4) + 4 * 4 + 4
    assert parameters(HeMIS(4, 4)) == 4 * encoder + decoder == 566_728


def test_mean_and_variance_are_over_what_is_present():
    features = torch.tensor([1.0, 3.0, 100.0]).reshape(1, 3, 1, 1, 1, 1)
    two = Moments()(features, torch.tensor([[True, True, False]]))
    assert two.flatten().tolist() == [2.0, 1.0]
    one = Moments()(features, torch.tensor([[True, False, False]]))
    assert one.flatten().tolist() == [1.0, 0.0]
    none = Moments()(features, torch.tensor([[False, False, False]]))
    assert none.flatten().tolist() == [0.0, 0.0]


def test_an_absent_modality_has_no_influence_even_where_its_features_are_not_finite():
    features = torch.tensor([1.0, float("nan")]).reshape(1, 2, 1, 1, 1).requires_grad_()
    Moments()(features, torch.tensor([[True, False]])).sum().backward()
    assert features.grad.flatten().tolist() == [1.0, 0.0]


def test_the_encoder_of_an_absent_modality_gets_no_gradient():
    network, image = small(), torch.randn(2, 3, 8, 8, 8)
    image[:, 1] = 0
    network(image).square().mean().backward()
    assert all(not weights.grad.any() for weights in network.encoders[1].parameters())
    assert any(weights.grad.any() for weights in network.encoders[0].parameters())


def test_modalities_and_their_encoders_may_be_listed_in_any_order():
    network, image = small().eval(), torch.randn(1, 3, 8, 8, 8)
    before = network(image)
    network.encoders = torch.nn.ModuleList([network.encoders[i] for i in (2, 0, 1)])
    assert torch.allclose(network(image[:, [2, 0, 1]]), before, atol=1e-5)


def test_samples_of_one_batch_may_have_different_modalities():
    network, image = small().eval(), torch.randn(2, 3, 8, 8, 8)
    image[1, 0] = 0
    apart = torch.cat([network(image[:1]), network(image[1:])])
    assert torch.allclose(network(image), apart, atol=1e-5)


def test_without_any_modality_the_logits_are_those_of_no_evidence():
    network = small().eval()
    logits = network(torch.zeros(2, 3, 8, 8, 8))
    assert torch.isfinite(logits).all()
    assert torch.equal(logits[0], logits[1])
    image = torch.zeros(1, 3, 8, 8, 8, requires_grad=True)
    network.train()(image).sum().backward()
    assert not image.grad.any()


@pytest.mark.parametrize("size", [(4, 4, 4), (9, 6, 13)])
def test_any_size_down_to_a_single_voxel_at_the_bottleneck_works(size):
    assert small()(torch.randn(1, 3, *size)).shape == (1, 2, *size)


def test_the_bottleneck_gives_the_fused_features():
    network, seen = small().eval(), []
    network.bottleneck.register_forward_hook(lambda *call: seen.append(call[2].shape))
    network(torch.randn(1, 3, 16, 16, 16))
    assert seen == [(1, 8, 4, 4, 4)]


def test_it_works_in_two_dimensions():
    assert HeMIS(2, 3, (4, 8), spatial_dims=2)(torch.randn(1, 2, 8, 6)).shape == (1, 3, 8, 6)


def test_every_weight_receives_a_gradient():
    network = small()
    network(torch.randn(1, 3, 8, 8, 8)).square().mean().backward()
    assert all(weights.grad is not None for weights in network.parameters())


def test_the_fused_bottleneck_can_learn_from_a_teacher_of_other_widths():
    kd = DistillationWrapper(
        KDNet(3, 2, (4, 6, 10)),
        small(),
        objective=GroundTruth() + LatentKL(),
        taps={"bottleneck": Tap(teacher="bottleneck", student="bottleneck")},
        example=torch.zeros(1, 3, 8, 8, 8),
    )
    with kd:
        out = kd(torch.randn(1, 3, 8, 8, 8), torch.zeros(1, 8, 8, 8, dtype=torch.long))
        out.loss.backward()
    assert out.taps["bottleneck"].student.shape == (1, 10, 2, 2, 2)
    assert all(weights.grad is not None for weights in kd.student.parameters())
