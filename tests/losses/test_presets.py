import pytest
import torch
from torch import nn

from privdistill import (
    DistillationWrapper,
    ObjectiveError,
    PrivilegedInput,
    Tap,
    generalized,
    hinton,
    kdnet,
    pmkl,
    protokd,
    structured,
    xie,
)

PRESETS = [kdnet, hinton, generalized, structured, pmkl, protokd, xie]
WEIGHTS = {
    kdnet: {"soft_target_dice_bce": 0.75, "ground_truth": 0.25, "latent_kl": 10},
    hinton: {"hinton_kl": 0.5, "ground_truth": 0.5},
    generalized: {"soft_target_dice_bce": 0.5, "ground_truth": 0.5},
    structured: {"ground_truth": 1, "hinton_kl": 10, "pairwise_similarity": 1},
    pmkl: {"ground_truth": 1, "reliable_soft_target_ce": 0.5, "contrastive_projection": 0.5},
    protokd: {"ground_truth": 1, "hinton_kl": 2.5, "prototype_similarity": 0.1},
    xie: {"ground_truth": 1, "probability_mse": 1, "local_consistency": 1},
}


class UNet(nn.Module):
    """A 3-D network with a bottleneck and a decoder."""

    def __init__(self, channels, width):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(channels, width, 3, padding=1), nn.LeakyReLU())
        self.bottleneck = nn.Sequential(nn.Conv3d(width, 2 * width, 2, stride=2), nn.LeakyReLU())
        self.decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv3d(2 * width, width, 1))
        self.head = nn.Conv3d(width, 4, 1)

    def forward(self, x):
        return self.head(self.decoder(self.bottleneck(self.encoder(x))))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_a_step_on_a_3d_network_lowers_the_objective(preset):
    torch.manual_seed(0)
    kd = DistillationWrapper(
        UNet(2, 6),
        UNet(1, 4),
        objective=preset(),
        inputs=PrivilegedInput(("t1", "t2"), student=("t1",)),
        taps={"decoder": Tap("decoder", "decoder")} if "decoder" in preset().taps else {},
        example=torch.zeros(1, 2, 8, 8, 8),
    )
    image, labels = torch.randn(2, 2, 8, 8, 8), torch.randint(0, 4, (2, 8, 8, 8))
    optimizer = torch.optim.SGD(kd.parameters(), lr=1e-3)
    before = kd(image, labels)
    before.loss.backward()
    optimizer.step()
    assert kd(image, labels).loss < before.loss
    assert all(value > 0 for value in before.terms.values())
    assert kd.student.encoder[0].weight.grad.any()


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_weights_are_those_published(preset):
    terms = preset().named_terms
    assert {name: weight.factor for name, (weight, _) in terms.items()} == WEIGHTS[preset]


@pytest.mark.parametrize("preset", [kdnet, hinton, generalized])
def test_a_share_outside_of_zero_to_one_is_refused(preset):
    with pytest.raises(ObjectiveError, match=r"`imitation` must be in \[0, 1\]; got 2"):
        preset(imitation=2)
