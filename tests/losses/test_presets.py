import numpy as np
import pytest
import torch
from torch import nn

from privdistill import (
    DistillationWrapper,
    ObjectiveError,
    PrivilegedInput,
    Step,
    Tap,
    TapPair,
    generalized,
    hinton,
    kdnet,
    m3ae,
    mstkdnet,
    passion,
    pmkl,
    protokd,
    structured,
    xie,
)

PRESETS = [kdnet, hinton, generalized, structured, pmkl, protokd, xie, m3ae, passion, mstkdnet]
WEIGHTS = {
    kdnet: {"soft_target_dice_bce": 0.75, "ground_truth": 0.25, "latent_kl": 10},
    hinton: {"hinton_kl": 0.5, "ground_truth": 0.5},
    generalized: {"soft_target_dice_bce": 0.5, "ground_truth": 0.5},
    structured: {"ground_truth": 1, "hinton_kl": 10, "pairwise_similarity": 1},
    pmkl: {"ground_truth": 1, "reliable_soft_target_ce": 0.5, "contrastive_projection": 0.5},
    protokd: {"ground_truth": 1, "hinton_kl": 2.5, "prototype_similarity": 0.1},
    xie: {"ground_truth": 1, "probability_mse": 1, "local_consistency": 1},
    m3ae: {"ground_truth": 1, "feature_l2": 0.1},
    passion: {"ground_truth": 1, "hinton_kl": 0.125, "prototype_similarity": 0.1},
    mstkdnet: {"ground_truth": 0.6, "probability_mse": 10, "hinton_kl": 0.25, "feature_l2": 0.2},
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


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def mean_of_all_elements(teacher, student, temperature):
    """The published divergence: a mean over classes, too."""
    q, p = softmax(teacher / temperature), softmax(student / temperature)
    return temperature**2 * (q * np.log(q / p)).mean()


def z_score(z):
    return (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5)


def similarity(features, labels):
    """Cosine of every voxel to the mean of each of four classes, `(B, 4, voxels)`."""
    maps = []
    for f, y in zip(features, labels, strict=True):
        means = [f[:, y == label].mean(1) for label in range(4)]
        lengths = np.linalg.norm(f, axis=0)
        maps.append([m @ f / (np.linalg.norm(m) * lengths) for m in means])
    return np.array(maps)


def given(scale=1.0):
    student, teacher = scale * torch.randn(2, 2, 4, 6, 6)
    features = torch.randn(2, 2, 5, 6, 6)
    target = torch.arange(4).repeat(2, 6, 2)[:, :, :6]
    taps = dict.fromkeys(("bottleneck", "decoder"), TapPair(*features))
    return Step(student, teacher, target=target, taps=taps)


def arrays(step):
    """Logits and features of student and teacher in float64, voxels in one row; and the labels."""
    pairs = (step.student, step.teacher, *step.taps["decoder"])
    return [x.double().flatten(2).numpy() for x in pairs], step.target.flatten(1).numpy()


def without_reference(objective, step):
    """What an objective adds to its supervised part."""
    loss, terms = objective(step)
    supervised, _ = objective.named_terms["ground_truth"]
    return (loss - supervised.factor * terms["ground_truth"]).item()


def test_passion_is_half_the_divergence_and_a_tenth_of_the_similarity():
    step = given()
    (student, teacher, f_student, f_teacher), labels = arrays(step)
    divergence = mean_of_all_elements(teacher, student, 4)
    maps = similarity(f_student, labels) - similarity(f_teacher, labels)
    expected = 0.5 * divergence + 0.1 * (maps**2).mean()
    assert without_reference(passion(), step) == pytest.approx(expected, rel=1e-5)


def test_mstkdnet_standardises_over_classes():
    step = given(scale=3.0)
    (student, teacher, f_student, f_teacher), _ = arrays(step)
    divergence = mean_of_all_elements(z_score(teacher), z_score(student), 7)
    consistency = ((softmax(student) - softmax(teacher)) ** 2).sum(1).mean()
    content = ((f_student - f_teacher) ** 2).mean()
    expected = divergence + 10 * consistency + 0.2 * content
    assert without_reference(mstkdnet(), step) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("preset", [m3ae, passion, mstkdnet])
def test_constant_and_extreme_logits_leave_finite_gradients(preset, size):
    step = given()
    student = torch.full_like(step.student, size).requires_grad_()
    # One network says nothing, the other is as sure as float16 allows.
    teacher = 1e4 * step.teacher.sign()
    for logits in (teacher, student.detach()):
        loss, _ = preset()(Step(student, logits, target=step.target, taps=step.taps))
        (slope,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert slope.isfinite().all()


def test_m3ae_compares_features_alone():
    step = given()
    (_, _, f_student, f_teacher), _ = arrays(step)
    expected = 0.1 * ((f_student - f_teacher) ** 2).mean()
    assert without_reference(m3ae(), step) == pytest.approx(expected, rel=1e-5)
