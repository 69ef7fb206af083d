"""Every row of a table on every fold: train what is missing, then show the tables.

python examples/brats_kdnet/crossval.py                        phantoms, the paper's rows
python examples/brats_kdnet/crossval.py --data-root BraTS2021  real subjects
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from kdnet.command import exit_status
from kdnet.config import Config, Program, parse_for
from kdnet.errors import UserError

if TYPE_CHECKING:
    from kdnet.runs.plan import Plan

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


@dataclass(frozen=True)
class CrossvalOptions:
    """Rows, folds and units of a cross-validation.

    Args:
        rows: Rows and groups of rows, such as baseline,kdnet or table1; teachers come by
            themselves. Groups: paper (teacher, baseline, gt_kl, gt_kd, kdnet), table1, table2,
            comparators, negative, objectives; kdnet/rows.yaml lists all.
        rows_file: YAML file with rows of your own, in the form of kdnet/rows.yaml.
        folds_file: JSON file with the case names of every fold, instead of --folds.
        repeats: How often the subjects are dealt into folds anew.
        seeds: Seeds of weights and order; each row is trained once for every fold and seed. --seed
            if none is given; that one also deals the folds.
        sweep: "modalities" repeats every row of the student for each single modality.
        subsets: Score networks that take any subset of modalities on all subsets, too.
        lesions: Score single lesions too, into lesions.csv; needs the label maps.
        jobs: Units trained at a time: a number, or "auto": one for each GPU; on a CPU one for
            every processor, up to 4, each with its share of threads.
        unit: Train this unit alone, by its name (kdnet/fold0-seed0) or number, and stop; for
            array jobs. Its teacher is trained first if that has not been done.
        show: "units" lists the units with their numbers, "status" shows how far each one is; both
            prepare the folder if that has not been done, and train nothing.
    """

    rows: tuple[str, ...] = ("paper",)
    rows_file: Path | None = None
    folds_file: Path | None = None
    repeats: int = 1
    seeds: tuple[int, ...] = ()
    sweep: Literal["none", "modalities"] = "none"
    subsets: bool = True
    lesions: bool = False
    jobs: int | Literal["auto"] = "auto"
    unit: str | None = None
    show: Literal["units", "status"] | None = None


CROSSVAL = Program("crossval.py", _DESCRIPTION, CrossvalOptions, out="runs/crossval-PRESET")


def cross_validate(arguments: Sequence[str], console: Console) -> int:
    """Train what is missing and show the results."""
    config, options = parse_for(CROSSVAL, arguments)
    refuse(config, options)
    plan = plan_rows(config, options, console)
    from kdnet.results.collected import collect_lesions, show_results  # noqa: PLC0415
    from kdnet.runs.pool import carry_out  # noqa: PLC0415

    command = [sys.executable, __file__, *arguments]
    plan, failed = carry_out(plan, plan.units(), options, command, console)
    if failed is None:
        return 0
    show_results(plan, console)
    if options.lesions:
        console.print(f"Written: {collect_lesions(plan)}", highlight=False, soft_wrap=True)
    return 1 if failed else 0


def plan_rows(config: Config, options: CrossvalOptions, console: Console) -> "Plan":
    """Resolve rows and folds; nothing is written."""
    from kdnet.rows import read_rows, select_rows, sweep  # noqa: PLC0415

    rows = select_rows(options.rows, *read_rows(options.rows_file))
    # What needs PyTorch is imported only now, so that --help and mistakes in rows come at once.
    from kdnet.runs.plan import deal, load_folds, make_plan  # noqa: PLC0415
    from kdnet.runs.subjects import find_data, with_equal_steps  # noqa: PLC0415

    # Each row says how it is taught.
    config = replace(config, objective=replace(config.objective, recipe="options"))
    data = find_data(config, console)
    if options.sweep == "modalities":
        rows = sweep(rows, config.data.teacher_modalities or tuple(data.description.modalities))
    validation = config.data.validation_fraction > 0
    folds = (
        deal(data.foldable, config, options.repeats)
        if options.folds_file is None
        else load_folds(options.folds_file, data.foldable, validation=validation)
    )
    # Folds differ by a subject or two; every row of every fold takes the steps of the first one's.
    config = with_equal_steps(config, folds[0].split, data)
    seeds, subsets = options.seeds, options.subsets
    return make_plan(
        "crossval", "Cross-validation", config, rows, folds, data, seeds=seeds, subsets=subsets
    )


def refuse(config: Config, options: CrossvalOptions) -> None:
    """Refuse what the types of the options allow and no cross-validation can use."""
    seeds, training = options.seeds, config.training
    here = (
        "crossval.py trains every fold, each unit on one device. Case lists of your own: "
        "--folds-file. One unit: --unit. A single fold on several devices: train.py"
    )
    problems = {
        f"--split-file: {here}": config.data.split_file is not None,
        f"--fold: {here}": config.data.fold != 0,
        f"--devices: {here}": training.devices not in {1, "auto"},
        f"--num-nodes: {here}": training.num_nodes != 1,
        f"--repeats is {options.repeats}; expected 1 or more": options.repeats < 1,
        "--rows names no row": not options.rows,
        f"--seeds names a seed twice: {', '.join(map(str, seeds))}": len({*seeds}) < len(seeds),
        f"--seeds must be 0 or more, below 2^32: {seeds}": any(not 0 <= s < 2**32 for s in seeds),
    }
    for problem, found in problems.items():
        if found:
            raise UserError(f"{problem}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: cross_validate(given, Console(markup=False)))


if __name__ == "__main__":
    sys.exit(main())
