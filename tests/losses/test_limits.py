"""What every term must bear: one voxel, one class, nothing but background, equal networks."""

from contextlib import nullcontext

import pytest
import torch
from terms import KINDS, make

from privdistill import (
    AttentionTransfer,
    CenteredKernelAlignment,
    ChannelWise,
    GroundTruth,
    LatentKL,
    ObjectiveError,
    PairwiseSimilarity,
    SoftTargetDiceBCE,
    Step,
    TapPair,
)

EVERY = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def step(term, student, teacher, labels, **options):
    """A step whose logits and features are the same tensors."""
    taps = dict.fromkeys(term.taps, TapPair(student, teacher))
    image = student.detach()[:, :1]
    return Step(student, teacher, target=labels, taps=taps, image=image, **options)


def assert_learnable(kind, student, teacher, labels, **options):
    term = make(kind)
    student.requires_grad_()
    given = step(term, student, teacher, labels, **options)
    term.build(given)
    loss = term(given)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@EVERY
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_one_voxel(kind, axes):
    student, teacher = torch.randn(2, 2, 3, *[1] * axes).unbind()
    labels = torch.ones(2, *[1] * axes, dtype=torch.long)
    # Some compare nothing that one voxel has, and would be zero for any features.
    voxels = (AttentionTransfer, CenteredKernelAlignment, ChannelWise, PairwiseSimilarity)
    with pytest.raises(ObjectiveError) if kind in voxels else nullcontext():
        assert_learnable(kind, student, teacher, labels)


@EVERY
def test_one_class(kind):
    labels = (torch.rand(2, 1, 4, 4) > 0.5).long()
    student, teacher = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    assert_learnable(kind, student, teacher, labels, activation="sigmoid")


@EVERY
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_nothing_but_background(kind, activation):
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    target = labels if activation == "softmax" else torch.zeros(2, 3, 4, 4)
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert_learnable(kind, student, teacher, target, activation=activation)


@EVERY
def test_equal_networks(kind):
    z = torch.randn(2, 3, 4, 4)
    assert_learnable(kind, z.clone(), z, z.argmax(1))


@pytest.mark.parametrize("kind", [GroundTruth, LatentKL, SoftTargetDiceBCE])
def test_value_does_not_change_with_the_patch_size(kind):
    term = kind()

    def value(size):
        student, teacher = torch.randn(2, 1, 3, *[size] * 3).unbind()
        labels = (teacher + torch.randn(teacher.shape)).argmax(1)
        return term(step(term, student + teacher, teacher, labels)).item()

    small = value(32)
    assert small > 0.01
    assert value(64) == pytest.approx(small, rel=0.05)
