"""When does privileged distillation help, and by how much: a grid of recipes and label counts.

Train a student by several recipes, with several numbers of labelled and unlabelled subjects, folds
and seeds, and say what each recipe gains over the baseline that learns from the labels alone.

Examples:
  study.py --study phantoms
      the study of phantoms: kdnet/studies/phantoms.yaml
  study.py --study lgg --data-root LGG --jobs 2
      that of patients with lower-grade glioma
  study.py --study mine.yaml --data-root PATIENTS --description patients.yaml
      your own recipes and counts, in the form of kdnet/studies/lgg.yaml
  study.py --study lgg --data-root LGG --show status
      how far every unit is; --show units lists them with their numbers, and --unit NUMBER trains
      one of them, for array jobs
  report.py runs/study-lgg
      every table and figure again, from the stored rows

Every recipe, count, fold and seed is a unit. A unit that is done is never trained again; one that
was stopped goes on. Blocks may be added to the file at any time.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from kdnet.command import console, exit_status
from kdnet.config import Config, Program, early, limited, parse_for
from kdnet.errors import UserError
from kdnet.studies.design import read_design


@dataclass(frozen=True)
class StudyOptions:
    """Units of a study.

    Args:
        study: Name of a study in kdnet/studies/, or YAML file of your own in the same form.
        jobs: Units trained at a time: a number, or "auto": one for each GPU; on a CPU one for
            every processor, up to 4, each with its share of threads.
        unit: Train this unit alone, by its name or number, and stop; for array jobs. Its teacher is
            trained first if that has not been done.
        only: Train only units whose names contain this text, such as fold0 or baseline, and the
            teachers that they need.
        search: Instead, try options of a recipe: name of a search in the study's file. It trains on
            a part of the training subjects of a fold and compares on the others; the test subjects
            of that fold stay unseen.
        trials: How many trials the search makes in all, those of earlier starts counted.
        show: "units" lists the units with their numbers, "status" shows how far each one is; both
            prepare the folder if that has not been done, and train nothing.
    """

    study: str = "phantoms"
    jobs: int | Literal["auto"] = limited("auto", at_least=1)
    unit: str | None = None
    only: str | None = None
    search: str | None = None
    trials: int = 12
    show: Literal["units", "status"] | None = None


#: What differs from start to start and changes no number.
_OF_ONE_START = {"--jobs", "--only", "--unit", "--show", "--out", "--cache-dir", "--workers"}

_FIRST = ("study", "jobs", "only", "search", "trials", "show")
STUDY = Program("study.py", __doc__, StudyOptions, "runs/study", _FIRST)


def study(arguments: Sequence[str], console: Console) -> int:
    """Train what is missing, store the rows, and make tables and figures."""
    wanted = early(arguments, "study").get("study", StudyOptions.study)
    design = read_design(wanted)
    given = [*design.arguments(), "--out", f"runs/study-{design.name}", *arguments]
    try:
        config, options = parse_for(STUDY, given)
    except UserError:
        # Of its file alone, so that the file is named where it is at fault.
        try:
            parse_for(STUDY, design.arguments())
        except UserError as error:
            raise UserError(f"--study {wanted}, its options: {error}") from error
        raise
    refuse(config, options, design.name)
    rows, seeds = design.rows()
    for row in rows:
        row.configure(config)
    # What needs PyTorch is imported only now, so that --help and mistakes in a file come at once.
    from kdnet.results.collected import show_results  # noqa: PLC0415
    from kdnet.runs.plan import deal, make_plan  # noqa: PLC0415
    from kdnet.runs.pool import carry_out  # noqa: PLC0415
    from kdnet.runs.subjects import find_data  # noqa: PLC0415

    if options.search is not None:
        from kdnet.results.study_tables import trials_table  # noqa: PLC0415
        from kdnet.studies.search import search  # noqa: PLC0415

        folder = search(design, options.search, config, trials=options.trials, console=console)
        console.print(trials_table(folder).text(), soft_wrap=True)
        return 0

    data = find_data(config, console)
    folds = deal(data.foldable, config)
    facts = design.facts() | {"commands": (published(arguments),)}
    plan = make_plan(
        "study", design.title, config, rows, folds, data=data, seeds=seeds, facts=facts
    )
    units = plan.with_teachers(unit for unit in plan.units() if (options.only or "") in unit.name)
    if not units:
        raise UserError(f"--only {options.only}: no unit has such a name; --show units lists them.")
    units = [unit for unit in plan.units() if unit in units]  # numbered as without --only
    plan, failed = carry_out(plan, units, options, [sys.executable, __file__, *arguments], console)
    if failed is None:
        return 0
    show_results(plan, console)
    return 1 if failed else 0


def refuse(config: Config, options: StudyOptions, name: str) -> None:
    """Refuse what a study has no use for."""
    if config.network.teacher_model is not None:
        raise UserError(
            "study.py does not take --teacher-model: it trains a teacher for every fold and number "
            "of labelled subjects."
        )
    others = [name for name in ("unit", "only", "show") if getattr(options, name) is not None]
    if options.search is not None and others:
        raise UserError(
            f"--search {options.search} makes trials one after the other; --{others[0]} chooses "
            "among the units of the study. Give one of them."
        )
    if Path(options.study).stem != name:
        raise UserError(
            f"The configuration file names the study {options.study}, which sets the defaults and "
            "must be known before; give --study on the command line."
        )


def published(arguments: Sequence[str]) -> str:
    """Return the command that trains all units, as it may be shown to others.

    >>> published(["--study", "lgg", "--data-root=/home/me/LGG", "--only", "fold0"])
    'python examples/brats_kdnet/study.py --study lgg --data-root LGG'
    """
    kept = ["python", "examples/brats_kdnet/study.py"]
    words = [part for w in arguments for part in (w.split("=", 1) if w[:2] == "--" else [w])]
    for word, value in zip(words, [*words[1:], "--"], strict=True):
        name = word.replace("_", "-")
        if word.startswith("--") and name not in _OF_ONE_START:
            # Where data lie on this machine is nobody's business.
            path = name in {"--data-root", "--unlabelled-root"}
            given = [] if value.startswith("--") else [Path(value).name if path else value]
            kept += [word, *given]
    return shlex.join(kept)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: study(given, console()))


if __name__ == "__main__":
    sys.exit(main())
