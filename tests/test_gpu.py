"""What only a CUDA device can show; run by `make gpu`."""

import pytest
import torch

from privdistill import (
    DistillationWrapper,
    GroundTruth,
    LatentKL,
    PrivilegedInput,
    SoftTargetDiceBCE,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def kd(tiny_unet):
    objective = 0.75 * SoftTargetDiceBCE() + 0.25 * GroundTruth() + 10 * LatentKL()
    return DistillationWrapper(
        tiny_unet(4, axes=3),
        tiny_unet(1, axes=3),
        objective=objective,
        inputs=PrivilegedInput(("flair", "t1", "t1ce", "t2"), student=("t1ce",)),
        example=torch.zeros(1, 4, 16, 16, 16),
    )


@pytest.fixture
def batch():
    return torch.randn(2, 4, 16, 16, 16), torch.randint(0, 3, (2, 16, 16, 16))


def test_the_device_gives_the_loss_of_the_cpu(kd, batch):
    expected = kd(*batch).loss.item()
    kd.cuda()
    assert kd.teacher.head.weight.is_cuda
    assert kd(batch[0].cuda(), batch[1].cuda()).loss.item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scaled_mixed_precision_step_is_finite(kd, batch, dtype):
    kd.cuda()
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    optimizer = torch.optim.Adam(kd.parameters(), 1e-3)
    with torch.autocast("cuda", dtype):
        out = kd(batch[0].cuda(), batch[1].cuda())
    scaler.scale(out.loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert out.loss.dtype == torch.float32
    assert all(torch.isfinite(p).all() for p in kd.parameters())


def test_a_compiled_student_gives_the_loss_of_the_plain_one(kd, batch, tiny_unet):
    kd.cuda()
    image, target = batch[0].cuda(), batch[1].cuda()
    expected = kd(image, target).loss.item()
    kd.student.compile()
    assert kd(image, target).loss.item() == pytest.approx(expected, abs=1e-3)
