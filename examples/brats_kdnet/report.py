"""The report of a run, of a cross-validation or of studies, from its folder alone.

    python report.py runs/demo
    python report.py runs/crossval
    python report.py docs/results/when-it-helps

Of a folder that was trained in it is one HTML file that needs no network to be read, beside
tables.md; of published rows of a study (rows.csv beside plan.json) tables.md with its figures. A
folder may hold any number of studies in folders below it. All of it can be made again at any time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kdnet.command import add_trust, exit_status
from kdnet.results.page import write_reports


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and write the reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="folder of a run of any kind, or of studies")
    add_trust(parser)
    options = parser.parse_args(arguments)
    return exit_status(lambda: _report(options.folder, options.trust_backbone))


def _report(folder: Path, trusted: Sequence[str]) -> None:
    sys.stdout.writelines(f"{path}\n" for path in write_reports(folder, trusted))


if __name__ == "__main__":
    sys.exit(main())
