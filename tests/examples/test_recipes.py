"""Each recipe: its objective, what its networks see, and training steps through the wrapper."""

from inspect import getmembers, isfunction
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

import privdistill
from kdnet.config import ObjectiveConfig
from kdnet.errors import UserError
from kdnet.models import UHVED, GatedFusionNet, HeMIS, KDNet, MultiResUNet, build_network
from kdnet.models.synthesis import SynthesisNetwork
from kdnet.recipes import Setting, recipe_of
from kdnet.recipes.comparators import privileged_modalities
from kdnet.recipes.objectives import head_of
from kdnet.rows import Row
from privdistill import DistillationWrapper, GroundTruth, HintonKL
from privdistill.losses import presets

MODALITIES = ("flair", "t1", "t1ce", "t2")
WIDTHS = (4, 8)
KDNET = {"channels": [4, 8]}
OBJECTIVES = get_args(get_type_hints(ObjectiveConfig)["objective"])


def recipe(name, network, *teachers, view=("t1ce",), teacher_view=MODALITIES, classes=4, **options):
    given = ObjectiveConfig(**options)
    setting = Setting(network, teachers, given, MODALITIES, view, teacher_view, classes)
    return recipe_of(Row("any", name), setting)


def distilled(student=None, teacher=None, **options):
    student, teacher = student or KDNet(1, 4, WIDTHS), teacher or KDNet(4, 4, WIDTHS)
    return recipe("distilled", student, teacher, **options)


def wrapped(found, size=(8, 8, 8)):
    return DistillationWrapper(
        found.teacher,
        found.network,
        objective=found.objective,
        inputs=found.inputs,
        taps=found.taps,
        example=torch.zeros(1, 4, *size),
    )


def built(backbone, arguments, channels):
    return build_network(backbone, arguments, in_channels=channels, out_channels=4)


def for_any_subset(backbone, **arguments):
    network = built(backbone, KDNET | arguments, 4)
    return recipe("missing_modality", network, view=MODALITIES)


def synthesis(**options):
    return SynthesisNetwork(1, 4, segmenter_arguments=KDNET, **options)


EVERY = {
    "hemis": lambda: for_any_subset("hemis"),
    "uhved": lambda: for_any_subset("uhved"),
    "gated_fusion": lambda: for_any_subset("gated_fusion", style_channels=2),
    "concatenated": lambda: for_any_subset("kdnet"),
    "synthesised": lambda: recipe("synthesised", synthesis()),
    "shared": lambda: recipe("shared", KDNet(1, 4, WIDTHS), KDNet(4, 4, WIDTHS)),
    "supervised": lambda: recipe("supervised", KDNet(1, 4, WIDTHS)),
} | {name: lambda name=name: distilled(objective=name) for name in OBJECTIVES}


@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_lowers_its_loss_and_can_be_validated(name):
    image = torch.randn(2, 4, 16, 8, 8)
    target = nn.functional.one_hot((image[:, 2] > 0.5).long(), 4).movedim(-1, 1).float()
    with wrapped(EVERY[name](), image.shape[2:]) as kd:
        optimizer = torch.optim.Adam(kd.parameters(), lr=0.01)
        losses = []
        for _ in range(5):
            loss = kd(image, target).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert torch.isfinite(torch.tensor(losses)).all()
        assert losses[-1] < losses[0]
        kd.eval()
        with torch.no_grad():
            out = kd(image, target)
        assert torch.isfinite(out.loss)
        assert out.student.shape == kd.predict(image).shape == target.shape


def weights(found):
    return {name: weight.at(0) for name, (weight, _) in found.objective.named_terms.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_the_reference_of_all_rows(name):
    found = distilled(objective=name, include_background=False, smoothing=1.0)
    terms = [term for _, term in found.objective.named_terms.values()]
    (reference,) = [term for term in terms if isinstance(term, GroundTruth)]
    assert (reference.include_background, reference.smoothing) == (False, 1.0)


def test_objectives_are_the_presets_of_the_library():
    functions = {name for name, _ in getmembers(presets, isfunction)}
    assert {*OBJECTIVES} == functions & {*privdistill.__all__}


def test_logits_of_two_channels_are_not_standardised():
    with pytest.raises(UserError, match="mstkdnet"):
        distilled(objective="mstkdnet", classes=2)


def test_another_supervised_loss_of_an_objective_stays(monkeypatch):
    criterion = nn.CrossEntropyLoss()
    monkeypatch.setattr(privdistill, "xie", lambda: HintonKL() + GroundTruth(criterion))
    found = distilled(objective="xie").objective
    assert found.named_terms["ground_truth"][1].loss is criterion


def test_constants_are_those_of_the_library():
    assert weights(distilled(objective="hinton")) == {"hinton_kl": 0.5, "ground_truth": 0.5}
    # The number of classes divides ProtoKD's first weight.
    assert weights(distilled(objective="protokd", classes=3)) == {
        "ground_truth": 1.0,
        "hinton_kl": pytest.approx(10 / 3),
        "prototype_similarity": 0.1,
    }
    soft = distilled(objective="generalized", batch_dice=True).objective
    term = soft.named_terms["soft_target_dice_bce"][1]
    assert (term.temperature, term.binarisation, term.batch_dice) == (2.0, "soft", True)


def test_layers_are_named_where_they_are_read():
    taps = distilled(teacher=MultiResUNet(4, 4, WIDTHS), objective="pmkl").taps
    assert (taps["decoder"].student.at, taps["decoder"].teacher.layer) == ("input", "head")
    assert distilled(objective="structured").taps["bottleneck"].student == "bottleneck"
    assert distilled(objective="hinton").taps == {}


def test_several_teachers_answer_together_but_features_come_from_one():
    teachers = (KDNet(4, 4, WIDTHS), KDNet(4, 4, WIDTHS))
    found = recipe("distilled", KDNet(1, 4, WIDTHS), *teachers, latent_weight=0.0)
    assert list(found.teacher.networks) == list(teachers)
    with pytest.raises(UserError, match="--out-of-fold 1"):
        recipe("distilled", KDNet(1, 4, WIDTHS), *teachers)


def test_the_layer_that_makes_logits_is_found_or_refused():
    segresnet = built("monai.networks.nets.SegResNet", {"init_filters": 8}, 1)
    assert head_of(segresnet) == "conv_final.2.conv"
    assert segresnet.get_submodule("conv_final.2.conv").out_channels == 4
    assert head_of(HeMIS(1, 4, WIDTHS)) == "decoder.head"
    with pytest.raises(UserError, match="last convolution, 0, is not one of kernel 1"):
        head_of(nn.Sequential(nn.Conv3d(1, 4, 3)))
    with pytest.raises(UserError, match="missing"):
        head_of(nn.Sequential())


def test_a_network_without_extra_terms_is_trained_with_hidden_modalities():
    found = recipe("missing_modality", HeMIS(2, 4, WIDTHS), view=("t2", "t1"))
    assert (found.inputs.dropout, found.inputs.student) == (0.5, ("t2", "t1"))
    assert weights(found) == {"ground_truth": 1.0}
    with pytest.raises(UserError, match="here t1ce is the only one"):
        recipe("missing_modality", HeMIS(1, 4, WIDTHS))


@pytest.mark.parametrize(
    ("network", "extra", "distance"),
    [
        (UHVED(4, 4, WIDTHS), "subset_divergence", "squared"),
        (GatedFusionNet(4, 4, WIDTHS, style_channels=2), "style_divergence", "absolute"),
    ],
)
def test_a_network_with_extra_terms_draws_subsets_itself(network, extra, distance):
    found = recipe("missing_modality", network, view=MODALITIES)
    assert found.inputs.dropout == 0
    assert weights(found) == {"ground_truth": 1.0, "reconstruction": 0.1, extra: 0.1}
    assert found.objective.named_terms["reconstruction"][1].distance == distance


def test_extra_terms_are_measured_in_training_and_zero_in_validation():
    image, target = torch.randn(1, 4, 8, 8, 8), torch.zeros(1, 8, 8, 8, dtype=torch.long)
    with wrapped(for_any_subset("uhved")) as kd:
        terms = kd(image, target).terms
        assert terms["subset_divergence"] > 0
        assert terms["reconstruction"] > 0
        out = kd.eval()(image, target)
    assert out.terms["subset_divergence"] == out.terms["reconstruction"] == 0
    assert out.loss == out.terms["ground_truth"]


def test_the_generator_is_compared_with_the_privileged_modality():
    student = synthesis()
    image, target = torch.randn(1, 4, 8, 8, 8), torch.zeros(1, 8, 8, 8, dtype=torch.long)
    with wrapped(recipe("synthesised", student)) as kd:
        out = kd(image, target)
        made = student.generator(image[:, 2:3])
        assert torch.allclose(out.terms["synthesis_l1"], (made - image[:, :1]).abs().mean())
        out.loss.backward()
    assert all(part.grad is not None for part in student.parameters())


def test_flair_is_what_is_synthesised_or_else_all_that_is_privileged():
    assert privileged_modalities(("t1ce",), MODALITIES) == ("flair",)
    assert privileged_modalities(("flair",), MODALITIES) == ("t1", "t1ce", "t2")
    view = ("t1", "t1ce", "t2")
    found = recipe("synthesised", synthesis(synthesised=2), teacher_view=view)
    assert found.inputs.teacher == ("t1", "t2")
    with pytest.raises(UserError, match="makes t1, t2, the network makes 1"):
        recipe("synthesised", synthesis(), teacher_view=view)
    with pytest.raises(UserError, match="the network makes 0"):
        recipe("synthesised", KDNet(1, 4, WIDTHS))
    with pytest.raises(UserError, match="both see t1ce"):
        recipe("synthesised", synthesis(), teacher_view=("t1ce",))


def test_no_gradient_passes_from_the_segmentation_to_the_generator():
    network = synthesis()
    network(torch.randn(1, 1, 8, 8, 8)).square().mean().backward()
    assert all(part.grad is None for part in network.generator.parameters())
    assert all(part.grad is not None for part in network.segmenter.parameters())


def test_the_segmenter_sees_view_and_synthesis():
    network, seen = synthesis(synthesised=2).eval(), []
    network.segmenter.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.randn(1, 1, 8, 8, 8)
    assert network(image).shape == (1, 4, 8, 8, 8)
    assert torch.equal(seen[0], torch.cat((image, network.generator(image)), dim=1))


def copies(module):
    return {name: part.detach().clone() for name, part in module.named_parameters()}


def test_shared_layers_are_the_teachers_and_stay_so_while_all_others_learn():
    teacher, student = KDNet(4, 4, WIDTHS), KDNet(1, 4, WIDTHS)
    found = recipe("shared", student, teacher)
    assert set(weights(found)) == {"soft_target_dice_bce", "ground_truth", "latent_kl"}
    shared, before = copies(teacher.bottleneck), copies(student)
    with wrapped(found) as kd:
        optimizer = torch.optim.Adam(kd.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(2):
            target = torch.randint(0, 4, (1, 8, 8, 8))
            kd(torch.randn(1, 4, 8, 8, 8), target).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = copies(student)
    assert all(torch.equal(after[f"bottleneck.{name}"], value) for name, value in shared.items())
    others = [name for name in after if not name.startswith("bottleneck.")]
    # A bias before an instance norm has no influence, and Adam leaves it to rounding.
    assert all(not torch.equal(after[name], before[name]) for name in others if "weight" in name)


def test_the_layers_that_are_shared_can_be_named():
    student = KDNet(1, 4, WIDTHS)
    recipe("shared", student, KDNet(4, 4, WIDTHS), bottleneck_layer="encoder.0.second")
    assert not any(part.requires_grad for part in student.encoder[0].second.parameters())
    assert all(part.requires_grad for part in student.bottleneck.parameters())


@pytest.mark.parametrize(
    ("student", "teachers", "options", "message"),
    [
        (KDNet(1, 4, (4, 6)), [KDNet(4, 4, WIDTHS)], {}, "'bottleneck'"),
        (MultiResUNet(1, 4, WIDTHS), [KDNet(4, 4, WIDTHS)], {}, "'bottleneck'"),
        (KDNet(1, 4, WIDTHS), [KDNet(4, 4, WIDTHS)], {"bottleneck_layer": "deep"}, "'deep'"),
        (HeMIS(1, 4, WIDTHS), [HeMIS(4, 4, WIDTHS)], {}, "'bottleneck'"),
        (nn.Sequential(), [KDNet(4, 4, WIDTHS)], {}, "--bottleneck-layer"),
    ],
)
def test_layers_that_cannot_be_shared_are_refused(student, teachers, options, message):
    with pytest.raises(UserError, match=message):
        recipe("shared", student, *teachers, **options)
