import pytest
from torch import nn

from kdnet.config import ObjectiveConfig
from kdnet.errors import UserError
from kdnet.models import HeMIS, KDNet, MultiResUNet, build_network
from kdnet.recipes.lesson import Setting
from kdnet.recipes.objectives import head_of, objective_of, taps_of, taught_by_objective
from privdistill import GroundTruth

MODALITIES = ("flair", "t1", "t1ce", "t2")
NAMES = ("kdnet", "hinton", "generalized", "xie", "structured", "pmkl", "protokd")
WIDTHS = (4, 8)


def setting(student, teacher, **options):
    return Setting(
        student, (teacher,), ObjectiveConfig(**options), MODALITIES, ("t1ce",), MODALITIES
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_has_the_reference_of_all_rows(name):
    options = ObjectiveConfig(include_background=False, smoothing=1.0)
    terms = [term for _, term in objective_of(name, options).named_terms.values()]
    (reference,) = [term for term in terms if isinstance(term, GroundTruth)]
    assert repr(reference) == "GroundTruth(include_background=False, smoothing=1.0)"


def test_constants_are_those_of_the_presets():
    def weights(name):
        terms = objective_of(name, ObjectiveConfig()).named_terms
        return {name: weight.at(0) for name, (weight, _) in terms.items()}

    assert weights("hinton") == {"hinton_kl": 0.5, "ground_truth": 0.5}
    assert weights("pmkl") == {
        "ground_truth": 1.0,
        "reliable_soft_target_ce": 0.5,
        "contrastive_projection": 0.5,
    }
    assert weights("protokd") == {
        "ground_truth": 1.0,
        "hinton_kl": 2.5,
        "prototype_similarity": 0.1,
    }


def test_soft_targets_of_generalized_distillation_keep_their_temperature():
    options = ObjectiveConfig(batch_dice=True)
    soft = objective_of("generalized", options).named_terms["soft_target_dice_bce"][1]
    assert repr(soft) == (
        "SoftTargetDiceBCE(temperature=2.0, binarisation='soft', batch_dice=True)"
    )


def test_protokd_divides_by_the_classes_of_the_network():
    student, teacher = KDNet(1, 3, WIDTHS), KDNet(4, 3, WIDTHS)
    found = taught_by_objective(setting(student, teacher, objective="protokd"))
    assert found.objective.named_terms["hinton_kl"][0].at(0) == pytest.approx(10 / 3)


def test_last_decoder_features_are_what_the_head_is_given():
    student, teacher = KDNet(1, 4, WIDTHS), MultiResUNet(4, 4, WIDTHS)
    taps = taps_of(objective_of("pmkl", ObjectiveConfig()), setting(student, teacher))
    assert (str(taps["decoder"].student), taps["decoder"].student.at) == (
        "head (at='input')",
        "input",
    )
    assert taps["decoder"].teacher.layer == "head"


def test_the_bottleneck_is_named_where_it_is_read():
    both = setting(KDNet(1, 4, WIDTHS), KDNet(4, 4, WIDTHS))
    structured = objective_of("structured", ObjectiveConfig())
    assert taps_of(structured, both)["bottleneck"].student == "bottleneck"
    assert taps_of(objective_of("hinton", ObjectiveConfig()), both) == {}


def test_other_networks_end_with_a_convolution_of_kernel_one():
    network = build_network(
        "monai.networks.nets.segresnet.SegResNet",
        {"init_filters": 8},
        in_channels=1,
        out_channels=4,
    )
    name, head = head_of(network)
    assert name == "conv_final.2.conv"
    assert head.out_channels == 4
    assert head_of(HeMIS(1, 4, WIDTHS))[0] == "decoder.head"


def test_a_network_whose_end_cannot_be_told_is_refused():
    with pytest.raises(UserError, match=r"last convolution is 0, not one of kernel 1"):
        head_of(nn.Sequential(nn.Conv3d(1, 4, 3)))
    with pytest.raises(UserError, match="last convolution is missing"):
        head_of(nn.Sequential())


def test_unknown_objectives_are_named():
    with pytest.raises(UserError, match="no objective 'fitnets': expected kdnet, hinton"):
        objective_of("fitnets", ObjectiveConfig())
