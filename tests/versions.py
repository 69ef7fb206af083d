"""What the oldest PyTorch and MONAI cannot do."""

import monai
import pytest
import torch

needs_fsdp = pytest.mark.skipif(
    not hasattr(torch.cpu.current_stream(), "record_event"),
    reason="FSDP of PyTorch 2.6 needs a GPU",
)
#: PyTorch 2.6 compiles a choice among heads in parts.
WHOLE_GRAPHS = torch.__version__ >= "2.7"
needs_quicknat = pytest.mark.skipif(
    monai.__version__.startswith("1.5"), reason="QuickNAT of MONAI 1.5 does not run in 2-D"
)
