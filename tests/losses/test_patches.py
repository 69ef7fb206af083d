"""Whole patches of extreme logits: sums over 64^3 voxels overflow in half precision."""

import pytest
import torch
from terms import KINDS, make

from privdistill import Gram, Step, TapPair

# Without `Gram`, whose slope is the cube of such features: tests/losses/test_features.py.
TERMS = [kind for kind in KINDS if kind is not Gram]


@pytest.mark.parametrize("size", [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", TERMS, ids=lambda kind: kind.__name__)
def test_values_and_gradients_are_finite(kind, dtype, size):
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (2, 2, 2, size, size, size), generator=generator)
    student, teacher = (2e4 * signs - 1e4).to(dtype)
    student.requires_grad_()
    labels = signs[0, :, 0]
    term = make(kind)
    taps = dict.fromkeys(term.taps, TapPair(student, teacher))
    step = Step(student, teacher, target=labels, image=student.detach()[:, :1], taps=taps)
    term.build(step)
    loss = term(step)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.dtype == torch.float32
    assert torch.isfinite(student.grad).all()
