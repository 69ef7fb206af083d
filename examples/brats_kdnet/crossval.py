"""Every row of a table on every fold: train what is missing, then show the tables.

python examples/brats_kdnet/crossval.py                        phantoms, the paper's rows
python examples/brats_kdnet/crossval.py --data-root BraTS2021  real subjects
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kdnet.config import Program, parse_for
from kdnet.evaluation.lesions import load_panoptica
from kdnet.runs.command import exit_status
from kdnet.runs.folder import open_plan
from kdnet.runs.plan import CrossvalOptions, Plan
from kdnet.runs.results import collect_lesions, show_results
from kdnet.runs.run_folder import RunFolder
from kdnet.runs.schedule import command_of, train_units
from kdnet.runs.subjects import read_subjects
from kdnet.runs.unit import run_unit
from kdnet.runs.view import View

_DESCRIPTION = """\
Cross-validate any number of rows (teacher, baseline, KD-Net, comparators) and show the paper's
tables with the published numbers beside them.

Examples:
  crossval.py
      phantoms, 3 folds x the paper's five rows
  crossval.py --data-root BraTS2018 --preset paper --rows table1,table2
      Tables 1 and 2 of arXiv:2106.09564
  crossval.py --data-root BraTS2021 --rows baseline,kdnet --seeds 0,1,2 --folds 5
      two rows (and the teacher), five folds, three seeds
  crossval.py --data-root BraTS2021 --rows baseline,kdnet --sweep modalities
      each single modality in turn as the student's
  crossval.py --data-root BraTS2021 --show units
      what an array job would train; --unit NUMBER trains one of them

Every fold, seed and row is a unit. A unit that is done is never trained again; a unit that was
stopped goes on. Further rows, seeds and processes may be added at any time by giving the same
command with them."""

CROSSVAL = Program("crossval.py", _DESCRIPTION, CrossvalOptions, out="runs/crossval-PRESET")


def cross_validate(arguments: Sequence[str], console: Console) -> int:
    """Train what is missing and show the results."""
    config, options = parse_for(CROSSVAL, arguments)
    if options.lesions:
        load_panoptica()
    plan = open_plan(config, options, console)
    if options.show is not None:
        show_plan(plan, options.show, console)
        return 0
    if options.unit is not None:
        run_unit(plan, plan.find(options.unit), console)
        return 0
    command = command_of(Path(__file__), arguments)
    failed = train_units(plan, plan.units(), options.jobs, command, console)
    show_results(plan, console)
    if options.lesions:
        description, subjects = read_subjects(plan.config, RunFolder(plan.root), console)
        path = collect_lesions(plan, subjects, description)
        console.print(f"Written: {path}", highlight=False, soft_wrap=True)
    for name, reason in failed.items():
        console.print(f"{name} failed: {reason}", highlight=False, soft_wrap=True)
    return 1 if failed else 0


def show_plan(plan: Plan, what: str, console: Console) -> None:
    """List the units, or show how far they are."""
    if what == "status":
        console.print(View(plan, plan.units()).table())
        return
    for number, unit in enumerate(plan.units()):
        done = "  done" if plan.is_done(unit) else ""
        console.print(f"{number:4d}  {unit.name}{done}", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: cross_validate(given, Console(markup=False)))


if __name__ == "__main__":
    sys.exit(main())
