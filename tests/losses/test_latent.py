import pytest
import torch

from privdistill import LatentKL, LayerNotFoundError, ObjectiveError, ShapeMismatchError, TapPair
from privdistill.losses.functional import latent_kl
from privdistill.output import Step


@pytest.mark.parametrize("normalisation", ["softmax", "l1"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 4, 4, 4)])
def test_term_equals_function(normalisation, shape):
    student, teacher = torch.randn(shape), torch.randn(shape)
    step = Step(student=student, taps={"deep": TapPair(student, teacher)})
    found = LatentKL("deep", normalisation=normalisation, temperature=2.0)(step)
    assert found == latent_kl(student, teacher, normalisation=normalisation, temperature=2.0)


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
