"""A teacher whose logits nobody reads stops at its last tap."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from privdistill import FeatureL2, GroundTruth, LatentKL, Layer, SoftTargetDiceBCE, Tap

IMAGE, TARGET = torch.rand(2, 4, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
LATENT = GroundTruth() + LatentKL()


def ran(kd, name):
    """Whether a layer of the teacher runs in a step."""
    calls = []
    hook = kd.teacher.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    out = kd(IMAGE, TARGET)
    hook.remove()
    return bool(calls), out


def test_the_forward_stops_at_the_last_tap(build):
    kd = build(objective=LATENT)
    assert ran(kd, "bottleneck.0")[0]
    reached, out = ran(kd, "head")
    assert not reached
    assert out.teacher is None
    assert "stops at its last tap" in repr(kd)


def test_the_loss_is_that_of_the_whole_forward(build, networks):
    kd = build(objective=LATENT)
    whole = build(objective=LATENT + 0 * SoftTargetDiceBCE())
    assert kd(IMAGE, TARGET).loss == whole(IMAGE, TARGET).loss


def test_the_deepest_of_several_taps_decides(build):
    taps = {"first": Tap("encoder", "encoder"), "up": Tap(Layer("up", at="input"), "bottleneck")}
    kd = build(objective=GroundTruth() + FeatureL2("first") + FeatureL2("up"), taps=taps)
    assert ran(kd, "bottleneck.0")[0]
    assert not ran(kd, "up")[0]


def test_terms_that_read_logits_need_the_whole_forward(build):
    kd = build()
    assert ran(kd, "head")[0]
    assert "last tap" not in repr(kd)


def test_the_teacher_works_outside_of_the_wrapper(build):
    kd = build(objective=LATENT)
    before = kd.teacher(IMAGE)
    kd(IMAGE, TARGET)
    assert torch.equal(kd.teacher(IMAGE), before)


def test_without_a_dry_run_the_whole_forward_runs(build):
    taps = {"bottleneck": Tap("bottleneck", "bottleneck", adapter=None)}
    kd = build(objective=LATENT, taps=taps, example=None)
    assert ran(kd, "head")[0]
    assert "runs to its end, as no example was given" in repr(kd)


def test_a_wrapper_compiled_in_place_says_so(build):
    kd = build(objective=LATENT)
    kd.compile(backend="eager")
    assert "runs to its end, as the wrapper is compiled" in repr(kd)


def test_steps_may_follow_each_other(build):
    kd = build(objective=LATENT)
    assert kd(IMAGE, TARGET).loss == kd(IMAGE, TARGET).loss
    assert kd.predict(IMAGE).shape == (2, 3, 8, 8)


class Suspicious(nn.Module):
    """Catches whatever its inner network raises."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        try:
            return self.inner(x)
        except Exception:  # noqa: BLE001
            return torch.zeros(len(x), 3, 8, 8)


def test_a_network_that_catches_exceptions_stops_too(build, networks):
    teacher = Suspicious(networks[0])
    taps = {"bottleneck": Tap("inner.bottleneck", "bottleneck")}
    kd = build(teacher=teacher, objective=LATENT, taps=taps)
    assert not ran(kd, "inner.head")[0]


class Recomputed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_a_checkpointed_teacher_stops_too(build, networks):
    teacher = Recomputed(networks[0])
    taps = {"bottleneck": Tap("inner.bottleneck", "bottleneck")}
    kd = build(teacher=teacher, objective=LATENT, taps=taps)
    assert not ran(kd, "inner.head")[0]


def test_an_error_of_the_teacher_is_still_an_error(build):
    kd = build(objective=LATENT)
    kd.teacher.encoder.forward = lambda _x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        kd(IMAGE, TARGET)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_teacher_runs_to_its_end_and_says_so(build, networks, how):
    teacher = copy.deepcopy(networks[0])
    if how == "in place":
        teacher.compile(backend="eager")
    else:
        teacher = torch.compile(teacher, backend="eager")
    kd = build(teacher=teacher, objective=LATENT)
    assert "compiled, frozen, runs to its end, as it is compiled" in repr(kd)
    expected = build(objective=LATENT)(IMAGE, TARGET).loss
    assert torch.allclose(kd(IMAGE, TARGET).loss, expected)


def test_a_compiled_wrapper_gives_the_same_loss(build):
    kd = build(objective=LATENT, validate="never")
    expected = kd(IMAGE, TARGET).loss
    assert torch.allclose(torch.compile(kd, backend="eager")(IMAGE, TARGET).loss, expected)
