"""Every row of a table on every fold: train what is missing, then show the tables.

Rows are networks and how they are trained (teacher, baseline, KD-Net, comparators); published
numbers stand beside the paper's tables.

Examples:
  crossval.py
      phantoms, 3 folds x the paper's five rows
  crossval.py --data-root BraTS2018 --preset paper --rows table1,table2
      Tables 1 and 2 of arXiv:2106.09564
  crossval.py --data-root BraTS2021 --rows baseline,kdnet --seeds 0,1,2 --folds 5
      two rows (and the teacher), five folds, three seeds
  crossval.py --data-root BraTS2021 --rows baseline,kdnet --sweep modalities
      each single modality in turn as the student's
  crossval.py --data-root BraTS2018 --protocol brats2018-public --rows baseline,kdnet
      the splits on which others publish, beside their numbers
  crossval.py --data-root BraTS2021 --show units
      what an array job would train; --unit NUMBER trains one of them

Every fold, seed and row is a unit. A unit that is done is never trained again; a unit that was
stopped goes on. Further rows, seeds and processes may be added at any time by giving the same
command with them.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from kdnet.command import console, exit_status
from kdnet.config import Config, Program, as_arguments, early, limited, parse_for
from kdnet.errors import UserError
from kdnet.files import read_mapping
from kdnet.rows import Row, read_rows, select_rows, sweep

if TYPE_CHECKING:
    from kdnet.runs.plan import Plan


@dataclass(frozen=True)
class CrossvalOptions:
    """Rows, folds and units of a cross-validation.

    Args:
        rows: Rows and groups of rows, such as baseline,kdnet or table1; teachers come by
            themselves. Groups: paper (teacher, baseline, gt_kl, gt_kd, kdnet), table1, table2,
            comparators, negative, objectives; kdnet/rows.yaml lists all.
        rows_file: YAML file with rows of your own, in the form of kdnet/rows.yaml.
        protocol: Case names of every fold, and options that belong to them, instead of --folds:
            "brats2018-public", or a JSON file of your own in the form of protocols/*.json.
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
    protocol: str | None = None
    repeats: int = limited(1, at_least=1)
    seeds: tuple[int, ...] = limited((), at_least=0, below=2**32)
    sweep: Literal["none", "modalities"] = "none"
    subsets: bool = True
    lesions: bool = False
    jobs: int | Literal["auto"] = limited("auto", at_least=1)
    unit: str | None = None
    show: Literal["units", "status"] | None = None


_FIRST = ("rows", "protocol", "folds", "seeds", "jobs", "show")
CROSSVAL = Program("crossval.py", __doc__, CrossvalOptions, "runs/crossval-PRESET", _FIRST)


def cross_validate(arguments: Sequence[str], console: Console) -> int:
    """Train what is missing and show the results."""
    config, options = parse_for(CROSSVAL, with_protocol(arguments))
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
        console.print(f"Written: {collect_lesions(plan)}", soft_wrap=True)
    return 1 if failed else 0


def with_protocol(arguments: Sequence[str]) -> list[str]:
    """Put the options of a protocol before those that are given."""
    protocol = early(arguments, "protocol").get("protocol")
    return [*as_arguments(protocol_options(protocol)), *arguments]


def protocol_file(protocol: str) -> Path:
    """Return the case lists of a protocol with its options."""
    own = Path(__file__).with_name("protocols") / f"{protocol}.json"
    return own if own.is_file() else Path(protocol)


def protocol_options(protocol: str | None) -> dict[str, Any]:
    """Return what a protocol sets; its case lists are read where the subjects are known."""
    content = {} if protocol is None else read_mapping(protocol_file(protocol))
    options = content.get("options", {})
    if not isinstance(options, dict):
        raise UserError(f"--protocol {protocol}: its options must be names and values.")
    return options


def plan_rows(config: Config, options: CrossvalOptions, console: Console) -> "Plan":
    """Resolve rows and folds; nothing is written."""
    rows = select_rows(options.rows, *read_rows(options.rows_file))
    # What needs PyTorch is imported only now, so that --help and mistakes in rows come at once.
    from kdnet.runs.plan import deal, load_folds, make_plan, unused_text  # noqa: PLC0415
    from kdnet.runs.subjects import find_data, with_equal_steps  # noqa: PLC0415

    # Each row says how it is taught.
    config = replace(config, objective=replace(config.objective, recipe="options"))
    data = find_data(config, console)
    if options.sweep == "modalities":
        rows = sweep(rows, config.data.teacher_modalities or tuple(data.description.modalities))
    facts = {}
    if options.protocol is None:
        folds = deal(data.foldable, config, options.repeats)
    else:
        path = protocol_file(options.protocol)
        folds = load_folds(path, data.foldable, validation=config.data.validation_fraction > 0)
        if unused := unused_text(folds, data.foldable):
            console.print(unused, soft_wrap=True)
        facts = {"case_lists": path.stem}
    # Folds differ by a subject or two; every row of every fold takes the steps of the first one's.
    config = with_equal_steps(config, folds[0].split, data)
    rows = with_equal_trainings(rows, config)
    title, subsets = "Cross-validation", options.subsets
    seeds = {row.name: options.seeds for row in rows if options.seeds}
    return make_plan(
        "crossval", title, config, rows, folds, data=data, seeds=seeds, subsets=subsets, facts=facts
    )


def with_equal_trainings(rows: Sequence[Row], config: Config) -> list[Row]:
    """Measure students that start from their teacher against as many epochs as both had."""
    named = {row.name: row for row in rows}
    found = dict(named)

    def starts(row: Row) -> bool:
        return bool(row.teacher) and row.options.get("start", config.network.start) == "teacher"

    for row in rows:
        control = named.get(row.against or "")
        if row.teacher is None or control is None or not starts(row):
            continue
        # One that says its epochs was chosen to be compared with; one that starts so had both, too.
        if "epochs" in control.options or starts(control):
            continue
        trained = (row, named[row.teacher])
        epochs = sum(one.options.get("epochs", config.training.epochs) for one in trained)
        longer = replace(
            control,
            name=f"{control.name}_{epochs}_epochs",
            label=f"{control.label}, {epochs} epochs",
            against=None,
            options={**control.options, "epochs": epochs},
        )
        found |= {longer.name: longer, row.name: replace(row, against=longer.name)}
    return list(found.values())


def refuse(config: Config, options: CrossvalOptions) -> None:
    """Refuse what the types of the options allow and no cross-validation can use."""
    seeds, training, chosen = options.seeds, config.training, config.to_dict()
    here = (
        "crossval.py trains every fold, each unit on one device. Case lists of your own: "
        "--protocol. One unit: --unit. A single fold on several devices: train.py"
    )
    problems = {
        f"--split-file: {here}": config.data.split_file is not None,
        f"--fold: {here}": config.data.fold != 0,
        f"--devices: {here}": training.devices not in {1, "auto"},
        f"--num-nodes: {here}": training.num_nodes != 1,
        "--rows names no row": not options.rows,
        f"--seeds names a seed twice: {', '.join(map(str, seeds))}": len({*seeds}) < len(seeds),
    }
    # A preset only says where options begin; with another value it would be another protocol.
    problems |= {
        f"--protocol {options.protocol} has {name} {value}; found {chosen[name]}": True
        for name, value in protocol_options(options.protocol).items()
        if name != "preset" and chosen.get(name, value) != value
    }
    for problem, found in problems.items():
        if found:
            raise UserError(f"{problem}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: cross_validate(given, console()))


if __name__ == "__main__":
    sys.exit(main())
