"""Teacher and student joined for nnU-Net's step, without its plans and files."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from privdistill import (
    GroundTruth,
    LatentKL,
    ObjectiveError,
    PrivilegedInput,
    SoftTargetDiceBCE,
    Tap,
)

pytest.importorskip("nnunetv2", reason="the extra nnunet is not installed")

from privdistill.integrations.nnunet_joint import (
    JointLoss,
    build_wrapper,
    refuse_reference,
    train_adapters,
)

TAPS = {"bottleneck": Tap("0", "0")}


def network(channels, width):
    return nn.Sequential(nn.Conv2d(channels, width, 1), nn.Conv2d(width, 2, 1))


def joined(objective=None, *, width=3, regions=False, **loss):
    trainer = SimpleNamespace(
        network=network(1, width),
        inputs=PrivilegedInput(["0:t1", "1:t1ce"], student=["1:t1ce"]),
        device=torch.device("cpu"),
        configuration_manager=SimpleNamespace(patch_size=[4, 4]),
        label_manager=SimpleNamespace(has_regions=regions),
        loss=SimpleNamespace(**loss),
    )
    return build_wrapper(trainer, network(2, 3), objective or LatentKL(), TAPS)


@pytest.mark.parametrize(("regions", "activation"), [(False, "softmax"), (True, "sigmoid")])
def test_the_wrapper_is_told_what_nnunet_knows(regions, activation):
    kd = joined(regions=regions, weight_factors=[1.0])
    assert kd.activation == activation
    assert kd.head_weights == [1.0]
    assert list(kd.taps) == ["bottleneck"]
    assert not any(weight.requires_grad for weight in kd.teacher.parameters())


def test_a_loss_without_weights_of_heads_gives_none():
    assert joined().head_weights is None


@pytest.mark.parametrize(("width", "groups"), [(3, 1), (2, 2)])
def test_the_optimizer_gets_adapters_and_only_once(width, groups):
    kd = joined(width=width)
    optimizer = torch.optim.SGD(kd.student.parameters(), 0.1)
    train_adapters(kd, optimizer)
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert len(optimizer.param_groups) == groups
    assert len(trained) == len(set(trained))
    assert {*trained} == {*kd.parameters()}


def test_an_objective_may_not_read_the_reference():
    refuse_reference(joined(SoftTargetDiceBCE() + LatentKL()).objective)
    with pytest.raises(ObjectiveError, match="its weight is 1 - imitation"):
        refuse_reference(joined(SoftTargetDiceBCE() + GroundTruth()).objective)


def test_the_losses_are_added_by_the_share_of_the_teacher():
    loss = JointLoss(lambda logits, target: (logits - target).abs().sum(), 0.25)
    logits = torch.tensor([3.0], requires_grad=True)
    out = SimpleNamespace(
        student=logits, loss=0.25 * 8 * logits.sum(), terms={"term": torch.tensor(24.0)}
    )
    total = loss(out, torch.tensor([1.0]))
    assert total.item() == 0.75 * 2 + 0.25 * 24
    assert {name: value.item() for name, value in loss.terms.items()} == {"nnunet": 2, "term": 24}
    assert not any(value.requires_grad for value in loss.terms.values())
    total.backward()
    assert logits.grad.item() == 0.75 + 2
