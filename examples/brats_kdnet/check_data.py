"""Look through a data set before it is trained on, and list everything that is wrong with it.

    python check_data.py --data-root BraTS2021
    python check_data.py --data-root PATIENTS --description patients.yaml --csv problems.csv
    python check_data.py --data-root PATIENTS --modalities t1ce,flair --no-labels --json -

Every file is read once, to its end. Nothing is changed. Layouts are those of train.py; a YAML file
describes others (docs/how-to/own-data.md). Exit status: 0 if all subjects can be used, 1 if some
cannot, 2 if there is nothing to look through.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from kdnet.data.checks import Problem, check_subjects, problem_table, problems_as_rows
from kdnet.data.description import Description, load_description
from kdnet.data.subjects import Subject, find_subjects
from kdnet.errors import UserError, printable
from kdnet.files import write_text


def check_data(options: argparse.Namespace, console: Console) -> int:
    """Check a data set and say what was found."""
    described = None if options.description is None else load_description(options.description)
    description, subjects = find_subjects(options.data_root, described)
    problems = check_subjects(
        description,
        subjects,
        workers=options.workers,
        progress=sys.stderr.isatty(),
        need_segmentation=options.labels,
        modalities=_modalities(options.modalities, description),
    )
    summary = summarise(description, subjects, problems)
    if options.json is not None:
        content = {**summary, "problems": problems_as_rows(problems)}
        _write(options.json, json.dumps(content, indent=2) + "\n")
    if options.csv is not None:
        _write(options.csv, _as_csv(problems))
    if problems:
        console.print(problem_table(problems))
    console.print(_sentence(options.data_root, summary), highlight=False, soft_wrap=True)
    return 1 if problems else 0


def summarise(
    description: Description, subjects: Sequence[Subject], problems: Sequence[Problem]
) -> dict[str, Any]:
    """Count subjects."""
    broken = len({problem.subject for problem in problems})
    return {
        "dataset": description.name,
        "subjects": len(subjects),
        "usable": len(subjects) - broken,
        "with_problems": broken,
        "number_of_problems": len(problems),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and check."""
    options = _parser().parse_args(arguments)
    # What goes to a pipe is not the table's to spoil.
    piped = "-" in {str(options.json), str(options.csv)}
    try:
        return check_data(options, Console(stderr=piped, markup=False, emoji=False))
    except UserError as error:
        sys.stderr.write(f"{printable(str(error), keep=chr(10))}\n")
    except OSError as error:
        sys.stderr.write(f"The check stopped: {printable(str(error))}\n")
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        return 130
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-root", "--data_root", type=Path, required=True, help="folder of the data set"
    )
    parser.add_argument(
        "--description",
        type=Path,
        help="YAML file that describes it, or the name of one in datasets/ (default: recognise it)",
    )
    parser.add_argument(
        "--modalities", metavar="NAME,NAME", help="those that will be used (default: all)"
    )
    parser.add_argument(
        "--no-labels",
        dest="labels",
        action="store_false",
        help="subjects without a label map can be used",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also as JSON; - for the output")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="also as CSV; - for the output")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="subjects read at a time; each holds one volume in memory (default: %(default)s)",
    )
    return parser


def _modalities(given: str | None, description: Description) -> tuple[str, ...] | None:
    if given is None:
        return None
    names = tuple(name.strip() for name in given.split(","))
    unknown = [name for name in names if name not in description.modalities]
    if unknown:
        raise UserError(
            f"--modalities: {description.name} has {', '.join(description.modalities)}, found "
            f"{', '.join(unknown)}."
        )
    return names


def _as_csv(problems: Sequence[Problem]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ("subject", "file", "reason"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(problems_as_rows(problems))
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        write_text(path, text)


def _sentence(root: Path, summary: dict[str, Any]) -> str:
    subjects, usable = summary["subjects"], summary["usable"]
    found = f"{summary['dataset']} in {root}: {subjects} subjects, {usable} usable, "
    found += f"{summary['with_problems']} with problems"
    if usable == subjects:
        return f"{printable(found)}."
    more = " train.py and crossval.py use the others with --skip_invalid true." * bool(usable)
    return f"{printable(found)} ({summary['number_of_problems']} in all).{more}"


if __name__ == "__main__":
    sys.exit(main())
