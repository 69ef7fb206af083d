"""Write a trained network in another format.

    python export.py --model MODEL --out student.onnx

MODEL is a model.safetensors of a run, such as that below runs/demo/units/student/.

The ending names the format: .safetensors, .pt2 (torch.export), or .onnx (compared with torch in
onnxruntime). predict.py runs each.
TorchScript is not offered: PyTorch has deprecated it, and torch.export takes its place.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kdnet.command import add_trust, documented, exit_status
from kdnet.errors import printable
from kdnet.exported import check_format, export
from kdnet.training.checkpoint import load_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and export."""
    parser = documented(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model.safetensors of a run")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    add_trust(parser)
    options = parser.parse_args(arguments)
    return exit_status(lambda: _export(options))


def _export(options: argparse.Namespace) -> None:
    # Before the network is read, which may take long.
    check_format(options.out)
    difference = export(options.out, *load_model(options.model, trusted=options.trust_backbone))
    said = "" if difference is None else f"; logits differ from torch's by {difference:.2g} at most"
    sys.stdout.write(printable(f"{options.out}{said}\n", keep="\n"))


if __name__ == "__main__":
    sys.exit(main())
