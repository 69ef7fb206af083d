import math

import numpy as np
import pytest
import torch
from torch import nn

from privdistill import GroundTruth, ObjectiveError, ShapeMismatchError, SoftTargetDiceBCE
from privdistill.step import Step


def reference(p, dice_target, bce_target):
    """Eqs. (2) and (4) in float64, written from the paper with plain Dice per channel."""
    total = 0.0
    batch, channels = p.shape[:2]
    for b in range(batch):
        for c in range(channels):
            overlap = 2 * (p[b, c] * dice_target[b, c]).sum()
            size = p[b, c].sum() + dice_target[b, c].sum()
            total += 1 - (overlap + 1e-5) / (size + 1e-5)
    bce = -(bce_target * p.log() + (1 - bce_target) * (1 - p).log()).mean()
    return total / (batch * channels) + bce


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 5, 4), (1, 4, 4, 4, 4)])
def test_ground_truth_equals_the_paper_under_softmax(shape):
    logits = torch.randn(shape)
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    hot = nn.functional.one_hot(labels, shape[1]).movedim(-1, 1).double()
    expected = reference(logits.double().softmax(1), hot, hot)
    found = GroundTruth()(Step(student=logits, target=labels))
    assert found.item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-6)


def test_ground_truth_equals_the_paper_under_sigmoid():
    logits, target = torch.randn(2, 3, 4, 4), (torch.rand(2, 3, 4, 4) > 0.5).float()
    expected = reference(logits.double().sigmoid(), target.double(), target.double())
    found = GroundTruth()(Step(student=logits, target=target, activation="sigmoid"))
    assert found.item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_soft_targets_equal_the_paper(temperature):
    student, teacher = torch.randn(2, 4, 3, 3, 3), 5 * torch.randn(2, 4, 3, 3, 3)
    hot = nn.functional.one_hot(teacher.argmax(1), 4).movedim(-1, 1).double()
    soft = (teacher.double() / temperature).softmax(1)
    expected = reference(student.double().softmax(1), soft, hot)
    found = SoftTargetDiceBCE(temperature=temperature)(Step(student=student, teacher=teacher))
    assert found.item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-6)


def test_perfect_imitation_does_not_bring_the_tempered_term_to_zero():
    logits = torch.tensor([[[9.0], [-9.0]]])
    step = Step(student=logits, teacher=logits)
    assert SoftTargetDiceBCE(temperature=5.0)(step) > 0.02
    assert SoftTargetDiceBCE(temperature=1.0)(step) < 2e-3


def test_background_can_be_left_out():
    # Background all wrong, foreground channel all right: p = (0, 1) everywhere, target the same.
    logits = torch.tensor([[[-30.0] * 2, [30.0, -30.0], [-30.0, 30.0]]])
    labels = torch.tensor([[1, 2]])
    assert GroundTruth(include_background=False)(Step(student=logits, target=labels)) < 1e-4


def test_terms_own_activation_wins():
    logits, target = torch.randn(1, 2, 4), torch.ones(1, 2, 4)
    own = GroundTruth(activation="sigmoid")(Step(student=logits, target=target))
    inherited = GroundTruth()(Step(student=logits, target=target, activation="sigmoid"))
    assert own == inherited


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 64])
def test_extreme_half_precision_logits_stay_finite(dtype, size):
    logits = torch.full((1, 2, size, size, size), 1e4, dtype=dtype)
    logits[:, 1] = -1e4
    logits.requires_grad_()
    labels = torch.ones(1, size, size, size, dtype=torch.long)
    loss = GroundTruth()(Step(student=logits, target=labels))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_value_does_not_change_with_the_patch_size():
    field = torch.randn(1, 2, 4, 4)
    labels = torch.randint(0, 2, (1, 4, 4))
    small = GroundTruth()(Step(student=field, target=labels))
    large = GroundTruth()(Step(student=field.repeat(1, 1, 4, 4), target=labels.repeat(1, 4, 4)))
    assert large.item() == pytest.approx(small.item(), rel=1e-4)


def test_uniform_prediction_by_hand():
    step = Step(student=torch.zeros(1, 2, 2), target=torch.tensor([[0, 1]]))
    # p = 1/2: Dice = 2 * 0.5 / (1 + 1) = 1/2 in both channels; BCE = log 2
    assert GroundTruth()(step).item() == pytest.approx(0.5 + math.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "`temperature` must be positive"),
        ({"temperature": float("nan")}, "`temperature` must be positive"),
        ({"smoothing": -1}, "`smoothing` must be positive"),
        ({"activation": "tanh"}, r"`activation` must be one of \('softmax', 'sigmoid'\)"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ObjectiveError, match=message):
        SoftTargetDiceBCE(**options)


def test_missing_target_says_how_to_call():
    with pytest.raises(ObjectiveError, match=r"no target. Call the wrapper as kd\(image, target\)"):
        GroundTruth()(Step(student=torch.zeros(1, 2, 4)))


def test_missing_teacher_is_an_error():
    with pytest.raises(ObjectiveError, match="no teacher logits"):
        SoftTargetDiceBCE()(Step(student=torch.zeros(1, 2, 4)))


def test_logits_of_different_shapes_are_refused():
    step = Step(student=torch.zeros(1, 2, 4), teacher=torch.zeros(1, 2, 8))
    with pytest.raises(ShapeMismatchError, match=r"student's logits are \(1, 2, 4\), the"):
        SoftTargetDiceBCE()(step)


def test_repr_shows_what_was_chosen():
    assert repr(GroundTruth(batch_dice=True)) == "GroundTruth(batch_dice=True)"
    assert repr(SoftTargetDiceBCE()) == "SoftTargetDiceBCE(temperature=5.0)"


def test_background_left_out_of_the_cross_entropy_by_hand():
    # p = 1/3 everywhere; target class 1: BCE is log 3 for it and log 3/2 for class 2
    step = Step(student=torch.zeros(1, 3, 1), target=torch.tensor([[1]]))
    dice = 1 - (2 / 3 / (1 / 3 + 1) + 0) / 2
    bce = (math.log(3) + math.log(1.5)) / 2
    found = GroundTruth(include_background=False)(step)
    assert found.item() == pytest.approx(dice + bce, abs=1e-4)


def gt(logits, target, *, fields=None, **options):
    return GroundTruth(**options)(Step(student=logits, target=target, **(fields or {})))


LOGITS = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
MAP = torch.randint(0, 3, (3, 4, 4), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("form", ["map", "channels"])
def test_ignored_voxels_might_as_well_not_be_there(activation, form):
    if form == "map" and activation == "sigmoid":
        pytest.skip("regions have channels")
    target = MAP if form == "map" else nn.functional.one_hot(MAP, 3).movedim(-1, 1)
    kept = gt(LOGITS[..., :2], target[..., :2], activation=activation)
    target = target.clone()
    target[..., 2:] = 255
    found = gt(LOGITS, target, activation=activation, ignore_index=255)
    assert found.item() == pytest.approx(kept.item(), rel=1e-6)


def test_nothing_but_ignored_voxels_gives_no_cross_entropy_and_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    loss = gt(logits, torch.full_like(MAP, -1), ignore_index=-1)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("fields", [{}, {"sample_weights": torch.tensor([1.0, 2.0, 3.0])}])
def test_a_sample_of_nothing_but_ignored_voxels_might_as_well_not_be_there(fields, batch_dice):
    kept = {name: value[[0, 2]] for name, value in fields.items()}
    wanted = gt(LOGITS[[0, 2]], MAP[[0, 2]], fields=kept, batch_dice=batch_dice)
    target = MAP.clone()
    target[1] = 255
    found = gt(LOGITS, target, fields=fields, batch_dice=batch_dice, ignore_index=255)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("class_weights", [None, (1, 2, 3)])
def test_a_region_that_a_sample_ignores_altogether_is_left_out_of_its_mean(class_weights):
    regions = (torch.rand(LOGITS.shape) > 0.5).long()
    options = {"activation": "sigmoid", "class_weights": class_weights}
    whole = gt(LOGITS[:2], regions[:2], **options).item()
    last = {"activation": "sigmoid", "class_weights": class_weights and class_weights[1:]}
    part = gt(LOGITS[2:, 1:], regions[2:, 1:], **last).item()
    regions[2, 0] = 255
    found = gt(LOGITS, regions, ignore_index=255, **options).item()
    assert found == pytest.approx((2 * whole + part) / 3, rel=1e-6)


def test_unlabelled_samples_might_as_well_not_be_there():
    labelled = torch.tensor([True, False, True])
    target = MAP.clone()
    target[1] = 99
    for batch_dice in (False, True):
        kept = gt(LOGITS[labelled], MAP[labelled], batch_dice=batch_dice)
        found = gt(LOGITS, target, fields={"labelled": labelled}, batch_dice=batch_dice)
        assert found.item() == pytest.approx(kept.item(), rel=1e-6)


def test_nan_in_an_unlabelled_reference_is_never_read():
    target = nn.functional.one_hot(MAP, 3).movedim(-1, 1).float()
    target[0] = float("nan")
    fields = {"labelled": torch.tensor([False, True, True])}
    logits = LOGITS.clone().requires_grad_()
    gt(logits, target, fields=fields).backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[0].any()


def test_a_batch_without_any_reference_costs_nothing():
    logits = LOGITS.clone().requires_grad_()
    loss = gt(logits, MAP, fields={"labelled": torch.zeros(3, dtype=torch.bool)})
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_sample_weights_give_the_weighted_mean():
    weights = torch.tensor([1.0, 0.0, 3.0])
    single = [gt(LOGITS[i : i + 1], MAP[i : i + 1]).item() for i in range(3)]
    found = gt(LOGITS, MAP, fields={"sample_weights": weights})
    assert found.item() == pytest.approx((single[0] + 3 * single[2]) / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labelled": torch.ones(2, dtype=torch.bool)}, r"`labelled` is \(2,\) for a batch of 3"),
        ({"sample_weights": torch.ones(3, 1)}, r"`sample_weights` is \(3, 1\) for a batch of 3"),
        ({"sample_weights": torch.tensor([1.0, -1, 1])}, "must be finite and not negative"),
    ],
)
def test_masks_and_weights_of_another_form_are_refused(fields, message):
    with pytest.raises((ObjectiveError, ShapeMismatchError), match=message):
        gt(LOGITS, MAP, fields=fields)


def test_class_weights_give_the_weighted_mean_over_channels():
    target = nn.functional.one_hot(MAP, 3).movedim(-1, 1)
    single = [
        gt(LOGITS[:, c : c + 1], target[:, c : c + 1], activation="sigmoid").item()
        for c in range(3)
    ]
    found = gt(LOGITS, target, activation="sigmoid", class_weights=(2, 0, 1))
    assert found.item() == pytest.approx((2 * single[0] + single[2]) / 3, rel=1e-6)


@pytest.mark.parametrize("weights", [(1, -1), (0, 0), (1, float("nan"))])
def test_class_weights_without_meaning_are_refused(weights):
    with pytest.raises(ObjectiveError, match="`class_weights`"):
        GroundTruth(class_weights=weights)


@pytest.mark.parametrize("weights", [[1, 2, 0.5], np.array([1, 2, 0.5]), torch.tensor([1, 2, 0.5])])
def test_class_weights_of_any_kind_are_kept_as_numbers(weights):
    term = GroundTruth(class_weights=weights)
    assert repr(term) == "GroundTruth(class_weights=(1.0, 2.0, 0.5))"
    assert term.class_weights == (1.0, 2.0, 0.5)


def test_as_many_class_weights_as_channels_that_count():
    gt(LOGITS, MAP, class_weights=(1, 2), include_background=False)
    with pytest.raises(ShapeMismatchError, match=r"`class_weights` has 2 numbers, and 3 channels"):
        gt(LOGITS, MAP, class_weights=(1, 2))


def test_a_finer_target_is_met_by_enlarged_logits_only_if_asked():
    target = MAP.repeat_interleave(4, 1).repeat_interleave(4, 2)
    with pytest.raises(ShapeMismatchError, match=r"option resize='logits'"):
        gt(LOGITS, target)
    enlarged = nn.functional.interpolate(LOGITS, size=(16, 16), mode="bilinear")
    found = gt(LOGITS, target, resize="logits")
    assert found.item() == pytest.approx(gt(enlarged, target).item())


def test_a_coarser_target_is_never_met():
    with pytest.raises(ShapeMismatchError, match="resize='logits'"):
        gt(LOGITS, MAP[:, ::2, ::2], resize="logits")


def test_soft_targets_may_stand_in_for_binarised_ones():
    teacher = LOGITS.flip(0)
    step = Step(student=LOGITS, teacher=teacher, activation="sigmoid")
    loss = SoftTargetDiceBCE(temperature=2.0, binarisation="soft")(step)
    soft = (teacher / 2).sigmoid()
    p = LOGITS.sigmoid()
    dice = 2 * (p * soft).sum((2, 3)) / (p + soft).sum((2, 3))
    bce = -(soft * p.log() + (1 - soft) * (1 - p).log()).mean()
    assert loss.item() == pytest.approx((1 - dice.mean() + bce).item(), rel=1e-5)


def test_binarisation_may_differ_from_the_activation():
    logits = torch.tensor([[[4.0], [3.0]]])
    step = Step(student=logits, teacher=logits)
    argmax = SoftTargetDiceBCE(temperature=1.0)(step)
    positive = SoftTargetDiceBCE(temperature=1.0, binarisation="positive")(step)
    # both channels are positive, so the second is taught 1 instead of 0
    p = torch.softmax(logits, 1)[0, 1, 0]
    extra = (-p.log() + (1 - p).log()) / 2
    assert positive.item() == pytest.approx((argmax + extra).item(), rel=1e-5)


def test_a_tempered_student_and_the_factor_t_squared():
    step = Step(student=LOGITS, teacher=LOGITS.flip(0))
    cool = Step(student=LOGITS / 3, teacher=LOGITS.flip(0))
    found = SoftTargetDiceBCE(temperature=3.0, student_temperature=3.0, scale_by_t2=True)(step)
    assert found.item() == pytest.approx(9 * SoftTargetDiceBCE(temperature=3.0)(cool).item())


def test_options_that_were_chosen_are_shown():
    term = SoftTargetDiceBCE(student_temperature=5.0, scale_by_t2=True, binarisation="soft")
    assert repr(term) == (
        "SoftTargetDiceBCE(temperature=5.0, student_temperature=5.0, scale_by_t2=True, "
        "binarisation='soft')"
    )
    assert repr(GroundTruth(ignore_index=255, resize="logits", class_weights=(1, 2))) == (
        "GroundTruth(class_weights=(1.0, 2.0), ignore_index=255, resize='logits')"
    )


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
def test_weights_of_a_batch_dice_do_not_change_a_perfect_prediction(weight):
    logits = torch.tensor([20.0, -20.0]).reshape(1, 2, 1).expand(2, 2, 4)
    fields = {"sample_weights": torch.full((2,), weight)}
    labels = torch.zeros(2, 4, dtype=torch.long)
    assert gt(logits, labels, fields=fields, batch_dice=True).item() == pytest.approx(0, abs=1e-5)


def test_a_mask_that_is_not_boolean_is_refused():
    with pytest.raises(ObjectiveError, match=r"`labelled` is torch.uint8; pass a boolean mask"):
        gt(LOGITS, MAP, fields={"labelled": torch.ones(3, dtype=torch.uint8)})


def test_a_weight_of_an_unlabelled_sample_is_never_read():
    fields = {
        "labelled": torch.tensor([True, False, True]),
        "sample_weights": torch.tensor([1.0, float("nan"), 1.0]),
    }
    kept = gt(LOGITS[[0, 2]], MAP[[0, 2]])
    assert gt(LOGITS, MAP, fields=fields).item() == pytest.approx(kept.item(), rel=1e-6)


def test_ignored_voxels_do_not_hide_a_wrong_shape():
    with pytest.raises(ShapeMismatchError, match=r"the target is \(3, 5, 5\)"):
        gt(LOGITS, torch.zeros(3, 5, 5, dtype=torch.long), ignore_index=255)


@pytest.mark.parametrize("sample_weights", [None, torch.tensor([0.5, 2.0])])
def test_a_sample_of_which_nothing_that_weighs_is_known_leaves_the_mean(sample_weights):
    logits, target = torch.randn(2, 2, 6), torch.randint(0, 2, (2, 2, 6))
    target[1, 1] = 255
    term = GroundTruth(activation="sigmoid", ignore_index=255, class_weights=(0.0, 1.0))
    found = term(Step(logits, target=target, sample_weights=sample_weights))
    alone = term(Step(logits[:1], target=target[:1]))
    assert found.item() == pytest.approx(alone.item(), rel=1e-6)
