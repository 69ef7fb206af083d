import pytest
import torch

from kdnet.config import ObjectiveConfig
from kdnet.errors import UserError
from kdnet.models import UHVED, GatedFusionNet, HeMIS
from kdnet.recipes.lesson import Setting
from kdnet.recipes.missing_modality import missing_modality
from privdistill import DistillationWrapper

MODALITIES = ("flair", "t1", "t1ce", "t2")


def lesson(network, view=MODALITIES):
    return missing_modality(Setting(network, (), ObjectiveConfig(), MODALITIES, view, view))


def test_a_network_without_extra_terms_is_taught_by_hidden_modalities():
    found = lesson(HeMIS(4, 4, (4, 8)))
    assert found.inputs.dropout == 0.5
    assert list(found.objective.named_terms) == ["ground_truth"]
    assert found.teacher is None


@pytest.mark.parametrize(
    ("network", "extra"),
    [
        (UHVED(4, 4, (4, 8)), ["subset_divergence", "reconstruction"]),
        (GatedFusionNet(4, 4, (4, 8), style_channels=2), ["reconstruction", "style_divergence"]),
    ],
)
def test_a_network_with_extra_terms_sees_everything_and_draws_by_itself(network, extra):
    found = lesson(network)
    assert found.inputs.dropout == 0
    assert list(found.objective.named_terms) == ["ground_truth", *extra]


def test_extra_terms_are_measured_in_training_and_zero_in_validation():
    found = lesson(UHVED(4, 4, (4, 8)))
    image, target = torch.randn(1, 4, 8, 8, 8), torch.zeros(1, 8, 8, 8, dtype=torch.long)
    with DistillationWrapper(
        None, found.network, objective=found.objective, inputs=found.inputs
    ) as kd:
        terms = kd(image, target).terms
        assert terms["subset_divergence"] > 0
        assert terms["reconstruction"] > 0
        out = kd.eval()(image, target)
    assert out.terms["subset_divergence"] == out.terms["reconstruction"] == 0
    assert out.loss == out.terms["ground_truth"]


def test_a_view_of_some_modalities_in_another_order_works():
    found = lesson(HeMIS(2, 4, (4, 8)), view=("t2", "t1"))
    assert found.inputs.student == ("t2", "t1")


def test_a_single_modality_has_no_subsets():
    with pytest.raises(UserError, match=r"sees t1ce alone.*role: teacher"):
        lesson(HeMIS(1, 4, (4, 8)), view=("t1ce",))
