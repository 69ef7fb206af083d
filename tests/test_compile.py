"""Compiled networks and compiled wrappers give what eager ones give."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from privdistill import (
    Layer,
    MovingAverage,
    PrivilegedInput,
    Tap,
)

IMAGE = torch.randn(2, 4, 8, 8)
LABELS = torch.randint(0, 3, (2, 8, 8))
NAMES = ("flair", "t1", "t1ce", "t2")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend="aot_eager"):
    return torch.compile(copy.deepcopy(model), backend=backend)


def step(kd, **options):
    kd.student.zero_grad()
    out = kd(IMAGE, LABELS, **options)
    out.loss.backward()
    inner = getattr(kd, "_orig_mod", kd)
    student = getattr(inner.student, "_orig_mod", inner.student)
    return [out.loss.detach(), *(p.grad.clone() for p in student.parameters())]


def assert_close(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


class Deep(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.coarse = net, nn.Conv2d(8, 3, 1)

    def forward(self, x):
        skip = self.net.encoder(x)
        bottom = self.net.bottleneck(self.net.down(skip))
        return [self.net.head(torch.cat((skip, self.net.up(bottom)), 1)), self.coarse(bottom)]


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_promise_9_compiled_networks_give_equal_gradients(build, networks, which):
    plain = step(build(teacher=copy.deepcopy(networks[0]), student=copy.deepcopy(networks[1])))
    teacher, student = networks
    if which != "student":
        teacher = compiled(teacher)
    if which != "teacher":
        student = compiled(student)
    assert_close(step(build(teacher=teacher, student=student)), plain)


VARIANTS = {
    "plain": dict,
    "two teachers": lambda nets, unet: {"teacher": [nets[0], unet(4)]},
    "average": lambda nets, unet: {
        "teacher": MovingAverage(),
        "inputs": PrivilegedInput(NAMES, student=("t1",), teacher=("t1",)),
    },
    "heads": lambda nets, unet: {"student": Deep(nets[1])},
    "input of a layer": lambda nets, unet: {
        "taps": {"bottleneck": Tap(Layer("up", at="input"), Layer("up", at="input"))}
    },
    "adapter": lambda nets, unet: {"teacher": unet(4, width=6)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_promise_9_a_compiled_wrapper_gives_equal_gradients(build, networks, tiny_unet, variant):
    options = VARIANTS[variant](networks, tiny_unet) if variant != "plain" else {}
    kd = build(validate="never", **options)
    twin = copy.deepcopy(kd)
    assert_close(step(torch.compile(twin, backend="aot_eager")), step(kd))


def test_promise_9_masks_and_dropout_compile(build, tiny_unet):
    inputs = PrivilegedInput(NAMES, student=NAMES, dropout=0.5)
    kd = build(student=tiny_unet(4), inputs=inputs, validate="never")
    present = torch.tensor([[True, False, True, True]] * 2)
    fast = torch.compile(kd, backend="aot_eager")
    assert torch.isfinite(fast(IMAGE, LABELS, present=present).loss)
    kd.eval()
    assert torch.allclose(
        fast(IMAGE, LABELS, present=present).loss, kd(IMAGE, LABELS, present=present).loss
    )


def test_promise_9_later_steps_compile_nothing_new(build):
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(build(validate="never"), backend=counter)
    for _ in range(2):
        fast(IMAGE, LABELS).loss.backward()
    first = counter.frame_count
    for _ in range(3):
        fast(IMAGE, LABELS).loss.backward()
    assert counter.frame_count == first


@pytest.mark.slow
def test_promise_9_inductor_gives_equal_gradients(build):
    kd = build(validate="never")
    twin = copy.deepcopy(kd)
    try:
        found = step(torch.compile(twin))
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no compiler for inductor: {error}")
    assert_close(found, step(kd))
