"""Whether distillation is going to help, measured by hand and by separate losses."""

import copy
import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from privdistill import (
    DistillationWrapper,
    FeatureL2,
    GroundTruth,
    HintonKL,
    JointTeacher,
    LatentKL,
    MovingAverage,
    ObjectiveError,
    PrivilegedInput,
    Ramp,
    ShapeMismatchError,
    SoftTargetDiceBCE,
    Tap,
    TeacherCache,
    Term,
    diagnose,
    fit_temperature,
    target_agreement,
)
from privdistill.functional import centered_kernel_alignment

IMAGE = torch.randn(2, 4, 8, 8)
LABELS = torch.randint(0, 3, (2, 8, 8))


class Fixed(nn.Module):
    """A teacher that says what it is told, in train mode another thing."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, image):
        return self.logits[: len(image)] * (0 if self.training else 1)


def region(inside, outside, *, size=1000, gap=4.0):
    """Logits of one region: `inside` voxels of `gap`, the others of `-gap * outside`."""
    logits = torch.full((1, 1, size), -gap * outside)
    logits[..., :inside] = gap
    return logits


def fitted(logits, *options, **more):
    images = torch.zeros(len(logits), 1, *logits.shape[2:])
    return fit_temperature(Fixed(logits), [images], *options, **more)


# --- the temperature


def test_a_hard_teacher_allows_all_and_a_small_class_of_moderate_logits_little():
    assert fitted(1e4 * torch.randn(2, 3, 50)) == 5.0
    assert 1 <= fitted(region(5, 1, gap=7.0), activation="sigmoid") < 1.5


def test_a_teacher_that_no_temperature_changes_allows_all():
    assert fitted(1e-3 * torch.randn(1, 3, 50)) == 5.0


@pytest.mark.parametrize("agreement", [0.8, 0.9, 0.99])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_at_the_temperature_found_the_worst_class_keeps_what_was_asked(agreement, activation):
    logits = 3 * torch.randn(2, 3, 500)
    found = fitted(logits, 20.0, agreement, activation)
    kept = target_agreement(logits, found, activation=activation).min().item()
    assert 1 < found < 20
    assert kept == pytest.approx(agreement, abs=0.005)


@given(st.integers(1, 900), st.floats(0.5, 20), st.floats(0.1, 1), st.floats(0.1, 1))
def test_who_asks_for_more_agreement_gets_no_higher_temperature(inside, gap, first, second):
    logits = region(inside, 1, gap=gap)
    less, more = sorted((first, second))
    low, high = (fitted(logits, 5.0, a, "sigmoid") for a in (more, less))
    assert 1 <= low <= high <= 5


def test_batches_are_pooled_in_whatever_form_they_come():
    logits = 3 * torch.randn(4, 3, 6, 6)
    scores = nn.Conv2d(3, 3, 1)
    whole = fit_temperature(scores, [logits])
    first, second = logits.split(2)
    batches = [(first, None), {"image": second, "affine": 1}]
    assert fit_temperature(scores, iter(batches)) == pytest.approx(whole)
    assert fit_temperature(scores, [{"scan": logits}], names={"image": "scan"}) == whole


def test_the_teachers_view_is_taken_from_the_full_input():
    inputs = PrivilegedInput(("a", "b", "c"), student=("a",), teacher=("c", "b"))
    teacher, image = nn.Conv2d(2, 3, 1), torch.randn(1, 3, 9, 9)
    found = fit_temperature(teacher, [image], inputs=inputs)
    assert found == fit_temperature(teacher, [image[:, [2, 1]]])


def test_of_several_tensors_the_logits_are_those_that_the_wrapper_would_take():
    class Two(nn.Module):
        def __init__(self, head, arrange):
            super().__init__()
            self.head, self.refine, self.arrange = head, nn.Conv2d(3, 3, 1), arrange

        def forward(self, x):
            logits = self.head(x)
            return self.arrange(logits, self.refine(logits) + logits)

    def temperature(arrange):
        torch.manual_seed(0)
        return fit_temperature(Two(nn.Conv2d(1, 3, 1), arrange), [images])

    images = 9 * torch.randn(2, 1, 8, 8)
    first, last = (temperature(lambda *both, i=i: both[i]) for i in range(2))
    assert first != last
    assert temperature(lambda *both: both) == last
    with pytest.raises(ShapeMismatchError, match="select_logits"):
        temperature(lambda *both: list(both))
    torch.manual_seed(0)
    both = Two(nn.Conv2d(1, 3, 1), lambda *both: list(both))
    assert fit_temperature(both, [images], select_logits=lambda output: output[0]) == first


def test_modalities_that_are_absent_and_metadata_are_taken_as_in_a_step():
    class Marked(torch.Tensor):
        def as_tensor(self):
            return self.as_subclass(torch.Tensor)

    class Features(nn.Conv2d):
        def forward(self, x):
            features = 2 * x
            return super().forward(features), features

    inputs = PrivilegedInput(("a", "b"), student=("a",))
    teacher, image = Features(2, 3, 1), torch.randn(2, 2, 9, 9)
    present = torch.tensor([[True, False], [True, True]])
    filled = fit_temperature(teacher, [inputs.for_teacher(image, present)])
    batch = {"image": image.as_subclass(Marked), "present": present}
    assert fit_temperature(teacher, [batch], inputs=inputs) == filled
    whole = fit_temperature(teacher, [image])
    assert fit_temperature(teacher, [batch]) == whole != filled


def test_the_teacher_runs_in_eval_mode_and_keeps_its_modes():
    teacher = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1), nn.Dropout().eval())
    teacher[0].eval()
    before = copy.deepcopy(teacher.state_dict())
    fit_temperature(teacher, [torch.randn(2, 1, 8, 8)])
    assert [m.training for m in teacher] == [False, True, False]
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        ({"at_most": 0.5}, "at_most"),
        ({"agreement": 0.0}, "agreement"),
        ({"agreement": 1.1}, "agreement"),
        ({"agreement": None}, "agreement"),
        ({"at_most": None}, "at_most"),
        ({"activation": "tanh"}, "tanh"),
    ],
)
def test_options_without_a_meaning_are_refused(options, quoted):
    with pytest.raises(ObjectiveError, match=quoted):
        fitted(torch.randn(1, 2, 5), **options)


def test_no_batch_no_class_and_no_numbers_are_refused():
    with pytest.raises(ObjectiveError, match="no batch"):
        fit_temperature(nn.Conv2d(1, 2, 1), [])
    with pytest.raises(ObjectiveError, match="no class"):
        fitted(torch.full((1, 1, 5), -1.0), activation="sigmoid")
    with pytest.raises(ObjectiveError, match="NaN"):
        fitted(torch.full((1, 2, 5), torch.nan))
    region_of_nan = torch.tensor([[[1.0, -1.0], [1.0, torch.nan]]])
    with pytest.raises(ObjectiveError, match="NaN"):
        fitted(region_of_nan, activation="sigmoid")


def test_no_temperature_fits_a_teacher_that_says_background_everywhere():
    logits = torch.rand(1, 3, 4, 10)
    logits[:, 0] += 1
    with pytest.raises(ObjectiveError, match="everywhere"):
        fitted(logits)
    assert on_fixed(logits, [1.0, 0.0, 0.0], torch.zeros(1, 4, 10).long()).fitted is None
    # Many classes share what T 5 takes from the background, and no T would be better.
    sure, objective = torch.zeros(1, 20, 4, 10), SoftTargetDiceBCE(temperature=5.0)
    sure[:, 0] = 7
    told = on_fixed(sure, [1.0] + 19 * [0.0], torch.zeros(1, 4, 10).long(), objective=objective)
    assert told.classes[0].agreement < 0.5
    assert told.fitted is None
    # Of regions, one alone is a decision.
    assert 1 < fitted(logits - 1, activation="sigmoid") <= 5


# --- the terms


def check_alone(build, terms, **options):
    """Compare each term's row with the gradient of a wrapper that has this term alone."""
    kd = build(objective=sum(weight * term for weight, term in terms), **options)
    found = diagnose(kd, [(IMAGE, LABELS)])
    slopes = []
    for weight, term in terms:
        alone = build(student=kd.student, objective=weight * term)
        wanted = list(kd.student.parameters())
        parts = torch.autograd.grad(
            alone(IMAGE, LABELS).loss, wanted, allow_unused=True, materialize_grads=True
        )
        slopes.append(torch.cat([part.flatten() for part in parts]))
    total = sum(slope.norm() for slope in slopes)
    for row, slope, (weight, _) in zip(found.terms, slopes, terms, strict=True):
        assert row.weight == pytest.approx(weight)
        assert row.share == pytest.approx((slope.norm() / total).item(), rel=1e-4)
        cosine = torch.cosine_similarity(slope, slopes[-1], dim=0).item()
        assert row.cosine == pytest.approx(cosine, abs=1e-4)


def test_shares_and_cosines_are_those_of_each_term_alone(build):
    check_alone(build, [(0.75, SoftTargetDiceBCE()), (10, LatentKL()), (0.25, GroundTruth())])


class TwoHeads(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.down = nn.Conv2d(channels, 6, 2, stride=2)
        self.coarse, self.fine = nn.Conv2d(6, 3, 1), nn.ConvTranspose2d(6, 3, 2, stride=2)

    def forward(self, image):
        features = self.down(image)
        fine = self.fine(features)
        return [fine, self.coarse(features)] if self.training else fine


def test_under_deep_supervision_a_term_is_the_sum_of_its_heads(build):
    check_alone(build, [(0.5, SoftTargetDiceBCE()), (2, GroundTruth())], student=TwoHeads(1))


def test_values_times_weights_make_the_loss_under_schedules_and_balance(build):
    kd = build(objective=(Ramp(2, 4, steps=2) * HintonKL() + GroundTruth()).balanced())
    kd(IMAGE, LABELS)
    found = diagnose(kd, [(IMAGE, LABELS)])
    loss = kd(IMAGE, LABELS).loss.item()
    assert sum(row.value * row.weight for row in found.terms) == pytest.approx(loss)


def test_a_term_under_two_names_has_two_weights(build):
    term = HintonKL()
    found = diagnose(build(objective=2 * term + 3 * term.named("other")), [IMAGE])
    assert [row.weight for row in found.terms] == pytest.approx([2, 3])
    assert [row.share for row in found.terms] == pytest.approx([0.4, 0.6])


def test_batches_without_a_label_do_not_thin_the_gradient_of_the_others(build):
    kd = build(objective=HintonKL() + GroundTruth())
    unlabelled = {"image": IMAGE, "labelled": torch.tensor([False, False])}
    alone = diagnose(kd, [(IMAGE, LABELS)])
    mixed = diagnose(kd, [(IMAGE, LABELS), unlabelled])
    assert mixed.terms[0].cosine == pytest.approx(alone.terms[0].cosine)
    assert mixed.terms[1].value == pytest.approx(alone.terms[1].value)
    assert [row.cosine for row in diagnose(kd, [unlabelled]).terms] == [None]


def test_without_ground_truth_there_is_no_cosine(build):
    found = diagnose(build(objective=HintonKL() + LatentKL()), [IMAGE])
    assert [row.cosine for row in found.terms] == [None, None]
    assert sum(row.share for row in found.terms) == pytest.approx(1)


def test_a_term_that_trains_the_teacher_alone_has_no_share(build, networks):
    objective = GroundTruth() + GroundTruth(of="teacher").named("teacher")
    found = diagnose(
        build(teacher=JointTeacher(networks[0]), objective=objective), [(IMAGE, LABELS)]
    )
    assert [row.share for row in found.terms] == pytest.approx([1, 0])


# --- teacher, student and taps


def on_fixed(teacher, student, target, activation="softmax", objective=None):
    kd = DistillationWrapper(
        Fixed(teacher),
        nn.Conv2d(1, teacher.shape[1], 1),
        objective=objective or SoftTargetDiceBCE(temperature=2.0) + GroundTruth(),
        activation=activation,
    )
    nn.init.zeros_(kd.student.weight)
    kd.student.bias.data = torch.tensor(student)
    return diagnose(kd, [(torch.randn(len(teacher), 1, *teacher.shape[2:]), target)])


def test_dice_lead_and_calibration_by_hand():
    # Four voxels; the teacher calls three of them 1 with probability 0.75, of which one is.
    one = torch.tensor([0.0, 1.0986123])
    teacher = torch.stack([one, one, one, -one], dim=1).reshape(1, 2, 2, 2)
    target = torch.tensor([[[1, 0], [0, 0]]])
    found = on_fixed(teacher, [1.0, 0.0], target)
    zero, first = found.classes
    assert first.teacher == pytest.approx(2 * 1 / (3 + 1))
    assert zero.teacher == pytest.approx(2 * 1 / (1 + 3))
    assert zero.student == pytest.approx(2 * 3 / (4 + 3))
    assert first.student == 0
    assert first.lead == pytest.approx(0.5)
    assert first.calibration == pytest.approx(0.75 - 1 / 3)
    assert zero.calibration == pytest.approx(0.25)
    kept = target_agreement(teacher, 2.0)
    assert [row.agreement for row in found.classes] == pytest.approx(kept.tolist())


def test_an_activation_of_the_terms_own_decides_what_is_said_of_its_target():
    teacher, target = 3 * torch.randn(2, 3, 8, 8), torch.randint(0, 2, (2, 3, 8, 8)).float()
    terms = [term(activation="sigmoid") for term in (SoftTargetDiceBCE, GroundTruth)]
    own = on_fixed(teacher, [1.0, 0.0, 0.5], target, objective=terms[0] + terms[1])
    whole = on_fixed(
        teacher, [1.0, 0.0, 0.5], target, "sigmoid", SoftTargetDiceBCE() + GroundTruth()
    )
    assert (own.classes, own.fitted) == (whole.classes, whole.fitted)


@pytest.mark.parametrize("shares", [{}, {"teacher_weights": torch.tensor([[1.0, 3.0], [1, 1]])}])
def test_an_activation_of_the_terms_own_is_that_of_the_mean_of_several_teachers(shares):
    torch.manual_seed(0)
    image, target = torch.randn(2, 1, 8, 8), torch.randint(0, 2, (2, 3, 8, 8)).float()
    members, student = [Fixed(3 * torch.randn(2, 3, 8, 8)) for _ in "ab"], nn.Conv2d(1, 3, 1)

    def found(activation, own):
        objective = SoftTargetDiceBCE(activation=own) + GroundTruth(activation=own)
        kd = DistillationWrapper(members, student, objective=objective, activation=activation)
        with kd:
            return diagnose(kd, [{"image": image, "target": target, **shares}])

    own, whole = found("softmax", "sigmoid"), found("sigmoid", None)
    assert (own.classes, own.fitted) == (whole.classes, whole.fitted)


def test_a_term_that_weighs_nothing_is_not_the_one_that_softens():
    objective = (
        0.0 * SoftTargetDiceBCE(temperature=3.0)
        + SoftTargetDiceBCE(temperature=1.5).named("second")
        + GroundTruth()
    )
    teacher, target = torch.randn(1, 2, 4, 4), torch.randint(0, 2, (1, 4, 4))
    assert on_fixed(teacher, [0.0, 0.0], target, objective=objective).temperature == 1.5


@pytest.mark.parametrize("teacher", [0.0, torch.nan])
def test_logits_that_hold_nan_are_refused(teacher):
    logits, target = torch.full((1, 2, 4, 4), teacher), torch.zeros(1, 4, 4).long()
    with pytest.raises(ObjectiveError, match="NaN"):
        on_fixed(logits, [torch.nan if teacher == 0 else 0.0, 1.0], target)


def test_what_is_said_of_ignored_voxels_counts_for_nothing():
    teacher, target = 3 * torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    target[:, 4:] = 255
    whole = on_fixed(teacher, [1.0, 0.0, 0.5], target, objective=HintonKL())
    part = on_fixed(teacher[:, :, :4], [1.0, 0.0, 0.5], target[:, :4], objective=HintonKL())
    assert whole.classes == part.classes


def test_ignored_voxels_and_unlabelled_samples_count_for_nothing(build):
    kd = build(objective=SoftTargetDiceBCE() + GroundTruth(ignore_index=255))
    target = LABELS.clone()
    target[0, :4] = 255
    part = diagnose(kd, [(IMAGE, target)])
    target[1] = 77
    known = torch.tensor([True, False])
    mixed = diagnose(kd, [{"image": IMAGE, "target": target, "labelled": known}])
    alone = diagnose(kd, [(IMAGE[:1], target[:1])])
    assert [row.teacher for row in mixed.classes] == [row.teacher for row in alone.classes]
    assert part.classes != alone.classes


def test_equal_networks_have_equal_features():
    network = nn.Sequential(nn.Conv2d(2, 5, 3, 2), nn.ReLU(), nn.Upsample(9), nn.Conv2d(5, 2, 1))
    kd = DistillationWrapper(
        copy.deepcopy(network),
        network,
        objective=FeatureL2("deep"),
        taps={"deep": Tap(teacher="0", student="0")},
        example=torch.zeros(1, 2, 9, 9),
    )
    found = diagnose(kd, [torch.randn(2, 2, 9, 9)])
    assert found.similarity == {"deep": pytest.approx(1, abs=1e-5)}
    assert any("'deep'" in sentence for sentence in found.advice)


def test_similarity_of_one_sample_is_that_of_the_term(build):
    kd = build()
    term = centered_kernel_alignment(*kd(IMAGE[:1], LABELS[:1]).taps["bottleneck"])
    found = diagnose(kd, [(IMAGE[:1], LABELS[:1])])
    assert found.similarity["bottleneck"] == pytest.approx(1 - term.item(), abs=1e-4)


# --- what it says


@pytest.mark.filterwarnings("ignore:soft_target_dice_bce")  # the term may say so too
def test_a_temperature_that_loses_a_class_is_named_with_one_that_keeps_it():
    teacher = region(5, 1, gap=7.0).reshape(1, 1, 10, 100)
    found = on_fixed(
        teacher, [0.0], (teacher > 0).float(), "sigmoid", SoftTargetDiceBCE() + GroundTruth()
    )
    assert found.fitted == pytest.approx(fitted(teacher, activation="sigmoid"))
    assert found.classes[0].agreement < 0.5
    said = " ".join(found.advice)
    assert f"{found.classes[0].agreement:.0%}" in said
    assert f"{found.fitted:.2g}" in said


def test_each_sentence_rests_on_a_number_that_is_printed(build):
    kd = build(objective=SoftTargetDiceBCE() + 1e-6 * GroundTruth() + 1e6 * LatentKL())
    found = diagnose(kd, [(IMAGE, LABELS)])
    said = "\n".join(found.advice)
    assert "latent_kl makes" in said
    assert "ground_truth makes" in said
    assert all(sentence in str(found) for sentence in found.advice)
    assert all(row.name in str(found) for row in found.terms)


def test_the_weight_it_names_makes_the_term_half_of_the_gradient(build):
    kd = build(objective=GroundTruth() + 1e4 * LatentKL())
    share = diagnose(kd, [(IMAGE, LABELS)]).terms[1].share
    even = 1e4 * (1 - share) / share
    kd = build(student=kd.student, objective=GroundTruth() + even * LatentKL())
    assert diagnose(kd, [(IMAGE, LABELS)]).terms[1].share == pytest.approx(0.5, abs=1e-3)


def test_numbers_are_plain_and_the_figure_shows_them(build, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need it")
    found = diagnose(build(), [(IMAGE, LABELS)])
    numbers = json.loads(json.dumps(found.to_dict()))
    assert numbers["terms"][0]["name"] == "soft_target_dice_bce"
    figure = found.plot()
    shares = [bar.get_width() / 100 for bar in figure.axes[0].patches]
    assert shares == pytest.approx([row.share for row in found.terms])
    figure.savefig(tmp_path / "diagnosis.png")


# --- what it leaves alone


def test_nothing_is_changed(build):
    kd = build(
        teacher=MovingAverage(),
        student=nn.Sequential(
            nn.Conv2d(4, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.Dropout(), nn.Upsample(scale_factor=2)
        ),
        inputs=None,
        objective=(HintonKL() + GroundTruth()).balanced(),
    )
    kd(IMAGE, LABELS).loss.backward()
    kd.student[2].eval()
    state = copy.deepcopy(kd.state_dict())
    modes = [m.training for m in kd.modules()]
    grads = [p.grad.clone() for p in kd.student.parameters()]
    hooks = [len(m._forward_hooks) for m in kd.modules()]
    before = torch.get_rng_state()
    loader = torch.utils.data.DataLoader([(IMAGE[0], LABELS[0])] * 4, 2, shuffle=True)
    diagnose(kd, loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(state[name], value) for name, value in kd.state_dict().items())
    assert [m.training for m in kd.modules()] == modes
    assert all(map(torch.equal, grads, (p.grad for p in kd.student.parameters())))
    assert [len(m._forward_hooks) for m in kd.modules()] == hooks
    assert kd.steps == 1


def test_the_cache_is_neither_read_nor_filled(build):
    kd = build(cache=TeacherCache())
    diagnose(kd, [{"image": IMAGE, "target": LABELS, "key": ["a", "b"]}])
    assert kd.cache.statistics.misses == 0
    kd(IMAGE, LABELS, key=["a", "b"])
    assert kd.cache.statistics.hits == 0


def test_it_reads_no_more_batches_than_it_is_told(build):
    batches = iter([(IMAGE, LABELS)] * 6)
    assert diagnose(build(), batches, limit=2).batches == 2
    assert len(list(batches)) == 4
    assert diagnose(build(), [(IMAGE, LABELS)] * 6, limit=None).batches == 6
    with pytest.raises(ObjectiveError, match="no batch"):
        diagnose(build(), [])


@pytest.mark.parametrize("limit", [-1, 0, 1.5, "2"])
def test_a_limit_that_is_no_number_of_batches_is_refused(build, limit):
    with pytest.raises(ObjectiveError, match="limit"):
        diagnose(build(), [(IMAGE, LABELS)], limit=limit)


class OfTheTeachersMean(Term):
    """Reads logits of any number of classes."""

    needs_teacher = True

    def forward(self, step):
        return (step.student.mean() - step.teacher.mean()).square()


@pytest.mark.parametrize("classes", [2, 5])
def test_a_teacher_of_other_classes_leads_where_both_have_one(classes):
    kd = DistillationWrapper(
        nn.Conv2d(4, classes, 1), nn.Conv2d(4, 3, 1), objective=OfTheTeachersMean() + GroundTruth()
    )
    rows = diagnose(kd, [(IMAGE, LABELS)]).classes
    shared = min(classes, 3)
    assert [row.lead is None for row in rows] == [index >= shared for index in range(3)]
    assert [row.student is None for row in rows] == [False] * 3


def test_numbers_of_classes_hold_the_lead(build):
    found = diagnose(build(), [(IMAGE, LABELS)])
    assert [row["lead"] for row in found.to_dict()["classes"]] == [
        row.teacher - row.student for row in found.classes
    ]


@pytest.mark.parametrize("how", [torch.compile, lambda kd: kd.compile() or kd])
def test_a_compiled_wrapper_is_diagnosed_as_the_wrapper_itself(build, how):
    kd = build()
    plain = diagnose(kd, [(IMAGE, LABELS)])
    assert diagnose(how(kd), [(IMAGE, LABELS)]) == plain


# --- any wrapper


def kinds(tiny_unet):
    one_hot = nn.functional.one_hot(LABELS, 3).movedim(-1, 1).float()
    yield "regions", {"activation": "sigmoid"}, (IMAGE, one_hot)
    yield "several teachers", {"teacher": [tiny_unet(4), tiny_unet(4)]}, (IMAGE, LABELS)
    yield "no taps", {"objective": HintonKL() + GroundTruth()}, (IMAGE, LABELS)
    yield "features alone", {"objective": LatentKL() + GroundTruth()}, (IMAGE, LABELS)
    yield "no reference at hand", {}, IMAGE
    yield "no sample labelled", {}, {"image": IMAGE, "labelled": torch.zeros(2).bool()}
    parts = {name: IMAGE[:, [i]] for i, name in enumerate(("flair", "t1", "t1ce", "t2"))}
    present = torch.tensor([[True, True, True, False]] * 2)
    yield "by modality", {}, {"image": parts, "target": LABELS, "present": present}
    yield "no teacher", {"teacher": None, "objective": GroundTruth()}, (IMAGE, LABELS)
    volume = {"teacher": tiny_unet(4, axes=3), "student": tiny_unet(1, axes=3)}
    volume["example"] = torch.zeros(1, 4, 8, 8, 8)
    labels = LABELS[..., None].expand(2, 8, 8, 8)
    yield "volumes", volume, (IMAGE[..., None].expand(2, 4, 8, 8, 8).contiguous(), labels)


@pytest.mark.parametrize("index", range(9))
def test_it_works_for_every_kind_of_wrapper(build, tiny_unet, index):
    _, options, batch = list(kinds(tiny_unet))[index]
    found = diagnose(build(**options), [batch])
    assert sum(row.share for row in found.terms) == pytest.approx(1)
    assert str(found)
    json.dumps(found.to_dict())


def test_it_takes_less_than_two_seconds(build):
    kd = build(example=torch.zeros(1, 4, 64, 64))
    start = time.perf_counter()
    diagnose(kd, [(torch.randn(2, 4, 64, 64), torch.randint(0, 3, (2, 64, 64)))])
    assert time.perf_counter() - start < 2


def test_the_order_of_batches_with_and_without_labels_does_not_matter(build):
    kd = build()
    none = {"image": IMAGE, "target": LABELS, "labelled": torch.tensor([False, False])}
    batches = [none, (IMAGE, LABELS)]
    assert diagnose(kd, batches).classes == diagnose(kd, batches[::-1]).classes


def test_which_samples_are_labelled_may_be_a_list(build):
    batch = {"image": torch.rand(2, 4, 8, 8), "target": torch.randint(0, 3, (2, 8, 8))}
    kd = build()
    tensor = diagnose(kd, [{**batch, "labelled": torch.tensor([True, False])}])
    assert diagnose(kd, [{**batch, "labelled": [True, False]}]).classes == tensor.classes
