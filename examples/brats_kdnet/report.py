"""The report of a run, of a cross-validation or of studies, from its folder alone.

    python report.py runs/demo
    python report.py runs/crossval
    python report.py docs/results/when-it-helps

Of a run and of a cross-validation it is one HTML file that needs no network to be read; of a study
(rows.csv and study.json) tables.md with its figures, in its folder. A folder may hold any number of
studies in folders below it. All of it can be made again at any time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from kdnet.command import exit_status
from kdnet.errors import UserError
from kdnet.results.crossval_folder import MARKER
from kdnet.results.crossval_page import write_crossval_page
from kdnet.studies.facts import FACTS
from kdnet.studies.page import find_studies, write_study
from kdnet.studies.rows import ROWS


def write_reports(folder: Path, trusted: Collection[str] = ()) -> list[Path]:
    """Write the report of a folder, or of every study at and below it."""
    # The folder of a study is that of a cross-validation too, whose scores lie in its units.
    if (folder / ROWS).is_file():
        return [write_study(folder)]
    if (folder / MARKER).is_file() or (folder / "config.yaml").is_file():
        return [write_report(folder, trusted)]
    studies = find_studies(folder)
    if not studies and (folder / FACTS).is_file():
        raise UserError(f"{folder}: expected {ROWS} beside {FACTS}, found none. Run a unit first.")
    return [write_study(study) for study in studies] or [write_report(folder, trusted)]


def write_report(folder: Path, trusted: Collection[str] = ()) -> Path:
    """Write report.html into the folder of a run or of a cross-validation."""
    if (folder / MARKER).is_file():
        return write_crossval_page(folder, trusted)
    raise UserError(
        f"{folder}: expected the folder of a run, of a cross-validation or of studies, found "
        f"neither config.yaml nor {MARKER} in it, nor {ROWS} with {FACTS} in it or below it. Give "
        "the folder that was written to (--out)."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and write the reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "folder", type=Path, help="folder of a run, of a cross-validation or of studies"
    )
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
    return exit_status(lambda: _report(options.folder, options.trust_backbone))


def _report(folder: Path, trusted: Sequence[str]) -> None:
    sys.stdout.writelines(f"{path}\n" for path in write_reports(folder, trusted))


if __name__ == "__main__":
    sys.exit(main())
