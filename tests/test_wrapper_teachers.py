"""One teacher, several, an average of the student, and one that learns."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import privdistill.functional as F
from privdistill import (
    Ensemble,
    GroundTruth,
    HintonKL,
    JointTeacher,
    LatentKL,
    Layer,
    LayerNotFoundError,
    LifecycleError,
    ModalityError,
    MovingAverage,
    ObjectiveError,
    PrivilegedInput,
    ShapeMismatchError,
    SoftTargetDiceBCE,
    Tap,
    m3ae,
)

IMAGE = torch.randn(2, 4, 8, 8)
LABELS = torch.randint(0, 3, (2, 8, 8))
SAME = PrivilegedInput(("flair", "t1", "t1ce", "t2"), student=("t1ce",), teacher=("t1ce",))
JOINT = GroundTruth() + SoftTargetDiceBCE() + GroundTruth(of="teacher").named("teacher")


def soft_dice_bce(logits, soft, hard):
    p = logits.softmax(1)
    dice = (2 * (p * soft).sum((2, 3)) + 1e-5) / (p.sum((2, 3)) + soft.sum((2, 3)) + 1e-5)
    return 1 - dice.mean() + nn.functional.binary_cross_entropy(p, hard)


def test_several_teachers_teach_the_mean_of_their_softened_outputs(build, tiny_unet):
    teachers = [tiny_unet(4), tiny_unet(4)]
    kd = build(teacher=Ensemble(teachers, weights=[3, 1]), objective=1.0 * SoftTargetDiceBCE())
    out = kd(IMAGE, LABELS)
    first, second = (teacher(IMAGE) for teacher in teachers)
    soft = 0.75 * (first / 5).softmax(1) + 0.25 * (second / 5).softmax(1)
    mean = 0.75 * first.softmax(1) + 0.25 * second.softmax(1)
    hard = nn.functional.one_hot(mean.argmax(1), 3).movedim(-1, 1).float()
    assert torch.allclose(out.loss, soft_dice_bce(out.student, soft, hard), atol=1e-6)
    assert torch.allclose(out.teacher.softmax(1), mean, atol=1e-6)


def test_a_list_of_equal_teachers_teaches_what_one_of_them_does(build, networks):
    one = build()(IMAGE, LABELS).loss
    two = build(teacher=[networks[0], networks[0]])(IMAGE, LABELS).loss
    assert torch.allclose(one, two, atol=1e-5)


def test_each_sample_is_taught_by_the_teachers_that_count_for_it(build, tiny_unet):
    teachers = [tiny_unet(4), tiny_unet(4)]
    kd = build(teacher=teachers, objective=1.0 * SoftTargetDiceBCE(temperature=2.0))
    out = kd(IMAGE, teacher_weights=torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    first, second = (teacher(IMAGE).softmax(1) for teacher in teachers)
    assert torch.allclose(out.teacher.softmax(1)[0], second[0], atol=1e-6)
    expected = 0.25 * first[1] + 0.75 * second[1]
    assert torch.allclose(out.teacher.softmax(1)[1], expected, atol=1e-6)
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in kd.student.parameters())


def test_equal_weights_of_teachers_change_nothing(build, tiny_unet):
    kd = build(teacher=[tiny_unet(4), tiny_unet(4)])
    plain = kd(IMAGE, LABELS).loss
    weighed = kd(IMAGE, LABELS, teacher_weights=torch.full((2, 2), 7.0)).loss
    assert torch.allclose(plain, weighed, atol=1e-6)


def test_teachers_are_left_out_in_sigmoid_regions_too(build, tiny_unet):
    kd = build(
        teacher=[tiny_unet(4), tiny_unet(4)],
        objective=1.0 * SoftTargetDiceBCE(),
        activation="sigmoid",
    )
    out = kd(IMAGE, teacher_weights=torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    alone = build(teacher=kd.teacher, objective=1.0 * SoftTargetDiceBCE(), activation="sigmoid")
    alone.student.load_state_dict(kd.student.state_dict())
    assert torch.allclose(out.loss, alone(IMAGE).loss, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[1.0, -1.0], [1.0, 1.0]], "must be finite and not negative"),
        ([[0.0, 0.0], [1.0, 1.0]], "each sample needs a teacher"),
        ([[float("nan"), 1.0], [1.0, 1.0]], "must be finite"),
    ],
)
def test_weights_of_teachers_that_make_no_sense_are_refused(build, tiny_unet, weights, message):
    kd = build(teacher=[tiny_unet(4), tiny_unet(4)], validate="always")
    with pytest.raises(ObjectiveError, match=message):
        kd(IMAGE, LABELS, teacher_weights=torch.tensor(weights))


def test_weights_of_another_number_of_teachers_are_refused(build, tiny_unet):
    kd = build(teacher=[tiny_unet(4), tiny_unet(4)])
    with pytest.raises(
        ShapeMismatchError, match=r"`teacher_weights` is \(2, 3\); expected \(2, 2\)"
    ):
        kd(IMAGE, LABELS, teacher_weights=torch.ones(2, 3))


def test_features_of_any_of_several_teachers_can_be_tapped(build, networks, tiny_unet):
    second = tiny_unet(4)
    taps = {"bottleneck": Tap(), "other": Tap(Layer("bottleneck", network=1), "bottleneck")}
    objective = GroundTruth() + LatentKL() + LatentKL(tap="other")
    out = build(teacher=[networks[0], second], taps=taps, objective=objective)(IMAGE, LABELS)
    assert not torch.equal(out.taps["bottleneck"].teacher, out.taps["other"].teacher)


def test_a_teacher_that_is_not_there_cannot_be_tapped(build):
    with pytest.raises(LayerNotFoundError, match="reads teacher 1, but there are 1"):
        build(taps={"bottleneck": Tap(teacher=Layer("bottleneck", network=1))})


def test_all_of_several_teachers_are_frozen_and_given_back(build, networks, tiny_unet):
    teachers = [networks[0], tiny_unet(4)]
    with build(teacher=teachers) as kd:
        kd.train()
        assert not any(teacher.training for teacher in teachers)
    assert all(teacher.training and teacher.head.weight.requires_grad for teacher in teachers)


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, float("inf")]])
def test_weights_that_do_not_fit_the_teachers_are_refused(networks, weights):
    with pytest.raises(ObjectiveError, match="one positive finite number each"):
        Ensemble([networks[0], networks[0]], weights)
    with pytest.raises(ObjectiveError, match="there is no teacher"):
        Ensemble([])


@pytest.mark.parametrize("form", [np.array, torch.tensor])
def test_weights_of_teachers_may_be_an_array_or_a_tensor(networks, form):
    weights = form([3, 1])
    assert Ensemble([networks[0], networks[0]], weights).shares == (0.75, 0.25)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:torch.quantize_per_tensor")
def test_printing_says_what_each_teacher_is(build, tiny_unet, networks):
    compiled = torch.compile(tiny_unet(4), backend="eager")
    small = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Flatten(), nn.Linear(256, 192), nn.Unflatten(1, (3, 8, 8))).eval()
    )
    text = f"{build(teacher=[networks[0], compiled, small], objective=SoftTargetDiceBCE())}\n"
    assert "teacher 1: TinyUNet, frozen\n" in text
    assert "teacher 2: TinyUNet, compiled, frozen\n" in text
    assert "teacher 3: Sequential, quantised, frozen\n" in text


def test_printing_says_how_a_teacher_changes(build, networks):
    assert "teacher: TinyUNet, average of" in str(build(teacher=MovingAverage(), inputs=SAME))
    assert "teacher: TinyUNet, trained too" in str(
        build(teacher=JointTeacher(networks[0]), objective=JOINT)
    )


def test_a_message_says_which_of_several_teachers_it_means(build, tiny_unet):
    with pytest.raises(ShapeMismatchError, match="The teacher 2 failed"):
        build(teacher=[tiny_unet(4), tiny_unet(3)])


@pytest.mark.parametrize("wrong", ["teacher.pt", [], [None], Ensemble(["a"])])
def test_what_is_no_network_is_refused(build, wrong):
    with pytest.raises(LifecycleError, match="expected a network, a list of them"):
        build(teacher=wrong)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_weights_in_place_of_a_network_are_refused_without_their_numbers(build, tiny_unet, role):
    with pytest.raises(LifecycleError, match="load_state_dict") as refused:
        build(**{role: tiny_unet(4).state_dict()})
    assert "tensor(" not in str(refused.value)


def test_the_average_follows_the_student(build):
    kd = build(teacher=MovingAverage(decay=0.5), inputs=SAME)
    mean = kd.teacher.head.weight
    first = kd.student.head.weight.detach().clone()
    kd(IMAGE, LABELS)
    assert torch.equal(mean, first)
    with torch.no_grad():
        kd.student.head.weight += 1
    kd(IMAGE, LABELS)
    assert torch.allclose(mean, first + 0.5)
    with torch.no_grad():
        kd.student.head.weight += 1
    kd(IMAGE, LABELS)
    # min(0.5, 1 - 1/3) = 0.5 of the old average, half of the new weights
    assert torch.allclose(mean, first + 1.25)


def test_the_average_takes_over_the_students_statistics(build, tiny_unet):
    student = tiny_unet(1)
    student.encoder.append(nn.BatchNorm2d(4))
    kd = build(teacher=MovingAverage(), student=student, inputs=SAME)
    kd(IMAGE, LABELS)
    seen = student.encoder[2].running_mean.clone()
    assert seen.any()
    kd(IMAGE, LABELS)
    assert torch.equal(kd.teacher.encoder[2].running_mean, seen)


def test_the_average_rests_in_eval_mode_and_gets_no_gradient(build):
    kd = build(teacher=MovingAverage(), inputs=SAME)
    kd(IMAGE, LABELS).loss.backward()
    before = copy.deepcopy(kd.teacher.state_dict())
    with torch.no_grad():
        kd.student.head.weight += 1
    kd.eval()(IMAGE, LABELS)
    assert all(torch.equal(value, before[name]) for name, value in kd.teacher.state_dict().items())
    assert not any(p.grad is not None for p in kd.teacher.parameters())


def test_an_average_of_a_student_that_sees_less_is_refused(build):
    with pytest.raises(ModalityError, match="the views differ"):
        build(teacher=MovingAverage())


def test_one_network_learns_from_what_it_says_when_it_sees_more(build, tiny_unet):
    names = ("flair", "t1", "t1ce", "t2")
    inputs = PrivilegedInput(names, student=names, dropout=0.5)
    network = tiny_unet(4)
    kd = build(teacher=MovingAverage(0), student=network, inputs=inputs, objective=m3ae())
    optimizer = torch.optim.SGD(kd.parameters(), lr=0.1)
    for _ in range(2):
        torch.manual_seed(1)
        view = inputs.for_training(IMAGE)
        assert not torch.equal(view, IMAGE)
        torch.manual_seed(1)
        out = kd(IMAGE, LABELS)
        own, other = (network.bottleneck(network.down(network.encoder(x))) for x in (view, IMAGE))
        expected = F.ground_truth(network(view), LABELS) + 0.1 * (own - other).square().mean()
        assert torch.allclose(out.loss, expected)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_decays_outside_the_unit_interval_are_refused(decay):
    with pytest.raises(ObjectiveError, match="must be in"):
        MovingAverage(decay)


@pytest.mark.parametrize("kind", ["average", "joint"])
def test_promise_15_the_state_of_a_teacher_that_changes_is_in_the_checkpoint(
    build, tiny_unet, kind
):
    def make():
        if kind == "average":
            return build(teacher=MovingAverage(), student=tiny_unet(1), inputs=SAME)
        return build(teacher=JointTeacher(tiny_unet(4)), student=tiny_unet(1), objective=JOINT)

    one, other = make(), make()
    assert not torch.equal(one.teacher.head.weight, other.teacher.head.weight)
    assert "teacher.head.weight" in one.state_dict()
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.teacher.head.weight, other.teacher.head.weight)
    with pytest.raises(RuntimeError, match=r"Missing key.*teacher\.head\.weight"):
        other.load_state_dict(one.student.state_dict(prefix="student."))


@pytest.mark.parametrize("kind", ["average", "joint"])
def test_a_teacher_that_changes_takes_assigned_values_as_they_are(build, tiny_unet, kind):
    if kind == "average":
        kd = build(teacher=MovingAverage(), inputs=SAME)
    else:
        kd = build(teacher=JointTeacher(tiny_unet(4)), objective=JOINT)
    learns = kd.teacher.head.weight.requires_grad
    state = {name: value.clone() for name, value in kd.state_dict().items()}
    kd.load_state_dict(state, assign=True)
    weight = kd.teacher.head.weight
    assert weight.data_ptr() == state["teacher.head.weight"].data_ptr()
    assert weight.requires_grad == learns


def test_a_joint_teacher_learns_from_its_own_term_alone(build):
    def gradient(objective):
        teacher = copy.deepcopy(build.__closure__[0].cell_contents[0])
        kd = build(teacher=JointTeacher(teacher), objective=objective)
        kd(IMAGE, LABELS).loss.backward()
        return kd, teacher.head.weight.grad

    kd, alone = gradient(1.0 * GroundTruth(of="teacher"))
    _, together = gradient(JOINT)
    assert torch.allclose(alone, together)
    assert kd.teacher.training
    assert not kd.eval().teacher.training


def test_mutual_training_is_a_term_with_the_roles_exchanged(build, networks):
    class FromStudent(HintonKL):
        def forward(self, step):
            return super().forward(replace(step, student=step.teacher, teacher=step.student))

    kd = build(teacher=JointTeacher(networks[0]), objective=1.0 * FromStudent(temperature=1.0))
    out = kd(IMAGE, LABELS)
    out.loss.backward()
    student, teacher = out.student.softmax(1), out.teacher.softmax(1)
    wanted = (student * (student / teacher).log()).sum(1).mean()
    assert torch.allclose(out.loss, wanted, atol=1e-6)
    assert all(p.grad.any() for p in kd.teacher.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in kd.student.parameters())


def test_promise_15_a_joint_teacher_is_among_the_parameters(build, networks):
    kd = build(teacher=JointTeacher(networks[0]), objective=JOINT)
    optimizer = torch.optim.Adam(kd.parameters(), lr=1e-2)
    first = kd(IMAGE, LABELS)
    first.loss.backward()
    optimizer.step()
    assert kd(IMAGE, LABELS).terms["teacher"] < first.terms["teacher"]


def test_a_frozen_teacher_cannot_be_supervised(build):
    with pytest.raises(ObjectiveError, match="this one is frozen"):
        build(objective=JOINT)(IMAGE, LABELS)


@pytest.mark.parametrize("teacher", ["average", "joint"])
def test_a_copy_has_a_changing_teacher_of_its_own(build, networks, teacher):
    chosen = MovingAverage() if teacher == "average" else JointTeacher(networks[0])
    inputs = SAME if teacher == "average" else build_inputs()
    kd = build(
        teacher=chosen, inputs=inputs, objective=SoftTargetDiceBCE() if inputs is SAME else JOINT
    )
    twin = copy.deepcopy(kd)
    assert twin.teacher is not kd.teacher
    with torch.no_grad():
        kd.teacher.head.weight += 1
    assert not torch.equal(twin.teacher.head.weight, kd.teacher.head.weight)
    assert torch.isfinite(twin(IMAGE, LABELS).loss)


def build_inputs():
    return PrivilegedInput(("flair", "t1", "t1ce", "t2"), student=("t1ce",))


def test_promise_15_no_distance_sends_gradients_into_a_joint_teacher(build, networks):
    class Distance(LatentKL):
        def forward(self, step):
            pair = step.taps["bottleneck"]
            return (pair.student - pair.teacher).square().mean()

    with pytest.warns(UserWarning, match="trains the JointTeacher"):
        kd = build(teacher=JointTeacher(networks[0].eval()), objective=GroundTruth() + Distance())
    assert networks[0].training
    kd(IMAGE, LABELS).loss.backward()
    assert all(p.grad is None for p in kd.teacher.parameters())


def test_a_joint_teacher_of_several_heads_is_refused(build, tiny_unet):
    class Deep(tiny_unet):
        def forward(self, x):
            out = super().forward(x)
            return [out, out[..., ::2, ::2]]

    with pytest.raises(ObjectiveError, match="returns 2 heads"):
        build(teacher=JointTeacher(Deep(4)), objective=JOINT)(IMAGE, LABELS)


def test_an_average_in_half_precision_is_refused(build):
    kd = build(teacher=MovingAverage(), inputs=SAME).bfloat16()
    with pytest.raises(LifecycleError, match="stops moving"):
        kd(IMAGE.bfloat16(), LABELS)


def test_a_student_starts_from_the_weights_of_its_teacher(build, networks):
    teacher, student = networks
    kd = build(start="teacher")
    assert torch.equal(student.encoder[0].weight, teacher.encoder[0].weight[:, 2:3])
    assert torch.equal(student.bottleneck[0].weight, teacher.bottleneck[0].weight)
    assert kd.inherited.share == 1
    assert "start: 100.0% of the student's parameters" in repr(kd)
    assert build(teacher=networks[0], student=type(student)(1)).inherited is None


@pytest.mark.parametrize("declare", [lambda net: [net, copy.deepcopy(net)], JointTeacher])
@pytest.mark.filterwarnings("ignore:No term of")
def test_it_starts_from_the_first_of_several_and_from_one_that_learns(build, networks, declare):
    teacher, student = networks
    build(teacher=declare(teacher), start="teacher")
    assert torch.equal(student.head.weight, teacher.head.weight)


def test_a_start_that_nobody_can_give_is_refused_and_leaves_the_student(build, tiny_unet):
    with pytest.raises(ObjectiveError, match="teacher=None"):
        build(teacher=None, objective=GroundTruth(), start="teacher")
    with pytest.raises(ObjectiveError, match="MovingAverage"):
        build(teacher=MovingAverage(), inputs=SAME, start="teacher")
    with pytest.raises(ObjectiveError, match="`start` must be"):
        build(start="random")
    other = tiny_unet(4, width=8)
    with pytest.raises(ShapeMismatchError, match="nothing was written"):
        build(teacher=other, start="teacher")
    assert other.training
