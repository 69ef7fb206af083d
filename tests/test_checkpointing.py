"""Activation checkpointing of both kinds, with taps inside, at and behind a checkpointed part."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from privdistill import GroundTruth, LatentKL, LifecycleError, Tap
from privdistill.taps.recorder import Recorder

IMAGE = torch.randn(2, 4, 8, 8)
LABELS = torch.randint(0, 3, (2, 8, 8))


class Recomputed(nn.Module):
    """Run a part of a network twice: forward, and again in the backward pass."""

    def __init__(self, part, reentrant):
        super().__init__()
        self.part, self.reentrant = part, reentrant

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=self.reentrant)


def gradients(build, student, tap):
    kd = build(
        student=student,
        objective=GroundTruth() + 10 * LatentKL(),
        taps={"bottleneck": Tap("bottleneck", tap)},
    )
    out = kd(IMAGE, LABELS)
    out.loss.backward()
    # a second step: what was recomputed must not have been recorded
    kd(IMAGE, LABELS)
    return [out.loss.detach(), *(p.grad.clone() for p in student.parameters())]


@pytest.fixture
def plain(build, networks):
    return gradients(build, copy.deepcopy(networks[1]), "bottleneck")


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


# The dry run needs no gradients, which this kind of checkpointing finds worth a warning.
reentry = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

# PyTorch 2.6 announces that this kind of wrapper will go.
future = pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl:FutureWarning")


@reentry
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("tap", ["bottleneck", "up"])
def test_promise_11_taps_at_and_behind_a_recomputed_part(build, networks, plain, reentrant, tap):
    student = networks[1]
    student.bottleneck = Recomputed(student.bottleneck, reentrant)
    if tap == "up":
        student.up = nn.Sequential(nn.Identity(), student.up)
    where = "bottleneck" if tap == "bottleneck" else "up.0"
    assert_equal(gradients(build, student, where), plain)


def test_promise_11_a_tap_inside_a_recomputed_part(build, networks, plain):
    student = networks[1]
    student.bottleneck = Recomputed(student.bottleneck, reentrant=False)
    assert_equal(gradients(build, student, "bottleneck.part"), plain)


@reentry
def test_promise_11_a_tap_inside_a_reentrant_part_is_an_error(build, networks):
    student = networks[1]
    student.bottleneck = Recomputed(student.bottleneck, reentrant=True)
    with pytest.raises(LifecycleError, match="carries no gradient in training"):
        gradients(build, student, "bottleneck.part.0")


@pytest.mark.parametrize(
    "tap", ["bottleneck", "bottleneck.1", "_checkpoint_wrapped_module.bottleneck"]
)
def test_promise_11_wrapped_layers_keep_their_names(build, networks, plain, tap):
    student = networks[1]
    student.bottleneck = checkpoint_wrapper(student.bottleneck)
    assert_equal(gradients(build, student, tap), plain)


@reentry
@future
@pytest.mark.parametrize("impl", [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT])
def test_both_kinds_of_wrapped_layers_give_equal_gradients(build, networks, plain, impl):
    student = networks[1]
    student.bottleneck = checkpoint_wrapper(student.bottleneck, impl)
    assert_equal(gradients(build, student, "bottleneck"), plain)


@reentry
@future
def test_a_tap_inside_a_reentrant_wrapper_is_an_error_that_names_the_layer(build, networks):
    student = networks[1]
    student.bottleneck = checkpoint_wrapper(student.bottleneck, CheckpointImpl.REENTRANT)
    with pytest.raises(LifecycleError, match=r"layer 'bottleneck\.0' carries no gradient"):
        gradients(build, student, "bottleneck.0")


@reentry
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_student_recomputed_as_a_whole(build, networks, plain, reentrant):
    student = Recomputed(networks[1], reentrant)
    # A pass that is recomputed as a whole needs an input with a gradient under reentry.
    if reentrant:
        with pytest.raises(LifecycleError, match="carries no gradient"):
            gradients(build, student, "part.bottleneck")
    else:
        assert_equal(gradients(build, student, "part.bottleneck"), plain)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_recomputation_records_nothing(build, networks, monkeypatch, role):
    teacher, student = networks
    part = Recomputed((student if role == "student" else teacher).bottleneck, reentrant=False)
    layer = {role: "bottleneck.part.0"}
    networks[role == "student"].bottleneck = part
    runs, records = [], []
    part.part[0].register_forward_hook(lambda *_: runs.append(role))
    record = Recorder.record
    monkeypatch.setattr(
        Recorder, "record", lambda self, *of: (records.append(self.role), record(self, *of))[1]
    )
    taps = {
        "bottleneck": Tap(
            layer.get("teacher", "bottleneck.0"), layer.get("student", "bottleneck.0")
        )
    }
    kd = build(taps=taps)
    runs.clear()
    records.clear()
    out = kd(IMAGE, LABELS)
    before = out.taps["bottleneck"].student.clone()
    out.loss.backward()
    # the teacher runs without gradients, so that nothing of it is recomputed
    assert len(runs) == (2 if role == "student" else 1)
    assert sorted(records) == ["student", "teacher"]
    assert torch.equal(out.taps["bottleneck"].student, before)
