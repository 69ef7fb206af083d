import copy

import torch
from torch import nn

from privdistill.sides.frozen import Frozen


def make() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout())
    net[0].bias.requires_grad_(False)
    net[1].eval()
    return net


def test_frozen_in_eval_mode():
    net = make()
    Frozen(net)
    assert not any(module.training for module in net.modules())
    assert not any(p.requires_grad for p in net.parameters())


def test_release_restores_every_flag():
    net = make()
    Frozen(net).release()
    assert net.training
    assert not net[1].training
    assert [p.requires_grad for p in net[0].parameters()] == [True, False]
    assert "_privdistill_claim" not in net.__dict__


def test_the_last_holder_restores():
    net = make()
    first, second = Frozen(net), Frozen(net)
    first.release()
    first.release()
    assert not net.training
    second.release()
    assert net.training


def test_a_call_of_train_from_elsewhere_is_undone_before_the_next_forward():
    net = make()
    teacher = Frozen(net)
    net.train()
    before = net[1].running_mean.clone()
    with torch.no_grad():
        teacher(torch.randn(4, 1, 3, 3))
    assert torch.equal(net[1].running_mean, before)


def test_a_part_put_into_train_mode_is_put_back():
    net = make()
    teacher = Frozen(net)
    net[1].train()
    with torch.no_grad():
        teacher(torch.randn(4, 1, 3, 3))
    assert net[1].num_batches_tracked == 0


def test_a_copied_teacher_is_held_by_nobody():
    net = make()
    held = Frozen(net)
    twin = copy.deepcopy(net)
    Frozen(twin).release()
    held.release()
    assert net.training
    assert "_privdistill_claim" not in twin.__dict__


def test_compiled_or_not_a_teacher_has_one_claim():
    net = make()
    first, second = Frozen(torch.compile(net, backend="eager")), Frozen(net)
    first.release()
    assert not any(p.requires_grad for p in net.parameters())
    second.release()
    assert net.training
