import hashlib

import pytest
import torch

from kdnet.training.digests import damaged, digest, digests


def test_a_digest_is_that_of_the_bytes():
    tensor = torch.tensor([1, 2], dtype=torch.uint8)
    expected = hashlib.sha256(b"tensor torch.uint8 (2,):\x01\x02").hexdigest()
    assert digest(tensor) == expected


def test_layout_in_memory_does_not_count_but_everything_else_does():
    tensor = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert digest(tensor) == digest(tensor.to(memory_format=torch.channels_last))
    others = [tensor.double(), tensor.reshape(2, 12), tensor + 1e-6, tensor.tolist(), None, 1, "1"]
    assert len({digest(value) for value in [tensor, *others]}) == len(others) + 1
    assert digest([1, 2]) != digest((1, 2))
    assert digest({"a": 1, "b": 2}) != digest({"b": 2, "a": 1})


def test_numbers_of_any_format_and_none_at_all_have_one():
    for kind in (torch.bfloat16, torch.float16, torch.bool, torch.complex64):
        assert len(digest(torch.ones(3, dtype=kind))) == 64
    assert digest(torch.zeros(0)) != digest(torch.zeros(0, 1))
    assert digest(torch.tensor(1.0)) != digest(torch.tensor([1.0]))


def test_what_is_changed_missing_or_new_is_named():
    before = digests({"a": 1, "b": torch.ones(2), "c": 3})
    assert damaged({"a": 1, "b": torch.zeros(2), "d": 4}, before) == ["b", "c", "d"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_where_a_tensor_lies_does_not_count():
    state = {"weights": [torch.arange(6.0).reshape(2, 3), torch.ones(2, dtype=torch.bfloat16)]}
    on_gpu = {"weights": [tensor.to("cuda") for tensor in state["weights"]]}
    assert digest(on_gpu) == digest(state)
