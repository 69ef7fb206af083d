"""Mistakes of a caller that would be silent, or end in an error of somebody else's."""

import copy
import threading

import numpy as np
import pytest
import torch
from paths import IMAGE, LABELS
from torch import nn

from privdistill import (
    CacheError,
    Ensemble,
    GroundTruth,
    HintonKL,
    JointTeacher,
    LatentKL,
    LifecycleError,
    MovingAverage,
    ObjectiveError,
    PrivilegedInput,
    Ramp,
    SoftTargetDiceBCE,
    Tap,
    TeacherCache,
    Term,
)

SAME = PrivilegedInput(("flair", "t1", "t1ce", "t2"), student=("t1ce",), teacher=("t1ce",))


class Holds(Term):
    """A term that holds something."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, step):
        return step.student.mean()


@pytest.mark.parametrize("inside", [False, True])
def test_a_student_that_comes_from_meta_begins_at_step_zero(build, tiny_unet, inside):
    with torch.device("meta"):
        student = tiny_unet(1)
    kd = build(student=student, objective=Ramp(0, 1, steps=1000) * GroundTruth())
    filled = torch.empty_like

    def garbage(tensor, **options):
        return filled(tensor, **options).fill_(7)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", garbage)
        (nn.Sequential(kd) if inside else kd).to_empty(device="cpu")
    assert kd.steps == 0


@pytest.mark.parametrize("name", ["adapters", "taps", "cache"])
def test_what_a_step_was_built_with_cannot_be_set(build, name):
    kd = build()
    setattr(kd, name, getattr(kd, name))
    other = {"adapters": nn.ModuleDict(), "taps": {}, "cache": TeacherCache()}[name]
    with pytest.raises(LifecycleError, match=f"The {name} of a wrapper is fixed"):
        setattr(kd, name, other)


def test_views_that_are_set_later_are_read_as_at_first(build):
    kd = build(student=nn.Conv2d(4, 3, 1), inputs=None, objective=SoftTargetDiceBCE(), example=None)
    wanted = kd(IMAGE).loss
    kd.inputs = None
    assert kd(IMAGE).loss == wanted


def test_an_average_has_memory_of_its_own_where_the_student_s_is_expanded(build, tiny_unet):
    student = tiny_unet(1)
    student.register_buffer("scale", torch.ones(1).expand(4))
    student.head.bias = nn.Parameter(torch.zeros(1).expand(3))
    kd = build(teacher=MovingAverage(), student=student, inputs=SAME)
    for _ in range(2):
        assert kd(IMAGE, LABELS).loss.isfinite()


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_network_that_cannot_learn_is_refused(build, tiny_unet, role):
    with torch.inference_mode():
        network = tiny_unet(4 if role == "teacher" else 1)
    objective = GroundTruth() + GroundTruth(of="teacher").named("teacher")
    joint = JointTeacher(tiny_unet(4))
    given = {"teacher": joint, role: JointTeacher(network) if role == "teacher" else network}
    with pytest.raises(LifecycleError, match=rf"The {role}.*copy\.deepcopy"):
        build(objective=objective, **given)


def test_the_layers_of_a_network_are_no_ensemble(networks):
    both = nn.ModuleList([networks[0], copy.deepcopy(networks[0])])
    assert len(Ensemble(both).networks) == len(Ensemble(iter(both)).networks) == 2
    for wrong in (nn.Sequential(*both), networks[0], 3):
        with pytest.raises(ObjectiveError, match="there is no teacher in"):
            Ensemble(wrong)


def test_a_lone_number_is_no_weight_for_each(build, networks):
    with pytest.raises(ObjectiveError, match=r"\[3.0\] for 2 teachers"):
        Ensemble([networks[0]] * 2, weights=np.array(3.0))
    assert build(head_weights=3)(IMAGE, LABELS).loss.isfinite()


@pytest.mark.parametrize(
    "held", [threading.Lock(), torch.ones(1, requires_grad=True) * 2], ids=["lock", "graph"]
)
def test_a_term_that_cannot_be_copied_is_named(build, held):
    with pytest.raises(ObjectiveError, match=r"Holds\(\) cannot be copied"):
        build(objective=GroundTruth() + Holds(held))


def test_a_joint_teacher_that_nothing_trains_is_told(build, networks):
    with pytest.warns(UserWarning, match="trains the JointTeacher"):
        build(teacher=JointTeacher(networks[0]), objective=GroundTruth() + HintonKL())


@pytest.mark.parametrize("target", [LABELS.numpy(), LABELS.tolist()])
def test_a_target_that_is_no_tensor_is_refused(build, target):
    with pytest.raises(ObjectiveError, match=r"no target tensor but a (ndarray|list)"):
        build()(IMAGE, target)


@pytest.mark.parametrize("labelled", ["yes", [True], [[True, False]], [1, 0]])
@pytest.mark.parametrize("objective", [LatentKL(), GroundTruth()])
def test_a_mask_that_is_none_is_refused_whoever_reads_it(build, labelled, objective):
    with pytest.raises(ValueError, match="`labelled` is") as refused:
        build(objective=1.0 * objective)(IMAGE, LABELS, labelled=labelled)
    assert type(refused.value).__module__ == "privdistill.exceptions"


def test_taps_without_names_are_refused(build):
    with pytest.raises(ValueError, match=r"taps=\{'deep': Tap"):
        build(taps=[Tap("bottleneck", "bottleneck")])


class Store(dict):
    """A store of the user's own, with what it makes of an entry."""

    bytes = 0

    def __init__(self, change):
        super().__init__()
        self.change = change

    def get(self, teacher, name):
        entry = super().get((teacher, name))
        return entry and self.change(entry)

    def put(self, teacher, name, entry):
        self[teacher, name] = entry

    def __repr__(self):
        return "MyStore()"


@pytest.mark.parametrize(
    "change",
    [
        dict.fromkeys,
        lambda entry: {name: value.numpy() for name, value in entry.items()},
        lambda entry: list(entry.values()),
        lambda entry: {name: value + 1 for name, value in entry.items()},
        lambda entry: {name: value for name, value in entry.items() if name != "input"},
    ],
)
def test_a_store_that_gives_back_something_else_is_named(build, change):
    kd = build(cache=TeacherCache(store=Store(change)))
    kd(IMAGE, LABELS, key=["a", "b"])
    with pytest.raises(CacheError, match=r"the store, MyStore\(\)"):
        kd(IMAGE, LABELS, key=["a", "b"])


def test_a_store_s_class_is_no_store():
    with pytest.raises(CacheError, match="`store` is"):
        TeacherCache(store=Store)


def test_a_teacher_whose_weights_are_elsewhere_needs_a_version(build, networks):
    class Offloaded(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.scale = nn.Parameter(torch.empty(1, device="meta"))
            self.there = lambda x: factor * networks[0](x)
            self._hf_hook = None

        def forward(self, x):
            return self.there(x)

    def served(factor, **options):
        cache = TeacherCache(store=store, **options)
        kd = build(teacher=Offloaded(factor), objective=HintonKL(), cache=cache)
        kd(IMAGE, key=["a", "b"])
        return cache.statistics.hits

    store = Store(lambda entry: entry)
    with pytest.raises(CacheError, match="version="):
        served(1)
    assert [served(1, version="a"), served(1, version="a"), served(2, version="b")] == [0, 2, 0]
