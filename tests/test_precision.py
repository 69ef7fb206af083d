"""Half precision: losses in float32, gradients close to those of float32."""

import pytest
import torch
from paths import HOT, IMAGE, LABELS, ONE, PATHS, Deep, target, trained

from privdistill import MovingAverage, Step, TapPair

HALF = [torch.bfloat16, torch.float16]


def gradients(kd):
    return [p.grad.clone() for p in trained(kd)]


def assert_near(found, wanted):
    for one, exact in zip(found, wanted, strict=True):
        assert (one - exact).norm() <= 0.05 * exact.norm() + 1e-3


def dtypes(out):
    return {value.dtype for value in (out.loss, *out.terms.values())}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("path", PATHS)
def test_promise_10_gradients_under_autocast_are_close(build, tiny_unet, path, dtype):
    kd = build(**PATHS[path](tiny_unet))
    out = kd(IMAGE, target(kd))
    out.loss.backward()
    exact, wanted = out.loss, gradients(kd)
    for parameter in trained(kd):
        parameter.grad = None
    with torch.autocast("cpu", dtype):
        out = kd(IMAGE, target(kd))
    assert dtypes(out) == {torch.float32}
    assert out.loss.item() == pytest.approx(exact.item(), abs=0.02)
    out.loss.backward()
    # The slope of log |z| is 1 / z: where a feature rounds to about zero, no two are close.
    if path != "l1":
        assert_near(gradients(kd), wanted)


def test_scaled_gradients_in_fp16_are_close_once_unscaled(build):
    kd = build()
    kd(IMAGE, LABELS).loss.backward()
    wanted = gradients(kd)
    kd.zero_grad()
    optimizer = torch.optim.SGD(kd.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", torch.float16):
        loss = kd(IMAGE, LABELS).loss
    scaler.scale(loss).backward()
    assert kd.student.head.weight.grad.norm() > 100 * wanted[-2].norm()
    scaler.unscale_(optimizer)
    assert_near(gradients(kd), wanted)


def test_promise_10_a_scaler_trains_and_skips_steps_that_overflow(build):
    kd = build()
    optimizer = torch.optim.SGD(kd.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = kd.student.head.weight.detach().clone()
    with torch.autocast("cpu", torch.float16):
        scaler.scale(kd(IMAGE, LABELS).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    after = kd.student.head.weight.detach().clone()
    assert not torch.equal(before, after)
    optimizer.zero_grad()
    scaler.scale(kd(IMAGE, LABELS).loss).backward()
    kd.student.head.weight.grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(kd.student.head.weight, after)
    assert scaler.get_scale() == 2.0**7


@pytest.mark.parametrize(
    ("dtype", "loss"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2],
)
def test_promise_10_a_cast_wrapper_casts_teacher_and_adapters_along(build, tiny_unet, dtype, loss):
    teachers = [tiny_unet(4, width=6), tiny_unet(4, width=6)]
    kd = build(teacher=teachers, student=Deep(tiny_unet(1)))
    kd = {"bfloat16": kd.bfloat16, "float16": kd.half, "float64": kd.double}[str(dtype)[6:]]()
    held = [p for teacher in teachers for p in teacher.parameters()]
    assert len(kd.adapters) == 1
    assert {p.dtype for p in (*kd.parameters(), *held)} == {dtype}
    assert kd.steps.dtype == torch.long
    out = kd(IMAGE.to(dtype), LABELS)
    assert dtypes(out) == {loss}
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in kd.parameters())


@pytest.mark.parametrize("dtype", [torch.float64])
def test_a_cast_wrapper_casts_the_average_of_its_student_along(build, dtype):
    kd = build(teacher=MovingAverage(0.5), inputs=ONE).to(dtype)
    kd(IMAGE.to(dtype), HOT.to(dtype)).loss.backward()
    with torch.no_grad():
        kd.student.head.bias += 1
    before = kd.teacher.head.bias.clone()
    kd(IMAGE.to(dtype), HOT.to(dtype))
    assert torch.allclose(kd.teacher.head.bias, before + 0.5, atol=0.01)


@pytest.mark.parametrize("dtype", HALF)
def test_promise_10_heads_are_supervised_in_float32(build, tiny_unet, dtype):
    kd = build(student=Deep(tiny_unet(1)))
    with torch.autocast("cpu", dtype):
        out = kd(IMAGE, LABELS)
    assert [head.dtype for head in out.student] == [dtype, dtype]
    assert dtypes(out) == {torch.float32}
    out.loss.backward()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("how", ["autocast", "cast"])
@pytest.mark.parametrize("path", ["usual", "sigmoid", "options", "adapter", "normalisations", "l1"])
def test_promise_10_losses_of_half_precision_outputs_are_those_of_float32(
    build, tiny_unet, path, how, dtype
):
    kd = build(**PATHS[path](tiny_unet))
    kd, image = (kd.to(dtype), IMAGE.to(dtype)) if how == "cast" else (kd, IMAGE)
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        out = kd(image, target(kd))
    # What the networks gave is taken as it is; only the arithmetic of the losses is repeated.
    teacher = None if out.teacher is None else out.teacher.float()
    taps = {name: TapPair(*(tensor.float() for tensor in pair)) for name, pair in out.taps.items()}
    step = Step(
        out.student.float(), teacher, target=target(kd), taps=taps, activation=kd.activation
    )
    loss, terms = kd.objective(step)
    torch.testing.assert_close(out.loss, loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out.terms, terms, atol=1e-6, rtol=1e-6)
