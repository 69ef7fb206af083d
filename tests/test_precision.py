"""Half precision: losses in float32, gradients close to those of float32."""

import pytest
import torch
from torch import nn

IMAGE = torch.randn(2, 4, 8, 8)
LABELS = torch.randint(0, 3, (2, 8, 8))
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
def test_promise_10_gradients_under_autocast_are_close(build, networks, dtype):
    kd = build()
    kd(IMAGE, LABELS).loss.backward()
    wanted = [p.grad.clone() for p in kd.parameters()]
    kd.zero_grad()
    with torch.autocast("cpu", dtype):
        out = kd(IMAGE, LABELS)
    assert {value.dtype for value in (out.loss, *out.terms.values())} == {torch.float32}
    out.loss.backward()
    for parameter, exact in zip(kd.parameters(), wanted, strict=True):
        assert (parameter.grad - exact).norm() <= 0.05 * exact.norm() + 1e-3


def test_promise_10_a_scaler_trains_and_skips_steps_that_overflow(build):
    kd = build()
    optimizer = torch.optim.SGD(kd.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = kd.student.head.weight.detach().clone()
    with torch.autocast("cpu", torch.float16):
        scaler.scale(kd(IMAGE, LABELS).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    trained = kd.student.head.weight.detach().clone()
    assert not torch.equal(before, trained)
    optimizer.zero_grad()
    scaler.scale(kd(IMAGE, LABELS).loss).backward()
    kd.student.head.weight.grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(kd.student.head.weight, trained)
    assert scaler.get_scale() == 2.0**7


@pytest.mark.parametrize(
    ("dtype", "loss"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2],
)
def test_promise_10_a_cast_wrapper_casts_teacher_and_adapters_along(build, tiny_unet, dtype, loss):
    kd = build(teacher=[tiny_unet(4, width=6), tiny_unet(4, width=6)]).to(dtype)
    assert {p.dtype for p in (*kd.parameters(), *kd.teacher.parameters())} == {dtype}
    out = kd(IMAGE.to(dtype), LABELS)
    assert out.loss.dtype == loss
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize("dtype", HALF)
def test_promise_10_heads_are_supervised_in_float32(build, tiny_unet, dtype):
    class Deep(tiny_unet):
        def forward(self, x):
            out = super().forward(x)
            return [out, nn.functional.avg_pool2d(out, 2)]

    kd = build(student=Deep(1))
    with torch.autocast("cpu", dtype):
        out = kd(IMAGE, LABELS)
    assert {value.dtype for value in (out.loss, *out.terms.values())} == {torch.float32}
    out.loss.backward()
