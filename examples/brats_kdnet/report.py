"""The report of a run or of a cross-validation: one HTML file that needs no network to be read.

    python report.py runs/demo
    python report.py runs/crossval

It is made from the folder alone and can be made again at any time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from errors import UserError, printable
from reports.crossval_folder import MARKER
from reports.crossval_page import write_crossval_page
from reports.run_page import write_run_page


def write_report(folder: Path, trusted: Collection[str] = ()) -> Path:
    """Write report.html into the folder of a run or of a cross-validation.

    Args:
        folder: A folder that train.py or crossval.py filled.
        trusted: Networks beyond the known ones that may be imported to say what they cost.

    Returns:
        The file written.

    Raises:
        UserError: If the folder is neither, or has no scores yet.
    """
    if (folder / MARKER).is_file():
        return write_crossval_page(folder, trusted)
    if (folder / "config.yaml").is_file():
        return write_run_page(folder)
    raise UserError(
        f"{folder}: expected the folder of a run or of a cross-validation, found neither "
        "config.yaml nor crossval.json in it. Give the folder that was written to (--out)."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and write the report.

    Args:
        arguments: Without the program's name; sys.argv if None.

    Returns:
        Exit status: 0, or 2 for a folder that cannot be used.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="folder of a run or of a cross-validation")
    parser.add_argument(
        "--trust_backbone",
        "--trust-backbone",
        action="extend",
        nargs="+",
        default=[],
        metavar="IMPORT.PATH",
        help="networks that the folder's model files may have imported, to say what they cost",
    )
    options = parser.parse_args(arguments)
    try:
        path = write_report(options.folder, options.trust_backbone)
    except UserError as error:
        sys.stderr.write(printable(f"{error}\n", keep="\n"))
        return 2
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
