"""Deep supervision: every head is distilled and supervised."""

import numpy as np
import pytest
import torch
from torch import nn

from privdistill import (
    GroundTruth,
    JointTeacher,
    LatentKL,
    ObjectiveError,
    ShapeMismatchError,
    SoftTargetDiceBCE,
)

IMAGE = torch.randn(2, 4, 8, 8)
LABELS = torch.randint(0, 3, (2, 8, 8))


@pytest.fixture
def deep(tiny_unet):
    """A network with a second head at half resolution, in train mode only."""

    class Deep(tiny_unet):
        def __init__(self, in_channels):
            super().__init__(in_channels)
            self.coarse = nn.Conv2d(8, 3, 1)

        def forward(self, x):
            skip = self.encoder(x)
            bottom = self.bottleneck(self.down(skip))
            fine = self.head(torch.cat((skip, self.up(bottom)), dim=1))
            return [self.coarse(bottom), fine] if self.training else fine

    return Deep


def test_both_heads_are_returned_finest_first(build, deep):
    out = build(student=deep(1))(IMAGE, LABELS)
    assert [head.shape for head in out.student] == [(2, 3, 8, 8), (2, 3, 4, 4)]
    assert [head.shape for head in out.teacher] == [(2, 3, 8, 8), (2, 3, 4, 4)]


def test_a_single_head_stays_a_tensor(build, deep):
    kd = build(student=deep(1)).eval()
    assert kd(IMAGE, LABELS).student.shape == (2, 3, 8, 8)
    assert kd.predict(IMAGE).shape == (2, 3, 8, 8)


def test_terms_are_the_weighted_mean_over_heads(build, deep):
    kd = build(student=deep(1), head_weights=[3, 1])
    out = kd(IMAGE, LABELS)
    fine, coarse = out.student
    teacher = out.teacher[0]
    hot = nn.functional.one_hot(LABELS, 3).movedim(-1, 1).float()
    # references are never resized: the coarse head meets them at full resolution
    large = nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=False)
    supervised = 0.75 * dice_bce(fine, hot, hot) + 0.25 * dice_bce(large, hot, hot)
    assert torch.allclose(out.terms["ground_truth"], supervised, atol=1e-6)
    small = nn.functional.avg_pool2d(teacher, 2)
    distilled = 0.75 * soft(fine, teacher) + 0.25 * soft(coarse, small)
    assert torch.allclose(out.terms["soft_target_dice_bce"], distilled, atol=1e-6)


def dice_bce(logits, dice_target, bce_target):
    p = logits.softmax(1)
    overlap = (p * dice_target).sum((2, 3))
    dice = (2 * overlap + 1e-5) / (p.sum((2, 3)) + dice_target.sum((2, 3)) + 1e-5)
    return 1 - dice.mean() + nn.functional.binary_cross_entropy(p, bce_target)


def soft(logits, teacher):
    hard = nn.functional.one_hot(teacher.argmax(1), 3).movedim(-1, 1).float()
    return dice_bce(logits, (teacher / 5).softmax(1), hard)


def test_feature_terms_are_computed_once(build, deep):
    calls = []

    class Counted(LatentKL):
        def forward(self, step):
            calls.append(step.student.shape)
            return super().forward(step)

    build(student=deep(1), objective=GroundTruth() + Counted())(IMAGE, LABELS)
    assert len(calls) == 1


def test_gradients_reach_every_head(build, deep):
    kd = build(student=deep(1), objective=1.0 * SoftTargetDiceBCE())
    kd(IMAGE, LABELS).loss.backward()
    assert kd.student.coarse.weight.grad.abs().sum() > 0
    assert kd.student.head.weight.grad.abs().sum() > 0


def test_a_teacher_with_heads_teaches_each_resolution_with_its_own(build, deep):
    class Always(deep):
        def forward(self, x):
            self.training, mode = True, self.training
            try:
                return super().forward(x)
            finally:
                self.training = mode

    teacher = Always(4)
    out = build(teacher=teacher, student=deep(1))(IMAGE, LABELS)
    coarse, fine = teacher(IMAGE)
    assert torch.equal(out.teacher[0], fine)
    assert torch.equal(out.teacher[1], coarse)


def test_stacked_heads_are_distilled(build, tiny_unet):
    class Stacked(tiny_unet):
        def forward(self, x):
            out = super().forward(x)
            return torch.stack((out, 2 * out), dim=1) if self.training else out

    out = build(student=Stacked(1))(IMAGE, LABELS)
    assert len(out.student) == 2
    assert torch.equal(out.teacher[0], out.teacher[1])


def test_printing_shows_the_weights(build, deep):
    assert "weight of each head: 0.667 (8 x 8), 0.333 (4 x 4)" in str(build(student=deep(1)))


def test_wrong_head_weights_are_found_when_the_wrapper_is_built(build, deep):
    with pytest.raises(ShapeMismatchError, match="returns 2 heads, and `head_weights` has 3"):
        build(student=deep(1), head_weights=[1, 1, 1])
    with pytest.raises(ObjectiveError, match="not negative"):
        build(student=deep(1), head_weights=[-1, 2])


def test_a_selector_may_leave_heads_out(build, deep):
    kd = build(student=deep(1), select_logits=lambda o: o[1] if isinstance(o, list) else o)
    assert kd(IMAGE, LABELS).student.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("wrong", [lambda _: None, lambda _: ["logits"], lambda o: o[:, 0, 0]])
def test_a_selector_that_finds_no_logits_is_told_so(build, wrong):
    with pytest.raises(ShapeMismatchError, match="`select_logits` gave"):
        build(select_logits=wrong)


def test_networks_of_different_resolution_are_refused_without_an_example_too(build, tiny_unet):
    class Half(tiny_unet):
        def forward(self, x):
            return super().forward(x)[..., ::2, ::2]

    kd = build(student=Half(1), objective=1.0 * SoftTargetDiceBCE(), example=None)
    with pytest.raises(ShapeMismatchError, match="at the same resolution"):
        kd(IMAGE, LABELS)


@pytest.mark.parametrize("form", [np.array, torch.tensor])
def test_weights_of_heads_may_be_an_array_or_a_tensor(build, deep, form):
    kd = build(student=deep(1), head_weights=form([3, 1]))
    assert kd.head_weights == [3, 1]
    assert "0.75 (8 x 8), 0.25 (4 x 4)" in str(kd)
    kd(IMAGE, LABELS).loss.backward()


def test_weights_for_heads_that_are_not_there_are_refused(build):
    with pytest.raises(ShapeMismatchError, match="returns 1 heads, and `head_weights` has 2"):
        build(head_weights=[1, 1])


class Nested(nn.Module):
    """Decoders inside each other, whose heads have one size; the shallowest comes first."""

    def __init__(self, in_channels, *, supervised=True, form=list):
        super().__init__()
        self.encoder, self.down = nn.Conv2d(in_channels, 4, 1), nn.Conv2d(4, 4, 2, 2)
        self.bottleneck = nn.Conv2d(4, 4, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.heads = nn.ModuleList([nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)])
        self.form = form
        if supervised:
            self.deep_supervision = True

    def forward(self, x):
        shallow = self.encoder(x)
        deep = nn.functional.interpolate(self.bottleneck(self.down(shallow)), size=x.shape[2:])
        inner = self.inner(shallow)
        outer = self.outer(torch.cat((inner, deep), 1))
        heads = [head(maps) for head, maps in zip(self.heads, (inner, outer), strict=True)]
        return heads[1] if self.form is not list and not self.training else heads


def main_head(kd, image=IMAGE[:, 2:3]):
    return kd.student(image)[1]


@pytest.mark.parametrize("form", [list, "one in eval mode"])
def test_the_main_head_of_nested_decoders_comes_first(build, form):
    kd = build(teacher=Nested(4, form=form), student=Nested(1, form=form))
    out = kd(IMAGE, LABELS)
    assert len(out.student) == 2
    assert torch.equal(out.student[0], main_head(kd))
    kd.eval()
    last = kd.student(IMAGE[:, 2:3])
    assert torch.equal(kd.predict(IMAGE), last if form is not list else last[1])


def test_what_only_train_mode_returns_is_no_head_unless_asked_for(build):
    student = Nested(1, supervised=False, form="one in eval mode")
    out = build(student=student)(IMAGE, LABELS)
    assert torch.equal(out.student, student(IMAGE[:, 2:3])[1])
    asked = build(student=student, head_weights=[3, 1])
    assert [len(asked(IMAGE, LABELS).student)] == [2]


def test_a_list_of_which_nothing_tells_the_logits_is_refused(build):
    with pytest.raises(ShapeMismatchError, match="select_logits"):
        build(student=Nested(1, supervised=False))


def test_alternative_branches_are_not_one_deep_supervision(build):
    class Alternatives(Nested):
        def forward(self, x):
            shallow = self.encoder(x)
            deep = nn.functional.interpolate(self.bottleneck(self.down(shallow)), size=x.shape[2:])
            joined = torch.cat((shallow, deep), 1)
            return [self.heads[0](self.inner(deep)), self.heads[1](self.outer(joined))]

    with pytest.raises(ShapeMismatchError, match="select_logits"):
        build(student=Alternatives(1))


class Decoders(nn.Module):
    """Two heads on one feature map each; the second goes on through a coarser level."""

    def __init__(self, in_channels, form):
        super().__init__()
        self.body, self.down = nn.Conv2d(in_channels, 4, 1), nn.Conv2d(4, 4, 2, 2)
        self.bottom, self.fuse = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.first, self.last, self.form = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1), form

    def forward(self, x):
        shallow = self.body(x)
        deep = nn.functional.interpolate(self.bottom(self.down(shallow)), size=x.shape[2:])
        first = self.first(shallow)
        last = self.last(self.fuse(torch.cat((shallow, deep), 1)))
        return self.form(self, first, last)


ALONE_IN_EVAL_MODE = {
    "tuple": lambda a, b: (a, b),
    "tuple in a list": lambda a, b: [(a, b)],
    "beside a coarse head": lambda a, b: (a[..., ::2, ::2], a, b),
    "stack": lambda a, b: torch.stack((a, b), 1),
    "stack of a part": lambda a, b: [torch.stack((a, b), 1)],
}


@pytest.mark.parametrize("form", ALONE_IN_EVAL_MODE.values(), ids=ALONE_IN_EVAL_MODE)
@pytest.mark.parametrize("main", [0, 1])
def test_what_eval_mode_returns_alone_is_the_main_head_in_every_form(build, form, main):
    def arrange(net, *heads):
        net.seen = heads[main]
        return form(*heads) if net.training else heads[main]

    kd = build(student=Decoders(1, arrange), objective=GroundTruth())
    out = kd(IMAGE, LABELS)
    trained = out.student[0] if isinstance(out.student, list) else out.student
    assert torch.equal(trained, kd.student.seen)


def test_a_head_that_a_tuple_refines_is_not_the_main_one(build):
    class Refining(Decoders):
        def forward(self, x):
            shallow = self.body(x)
            coarse = self.first(nn.functional.interpolate(self.down(shallow), size=x.shape[2:]))
            return coarse, self.last(shallow) + coarse

    kd = build(teacher=Refining(4, None), student=Refining(1, None))
    out, both = kd(IMAGE, LABELS), kd.student(IMAGE[:, 2:3])
    assert torch.equal(out.student, both[1])
    assert torch.equal(kd.predict(IMAGE), both[1])
    weighted = build(student=Refining(1, None), head_weights=[3, 1])
    assert len(weighted(IMAGE, LABELS).student) == 2


def test_a_tuple_whose_second_tensor_goes_on_through_other_levels_is_asked_about(build):
    student = Decoders(1, lambda _net, first, last: (first, last))
    with pytest.raises(ShapeMismatchError, match="select_logits"):
        build(student=student)
    kd = build(student=student, objective=GroundTruth(), select_logits=lambda out: out[1])
    assert torch.equal(kd(IMAGE, LABELS).student, student(IMAGE[:, 2:3])[1])


def test_the_bottleneck_is_that_of_the_main_head(build):
    class Deeper(Decoders):
        def forward(self, x):
            half = self.down(self.body(x))
            coarse = nn.functional.interpolate(self.first(half), size=x.shape[2:])
            quarter = self.bottom(half[..., ::2, ::2])
            fine = nn.functional.interpolate(quarter, size=x.shape[2:])
            return coarse, self.last(fine) + coarse

    kd = build(student=Deeper(1, None))
    assert str(kd.taps["bottleneck"].student) == "bottom"


@pytest.mark.parametrize("word", ["semi-supervised", "unsupervised", "deep superpixels"])
def test_only_words_for_deep_supervision_make_heads_of_a_list(build, word):
    class Spoken(Decoders):
        __doc__ = f"A {word} network."

    with pytest.raises(ShapeMismatchError, match="select_logits"):
        build(student=Spoken(1, lambda _net, *heads: list(heads)))


@pytest.mark.parametrize("word", ["deep supervision", "deeply-supervised", "DeepSup"])
def test_words_for_deep_supervision_make_heads_of_a_list(build, word):
    class Spoken(Decoders):
        __doc__ = f"A network ({word})."

    kd = build(student=Spoken(1, lambda _net, *heads: list(heads)))
    assert len(kd(IMAGE, LABELS).student) == 2


@pytest.mark.parametrize("alone", [True, False])
def test_decoders_that_differ_by_a_layer_are_no_deep_supervision(build, alone):
    class Alternatives(Decoders):
        """Two decoders of one encoder, in a network with deep supervision."""

        def __init__(self, in_channels):
            super().__init__(in_channels, None)
            self.short = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1))
            self.long = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1))

        def forward(self, x):
            deep = nn.functional.interpolate(self.down(self.body(x)), size=x.shape[2:])
            heads = [self.short(deep), self.long(deep)]
            return heads[1] if alone and not self.training else heads

    if alone:
        assert isinstance(build(student=Alternatives(1))(IMAGE, LABELS).student, torch.Tensor)
    else:
        with pytest.raises(ShapeMismatchError, match="select_logits"):
            build(student=Alternatives(1))


def test_regions_on_an_axis_of_their_own_are_no_heads(build, tiny_unet):
    class Folded(tiny_unet):
        def forward(self, x):
            return super().forward(x)[:, :, None]

    with pytest.raises(ShapeMismatchError, match="select_logits"):
        build(teacher=Folded(4), student=Folded(1), activation="sigmoid")


def test_weights_for_all_heads_settle_those_of_a_teacher_too(build):
    def arrange(_net, *heads):
        return list(heads)

    kd = build(teacher=Decoders(4, arrange), student=Decoders(1, arrange), head_weights=[1, 1])
    assert len(kd(IMAGE, LABELS).student) == 2


def test_the_teacher_that_does_not_fit_is_named(build, tiny_unet):
    class Two(tiny_unet):
        def forward(self, x):
            return super().forward(x)[:, :2]

    with pytest.raises(ShapeMismatchError, match=r"teacher 2 \(1, 2, 8, 8\)"):
        build(teacher=[tiny_unet(4), Two(4)])


def test_a_reconstruction_beside_the_logits_is_no_head(build, tiny_unet):
    class Reconstructing(tiny_unet):
        def __init__(self, in_channels):
            super().__init__(in_channels)
            self.image = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            logits = super().forward(x)
            return logits, self.image(logits)

    kd = build(student=Reconstructing(1))
    out = kd(IMAGE, LABELS)
    assert torch.equal(out.student, kd.student(IMAGE[:, 2:3])[0])
    out.loss.backward()
    assert kd.student.image.weight.grad is None


class Pair(nn.Module):
    """Logits, and eight channels of features as fine as these."""

    def __init__(self, in_channels, arrange, apart=False):
        super().__init__()
        self.body, self.head = nn.Conv2d(in_channels, 8, 3, padding=1), nn.Conv2d(8, 3, 1)
        self.other, self.arrange, self.apart = nn.Conv2d(8, 8, 1), arrange, apart

    def forward(self, x):
        maps = self.body(x)
        return self.arrange(self.head(maps), self.other(maps) if self.apart else maps)


def test_features_as_fine_as_the_logits_may_stand_behind_them(build):
    kd = build(student=Pair(1, lambda logits, maps: (logits, maps)), objective=GroundTruth())
    assert kd(IMAGE, LABELS).student.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("form", [tuple, list])
@pytest.mark.parametrize("apart", [True, False])
def test_of_tensors_with_other_channels_the_first_is_not_taken_unasked(build, form, apart):
    student = Pair(1, lambda logits, maps: form((maps, logits)), apart=apart)
    with pytest.raises(ShapeMismatchError, match=r"\(1, 8, 8, 8\), \(1, 3, 8, 8\).*select_logits"):
        build(student=student, objective=GroundTruth())
    kd = build(student=student, objective=GroundTruth(), select_logits=lambda out: out[1])
    assert kd(IMAGE, LABELS).student.shape == (2, 3, 8, 8)


SEVERAL = {
    "features first": lambda logits, maps: (maps, logits),
    "features last": lambda logits, maps: (logits, maps),
    "equal tensors": lambda logits, _: (logits, 2 * logits),
    "list": lambda logits, _: [logits, 2 * logits],
    "stack": lambda logits, _: torch.stack((logits, 2 * logits), 1),
}


@pytest.mark.parametrize("form", SEVERAL.values(), ids=SEVERAL)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_without_an_example_nothing_is_taken_of_several_tensors_of_one_size(build, form, role):
    several = {role: Pair(4 if role == "teacher" else 1, form)}
    kd = build(objective=SoftTargetDiceBCE(), example=None, **several)
    with pytest.raises(ShapeMismatchError, match=r"example=.*select_logits"):
        kd(IMAGE)


@pytest.mark.parametrize("form", [list, lambda heads: torch.stack(heads, 1)])
def test_without_an_example_as_many_weights_as_heads_say_that_all_are(build, form):
    student = Pair(1, lambda logits, _: form([logits, 2 * logits]))
    kd = build(student=student, objective=SoftTargetDiceBCE(), example=None, head_weights=[2, 1])
    heads = kd(IMAGE).student
    assert len(heads) == 2
    assert torch.equal(heads[1], 2 * heads[0])
    other = build(student=Pair(1, lambda *both: both), objective=GroundTruth(), example=None)
    with pytest.raises(ShapeMismatchError, match="select_logits"):
        other(IMAGE, LABELS)


def test_without_an_example_coarser_heads_and_features_are_told_by_their_size(build, deep):
    kd = build(student=deep(1), objective=SoftTargetDiceBCE(), example=None)
    assert [head.shape for head in kd(IMAGE).student] == [(2, 3, 8, 8), (2, 3, 4, 4)]
    student = Pair(1, lambda logits, maps: (maps[..., ::2, ::2], logits, maps.mean((2, 3))))
    kd = build(student=student, objective=SoftTargetDiceBCE(), example=None)
    assert kd(IMAGE).student.shape == (2, 3, 8, 8)


def test_what_a_joint_teacher_returns_in_train_mode_is_settled_too(build):
    teacher = Decoders(4, lambda net, *heads: heads if net.training else heads[1])
    objective = GroundTruth() + GroundTruth(of="teacher").named("teacher")
    out = build(teacher=JointTeacher(teacher), objective=objective)(IMAGE, LABELS)
    assert torch.equal(out.teacher, teacher(IMAGE)[1])


def test_of_tensors_that_cannot_be_followed_none_is_taken_unasked(build):
    class Marked(torch.Tensor):
        pass

    student = Pair(1, lambda logits, maps: (maps.as_subclass(Marked), logits.as_subclass(Marked)))
    with pytest.raises(ShapeMismatchError, match="select_logits"):
        build(student=student, objective=GroundTruth())


def test_what_only_train_mode_returns_beside_the_logits_leaves_no_doubt(build):
    class Embedding(Pair):
        def forward(self, x):
            both = super().forward(x)
            return both if self.training else both[0]

    student = Embedding(1, lambda logits, maps: (logits, maps), apart=True)
    kd = build(student=student, objective=GroundTruth())
    assert kd(IMAGE, LABELS).student.shape == (2, 3, 8, 8)


def test_the_finest_tensor_is_the_logits(build):
    def arrange(logits, maps):
        return maps[..., ::2, ::2], logits

    kd = build(student=Pair(1, arrange), objective=GroundTruth())
    assert kd(IMAGE, LABELS).student.shape == (2, 3, 8, 8)
