"""What the oldest PyTorch cannot do."""

import pytest
import torch

needs_fsdp = pytest.mark.skipif(
    not hasattr(torch.cpu.current_stream(), "record_event"),
    reason="FSDP of PyTorch 2.6 needs a GPU",
)
