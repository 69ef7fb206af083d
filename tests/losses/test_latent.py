import numpy as np
import pytest
import torch

from privdistill import LatentKL, LayerNotFoundError, ObjectiveError, ShapeMismatchError, TapPair
from privdistill.functional import latent_kl
from privdistill.step import Step


@pytest.mark.parametrize("normalisation", ["softmax", "l1"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 4, 4, 4)])
def test_term_equals_function(normalisation, shape):
    student, teacher = torch.randn(shape), torch.randn(shape)
    step = Step(student=student, taps={"deep": TapPair(student, teacher)})
    found = LatentKL("deep", normalisation=normalisation, temperature=2.0)(step)
    assert found == latent_kl(student, teacher, normalisation=normalisation, temperature=2.0)


def divergence(q, p):
    return sum(a * (np.log(a) - np.log(b)) for a, b in zip(q, p, strict=True))


def softmax(values):
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def share(values):
    return abs(values) / abs(values).sum()


# What is normalised of one sample's features (C, N), as rows; and how.
ROWS = {
    "softmax": (lambda z: [z.ravel()], softmax),
    "softmax_channel": (lambda z: z.T, softmax),
    "softmax_spatial": (lambda z: z, softmax),
    "l1": (lambda z: [z.ravel()], share),
}


@pytest.mark.parametrize("normalisation", ROWS)
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (1, 3, 2, 3, 4)])
def test_term_equals_the_formula(normalisation, shape):
    rows, normal = ROWS[normalisation]
    student, teacher = torch.randn(shape), torch.randn(shape)
    pairs = zip(*(z.double().flatten(2).numpy() for z in (student, teacher)), strict=True)
    wanted = np.mean(
        [
            divergence(normal(t), normal(s))
            for mine, theirs in pairs
            for s, t in zip(rows(mine), rows(theirs), strict=True)
        ]
    )
    step = Step(student=student, taps={"bottleneck": TapPair(student, teacher)})
    found = LatentKL(normalisation=normalisation)(step).item()
    assert abs(found - wanted) <= 1e-6 * max(1, wanted)


def test_missing_tap_names_those_there_are():
    z = torch.zeros(1, 2, 4)
    step = Step(student=z, taps={"deep": TapPair(z, z)})
    with pytest.raises(LayerNotFoundError, match=r"no tap 'bottleneck'; it has \['deep'\]"):
        LatentKL()(step)


def test_unknown_normalisation_is_refused():
    with pytest.raises(ObjectiveError, match="`normalisation` must be one of"):
        LatentKL(normalisation="l2")


def test_repr_shows_what_was_chosen():
    assert repr(LatentKL()) == "LatentKL(tap='bottleneck')"
    assert repr(LatentKL("a", normalisation="l1")) == "LatentKL(tap='a', normalisation='l1')"


def test_temperature_divides_the_features():
    student, teacher = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    warm = LatentKL(temperature=2.0)(Step(student, taps={"bottleneck": TapPair(student, teacher)}))
    assert warm.item() == pytest.approx(latent_kl(student / 2, teacher / 2).item())


def test_the_mean_over_the_vector_is_the_sum_divided_by_its_length():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    step = Step(student, taps={"bottleneck": TapPair(student, teacher)})
    mean = LatentKL(reduction="mean")(step)
    assert mean.item() == pytest.approx(LatentKL()(step).item() / 48)
    assert repr(LatentKL(reduction="mean")) == "LatentKL(tap='bottleneck', reduction='mean')"


def test_features_of_other_channels_are_refused():
    pair = TapPair(torch.zeros(1, 2, 4), torch.zeros(1, 1, 4))
    with pytest.raises(ShapeMismatchError, match="they must be equal"):
        LatentKL()(Step(pair.student, taps={"bottleneck": pair}))
