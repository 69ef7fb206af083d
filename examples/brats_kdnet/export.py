"""Write a trained network in another format.

    python export.py --model MODEL --out student.onnx

MODEL is a model.safetensors of a run, such as that below runs/demo/units/student/.

The ending names the format: .safetensors, .pt2 (torch.export), or .onnx (compared with torch in
onnxruntime). predict.py runs each.
TorchScript is not offered: PyTorch has deprecated it, and torch.export takes its place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kdnet.errors import UserError, printable
from kdnet.exported import check_format, export
from kdnet.training.checkpoint import load_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and export."""
    options = _parser().parse_args(arguments)
    try:
        check_format(options.out)
        network, metadata = load_model(options.model, trusted=options.trust_backbone)
        difference = export(options.out, network, metadata)
    except UserError as error:
        sys.stderr.write(printable(f"{error}\n", keep="\n"))
        return 2
    said = "" if difference is None else f"; logits differ from torch's by {difference:.2g} at most"
    sys.stdout.write(printable(f"{options.out}{said}\n", keep="\n"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="model.safetensors of a run")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--trust-backbone",
        action="append",
        default=[],
        metavar="CLASS",
        help="network beyond the known ones that the model file may have imported",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
