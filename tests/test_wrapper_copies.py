"""Copies of a wrapper, of its student and of its teacher; files that hold them."""

import copy
import gc
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from privdistill import (
    GroundTruth,
    JointTeacher,
    LatentKL,
    Layer,
    LifecycleError,
    MovingAverage,
    PrivilegedInput,
    Tap,
)

IMAGE = torch.randn(2, 4, 8, 8)
LABELS = torch.randint(0, 3, (2, 8, 8))
SAME = PrivilegedInput(("flair", "t1", "t1ce", "t2"), student=("t1ce",), teacher=("t1ce",))
COPIES = {
    "shallow": copy.copy,
    "deep": copy.deepcopy,
    "pickled": lambda kd: pickle.loads(pickle.dumps(kd)),
}


def hooks(*models):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for net in models for m in net.modules()
    )


@pytest.fixture(params=["frozen", "average", "joint"])
def kd(build, networks, request):
    if request.param == "average":
        return build(teacher=MovingAverage(), inputs=SAME)
    joint = {
        "objective": GroundTruth(of="teacher") + LatentKL(),
        "teacher": JointTeacher(networks[0]),
    }
    return build(**joint) if request.param == "joint" else build()


@pytest.mark.parametrize("how", COPIES)
def test_promise_14_the_death_of_a_copy_leaves_the_original_whole(kd, how):
    before = hooks(kd.student, kd.teacher)
    mode, wanted = kd.teacher.training, kd(IMAGE, LABELS).loss
    twin = COPIES[how](kd)
    assert twin(IMAGE, LABELS).loss == wanted
    del twin
    gc.collect()
    assert hooks(kd.student, kd.teacher) == before
    assert kd.teacher.training == mode
    assert kd(IMAGE, LABELS).loss == wanted


@pytest.mark.parametrize("how", COPIES)
def test_promise_14_the_death_of_the_original_leaves_a_copy_whole(kd, how):
    wanted = kd(IMAGE, LABELS).loss
    twin = COPIES[how](kd)
    kd.close()
    assert twin(IMAGE, LABELS).loss == wanted
    twin.close()
    assert hooks(twin.student, twin.teacher) == 0


def test_promise_14_copies_of_copies_run(build):
    kd = build(taps={"bottleneck": Tap("bottleneck", Layer("up", at="input"))})
    wanted = kd(IMAGE, LABELS).loss
    for make in (copy.deepcopy, copy.copy, *COPIES.values(), copy.deepcopy):
        kd = make(kd)
        assert kd(IMAGE, LABELS).loss == wanted
    kd.close()
    assert hooks(kd.student) == 0


def test_promise_14_a_student_copied_in_mid_training_is_free(build):
    kd = build(taps={"bottleneck": Tap("bottleneck", Layer("up", at="input"))})
    twin = copy.deepcopy(kd.student)
    assert torch.equal(twin(IMAGE[:, 2:3]), kd.predict(IMAGE))
    other = build(student=twin)
    assert torch.isfinite(other(IMAGE, LABELS).loss)
    other.close()
    assert torch.isfinite(kd(IMAGE, LABELS).loss)


def test_promise_14_networks_saved_in_mid_training_load_without_privdistill(build, tmp_path):
    def net(channels):
        down, head = nn.Conv2d(channels, 4, 3, 2, 1), nn.Conv2d(4, 3, 1)
        return nn.Sequential(down, nn.Upsample(scale_factor=2), head)

    taps = {"bottleneck": Tap(Layer("0", at="input"), Layer("1", at="input"), adapter=None)}
    taps |= {"after": Tap("0", "0")}
    kd = build(teacher=net(4), student=net(1), taps=taps, objective=build().objective.terms[1])
    kd(IMAGE, LABELS).loss.backward()
    torch.save([kd.student, kd.teacher], tmp_path / "networks.pt")
    script = f"""
        import sys
        sys.modules["privdistill"] = None
        import torch
        student, teacher = torch.load({str(tmp_path / "networks.pt")!r}, weights_only=False)
        print(student(torch.ones(1, 1, 8, 8)).shape, teacher(torch.ones(1, 4, 8, 8)).shape)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.count("torch.Size([1, 3, 8, 8])") == 2, result.stderr


def test_promise_3_another_teacher_is_refused_and_nothing_is_registered(kd, tiny_unet):
    keys, parameters = set(kd.state_dict()), list(kd.parameters())
    with pytest.raises(LifecycleError, match="fixed when the wrapper is built"):
        kd.teacher = tiny_unet(4)
    assert set(kd.state_dict()) == keys
    assert all(p is q for p, q in zip(kd.parameters(), parameters, strict=True))


def test_a_student_compiled_later_takes_the_place_of_the_student(build):
    kd = build()
    wanted, calls = kd(IMAGE, LABELS).loss, []
    student = nn.Sequential(kd.student)
    student.register_forward_hook(lambda *_: calls.append(1))
    kd.student = student
    assert kd(IMAGE, LABELS).loss == wanted
    assert calls
