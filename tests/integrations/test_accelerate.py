"""The example with Accelerate runs as written."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="the extra accelerate is not installed")

from accelerate.state import AcceleratorState

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    # Accelerate keeps its precision for the whole process.
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("accelerate_loop", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: fp16 is for GPUs.
ON_GPU = pytest.param(
    "fp16",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.mark.parametrize(("accumulation", "steps"), [(2, 4), (3, 4)])
def test_micro_batches_do_not_count_as_steps(example, accumulation, steps):
    kd, _ = example.train(2, accumulation=accumulation)
    assert kd.steps == steps


@pytest.mark.parametrize("precision", ["no", "bf16", ON_GPU])
def test_the_student_learns_and_the_teacher_stays(example, precision, capsys):
    kd, loss = example.train(2, mixed_precision=precision)
    assert loss > 0
    assert kd.steps == 8
    assert not any(weight.requires_grad for weight in kd.teacher.parameters())
    assert "soft_target_dice_bce" in capsys.readouterr().out
    image = torch.zeros(1, 1, 16, 16, device=next(kd.parameters()).device)
    assert kd.predict(image).shape == (1, 3, 16, 16)
