"""The student starts from the teacher's weights, its first layer cut to what it sees."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from privdistill import (
    LayerNotFoundError,
    ModalityError,
    ObjectiveError,
    PrivilegedInput,
    ShapeMismatchError,
    inherit,
)

FOUR = ("flair", "t1", "t1ce", "t2")


def views(student, **options):
    return PrivilegedInput(FOUR, student=student, **options)


def network(channels, *, axes=2, width=8):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return nn.Sequential(conv(channels, width, 3, padding=1), nn.ReLU(), conv(width, 3, 1))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("seen", [("t1ce",), ("t2", "flair"), ("flair", "t1", "t2")])
def test_the_student_answers_as_the_teacher_does_without_the_other_modalities(axes, seen):
    inputs = views(seen)
    teacher, student = network(4, axes=axes), network(len(seen), axes=axes)
    report = inherit(student, teacher, inputs)
    image = torch.randn(2, 4, *[6] * axes)
    hidden = torch.tensor([[name in seen for name in FOUR]]).expand(2, -1)
    wanted = teacher(inputs.for_teacher(image, hidden))
    torch.testing.assert_close(student(inputs.for_student(image)), wanted)
    assert report.cut == ("0.weight",)
    assert report.left == {}
    assert report.share == 1


def test_channels_are_those_of_the_teachers_view():
    inputs = views(("t2",), teacher=("t2", "t1ce"))
    teacher, student = network(2), network(1)
    inherit(student, teacher, inputs)
    assert torch.equal(student[0].weight, teacher[0].weight[:, :1])


def test_a_modality_of_several_channels_is_cut_whole():
    inputs = PrivilegedInput({"depth": 1, "rgb": 3}, student=("rgb",))
    teacher, student = network(4), network(3)
    inherit(student, teacher, inputs)
    assert torch.equal(student[0].weight, teacher[0].weight[:, 1:])


def test_a_linear_embedding_of_single_voxels_is_cut():
    teacher, student = nn.Linear(4, 5), nn.Linear(1, 5)
    inherit(student, teacher, views(("t1",)))
    assert torch.equal(student.weight, teacher.weight[:, 1:2])


def test_an_embedding_whose_channels_cannot_be_told_is_left():
    teacher = nn.Sequential(nn.Linear(4 * 9, 5), nn.Linear(5, 50))
    student = nn.Sequential(nn.Linear(1 * 9, 5), nn.Linear(5, 50))
    report = inherit(student, teacher, views(("t1",)))
    assert "5 x 36" in report.left["0.weight"]
    assert report.share == pytest.approx(305 / 350)


def test_a_normalisation_of_the_input_is_cut_with_its_statistics():
    def net(channels):
        return nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 1))

    teacher, student = net(4), net(1)
    teacher[0].running_mean.copy_(torch.arange(4.0))
    report = inherit(student, teacher, views(("t1ce",)))
    assert student[0].running_mean == 2
    assert report.stale == ()


def test_the_normalisation_behind_the_cut_is_named():
    def net(channels):
        return nn.Sequential(
            nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        )

    report = inherit(net(1), net(4), views(("t1ce",)))
    assert report.stale == ("1",)
    assert "1: its statistics" in str(report)


@pytest.mark.parametrize(
    ("norm", "stale"),
    [
        (lambda channels: nn.GroupNorm(1, channels), ("0",)),
        (lambda channels: nn.LayerNorm([channels, 5, 5]), ("0",)),
        (lambda channels: nn.GroupNorm(channels, channels), ()),
        (lambda channels: nn.InstanceNorm2d(channels, affine=True), ()),
        (lambda channels: nn.GroupNorm(1, channels, affine=False), ()),
        (lambda channels: nn.LayerNorm([5, 5], elementwise_affine=False), ()),
    ],
)
def test_a_normalisation_of_all_modalities_together_is_named(norm, stale):
    def net(channels):
        return nn.Sequential(norm(channels), nn.Conv2d(channels, 8, 1))

    assert inherit(net(1), net(4), views(("t1ce",)), minimum=0).stale == stale


def test_one_filter_per_modality_is_cut_as_filters():
    def net(channels):
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3, groups=channels),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, 8, 1),
        )

    teacher, student = net(4), net(2)
    inputs = views(("t2", "t1"))
    report = inherit(student, teacher, inputs)
    # Statistics of a modality by itself are those that the student will see.
    assert (report.share, report.stale) == (1, ())
    assert torch.equal(student[0].weight, teacher[0].weight[[3, 1]])
    assert torch.equal(student[0].bias, teacher[0].bias[[3, 1]])


@pytest.mark.parametrize("width", [4, 16])
def test_groups_that_read_other_modalities_are_left_though_shapes_agree(width):
    teacher = nn.Sequential(nn.Conv2d(4, width, 3, groups=4), nn.Conv2d(width, 99, 1))
    student = nn.Sequential(nn.Conv2d(1, width, 3), nn.Conv2d(width, 99, 1))
    assert teacher[0].weight.shape == student[0].weight.shape
    before = student[0].weight.clone()
    report = inherit(student, teacher, views(("t1ce",)))
    assert "0.weight" in report.left
    assert torch.equal(student[0].weight, before)


def test_all_modalities_in_another_order_move_the_first_layers_channels():
    inputs = views(FOUR[::-1])
    teacher, student = network(4), network(4)
    inherit(student, teacher, inputs)
    image = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(student(inputs.for_student(image)), teacher(image))


def test_another_order_is_refused_where_several_layers_could_be_the_first():
    teacher, student = network(4, width=4), network(4, width=4)
    with pytest.raises(LayerNotFoundError, match=r"'0\.weight', '2\.weight'"):
        inherit(student, teacher, views(FOUR[::-1]))


class Scale(nn.Module):
    """A layer of one's own that normalises the input."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.rand(1, channels, 1, 1))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d,
        lambda channels: nn.BatchNorm2d(channels, affine=False),
        lambda channels: nn.GroupNorm(1, channels),
        nn.PReLU,
        nn.LayerNorm,
        Scale,
    ],
)
def test_another_order_is_refused_where_something_before_the_first_layer_knows_it(norm):
    def net():
        return nn.Sequential(norm(4), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1))

    with pytest.raises(LayerNotFoundError, match=r"'0\.weight', '1\.weight'"):
        inherit(net(), net(), views(FOUR[::-1]))


def test_another_order_reaches_no_layer_that_does_not_fit():
    teacher, student = network(4, width=6), network(4)
    report = inherit(student, teacher, views(FOUR[::-1]), minimum=0)
    assert list(report.left) == ["0.weight", "0.bias", "2.weight"]
    other = nn.Sequential(nn.Identity(), network(4))
    assert inherit(other, teacher, views(FOUR[::-1]), minimum=0).copied == ()


def test_statistics_of_all_modalities_in_another_order_are_not_stale():
    def net():
        return nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))

    assert inherit(net(), net(), views(FOUR[::-1])).stale == ()


class Branches(nn.Module):
    """An encoder for each modality, by number."""

    def __init__(self, modalities, name="encoders.{}"):
        super().__init__()
        self.encoders = nn.ModuleList()
        self.names = [name.format(number) for number in range(modalities)]
        for path in self.names:
            holder, _, last = path.rpartition(".")
            self.get_submodule(holder).add_module(last, nn.Conv2d(1, 8, 1))
        self.head = nn.Conv2d(8, 2, 1)


@pytest.mark.parametrize("name", ["encoders.{}", "encoder{}", "encoder_{}_first"])
def test_branches_of_single_modalities_are_not_taken_for_one_another(name):
    teacher, student = Branches(4, name), Branches(2, name)
    before = student.head.weight.clone()
    with pytest.raises(LayerNotFoundError, match="encoder"):
        inherit(student, teacher, views(("t1", "flair")))
    assert torch.equal(student.head.weight, before)
    inherit(student, teacher, views(("flair", "t1")))
    branches = [net.get_submodule(student.names[1]).weight for net in (student, teacher)]
    assert torch.equal(*branches)


def test_layers_of_another_depth_are_no_branches():
    def net(channels):
        deeper = [nn.Conv2d(8, 8, 3) for _ in range(channels)]
        return nn.ModuleDict({"stem": nn.Conv2d(channels, 8, 1), "stages": nn.Sequential(*deeper)})

    report = inherit(net(1), net(4), views(("t1ce",)), minimum=0)
    assert report.cut == ("stem.weight",)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_what_a_hook_computes_a_weight_from_is_not_cut_either(norm):
    def net(channels):
        return nn.Sequential(norm(nn.Conv2d(channels, 8, 3)), nn.Conv2d(8, 50, 1))

    report = inherit(net(1), net(4), views(("t1ce",)))
    assert report.cut == ()
    assert "0.weight_v" in report.left


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_what_a_weight_is_computed_from_is_not_cut(norm):
    def net(channels):
        return nn.Sequential(norm(nn.Conv2d(channels, 8, 3)), nn.Conv2d(8, 50, 1))

    report = inherit(net(1), net(4), views(("t1ce",)))
    assert report.cut == ()
    assert any(name.startswith("0.parametrizations") for name in report.left)
    teacher, student = net(4), net(4)
    assert inherit(student, teacher, views(FOUR)).left == {}


def test_a_modality_that_the_teacher_does_not_see_is_refused():
    with pytest.raises(ModalityError, match="t1ce"):
        inherit(network(1), network(1), views(("t1ce",), teacher=("t1",)))


def test_too_little_in_common_is_refused_and_nothing_is_written():
    teacher, student = network(4, width=6), network(1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(ShapeMismatchError, match=r"'0.weight'.*minimum=0"):
        inherit(student, teacher, views(("t1ce",)))
    after = student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    report = inherit(student, teacher, views(("t1ce",)), minimum=0)
    assert report.copied == ("2.bias",)
    assert torch.equal(student[2].bias, teacher[2].bias)


def test_buffers_that_no_state_dict_holds_are_copied_too():
    def net(value):
        module = nn.Conv2d(1, 1, 1)
        module.register_buffer("scale", torch.tensor(value), persistent=False)
        return module

    student = net(1.0)
    inherit(student, net(5.0))
    assert student.scale == 5


def test_modes_flags_and_the_teacher_stay():
    teacher, student = network(4).eval(), network(1).train()
    student[2].requires_grad_(False)
    weights = [p.clone() for p in teacher.parameters()]
    inherit(student, teacher, views(("t1",)))
    assert student.training
    assert not student[2].weight.requires_grad
    assert student[0].weight.requires_grad
    assert student[0].weight.grad_fn is None
    assert all(map(torch.equal, teacher.parameters(), weights))


def test_prefixes_of_the_compiler_and_of_ddp_are_seen_through():
    teacher, student = network(4), network(1)
    wrapped = nn.Module()
    wrapped.module = teacher
    assert inherit(torch.compile(student), torch.compile(wrapped), views(("t1",))).share == 1
    assert torch.equal(student[2].weight, teacher[2].weight)


@pytest.mark.parametrize("minimum", [None, -0.1, 2, "half"])
def test_a_minimum_that_is_no_share_is_refused(minimum):
    student, teacher = network(4), network(4)
    before = student[0].weight.clone()
    with pytest.raises(ObjectiveError, match="minimum"):
        inherit(student, teacher, minimum=minimum)
    assert torch.equal(student[0].weight, before)


def test_weights_that_the_teacher_ties_reach_a_student_that_does_not():
    shared = nn.Conv2d(2, 2, 1)
    student = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    report = inherit(student, nn.Sequential(shared, shared))
    assert report.left == {}
    assert torch.equal(student[1].weight, shared.weight)
