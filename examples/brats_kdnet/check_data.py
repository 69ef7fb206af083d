"""Look through a data set before it is trained on, and list everything that is wrong with it.

    python check_data.py --data-root BraTS2021
    python check_data.py --data-root PATIENTS --description patients.yaml --csv problems.csv
    python check_data.py --data-root PATIENTS --modalities t1ce,flair --no-labels --json -

Every file is read once, to its end. Nothing is changed. Layouts are those of train.py; a YAML file
describes others (docs/how-to/own-data.md). What only looks wrong is listed as a warning. Exit
status: 0 if all subjects can be used, 1 if some cannot, 2 if there is nothing to look through.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from kdnet.command import console, documented, exit_status
from kdnet.data.checks import check_subjects, listed, problems_as_rows
from kdnet.data.description import load_description
from kdnet.data.subjects import check_patients, find_subjects
from kdnet.errors import UserError, printable
from kdnet.files import write_text


def check_data(options: argparse.Namespace, console: Console) -> int:
    """Check a data set and say what was found."""
    described = None if options.description is None else load_description(options.description)
    description, subjects = find_subjects(options.data_root, described)
    modalities = options.modalities or [*description.modalities]
    if not {*modalities} <= {*description.modalities}:
        raise UserError(
            f"--modalities: {description.name} has {', '.join(description.modalities)}, found "
            f"{', '.join(modalities)}."
        )
    if text := check_patients(subjects, description):
        console.out(printable(f"warning: {text}"))
    problems = check_subjects(
        description,
        subjects,
        workers=options.workers,
        progress=sys.stderr.isatty(),
        need_segmentation=options.labels,
        modalities=modalities,
    )
    rows = problems_as_rows(problems)
    # What only looks wrong keeps no subject from being used.
    serious = [problem.subject for problem in problems if not problem.warning]
    broken = len({*serious})
    summary = {
        "dataset": description.name,
        "subjects": len(subjects),
        "usable": len(subjects) - broken,
        "with_problems": broken,
        "number_of_problems": len(serious),
        "problems": rows,
    }
    if options.json is not None:
        _write(options.json, json.dumps(summary, indent=2) + "\n")
    if options.csv is not None:
        table = pd.DataFrame(rows, columns=["subject", "file", "reason"])
        _write(options.csv, table.to_csv(index=False, lineterminator="\n"))
    if problems:
        console.out(listed(problems))
    console.out(
        f"{printable(f'{description.name} in {options.data_root}')}: {len(subjects)} subjects, "
        f"{summary['usable']} usable, {broken} with problems ({len(serious)} in all).",
    )
    if 0 < broken < len(subjects):
        console.out("train.py and crossval.py use the others with --skip-invalid true.")
    return 1 if broken else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and check."""
    options = _parser().parse_args(arguments)
    # What goes to a pipe is not the list's to spoil.
    piped = "-" in {str(options.json), str(options.csv)}
    return exit_status(lambda: check_data(options, console(stderr=piped)))


def _parser() -> argparse.ArgumentParser:
    parser = documented(__doc__)
    add = parser.add_argument
    add("--data-root", "--data_root", type=Path, required=True, help="folder of the data set")
    add("--description", type=Path, help="YAML file, or its name in datasets/, for other layouts")
    add(
        "--modalities",
        type=lambda text: [name.strip() for name in text.split(",")],
        metavar="NAME,NAME",
        help="those that will be used (default: all)",
    )
    add(
        "--no-labels",
        dest="labels",
        action="store_false",
        help="subjects without a label map can be used",
    )
    add("--json", type=Path, metavar="PATH", help="also as JSON; - for the output")
    add("--csv", type=Path, metavar="PATH", help="also as CSV; - for the output")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="subjects read at a time; each holds one volume in memory (default: %(default)s)",
    )
    return parser


def _write(path: Path, text: str) -> None:
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        write_text(path, text)


if __name__ == "__main__":
    sys.exit(main())
