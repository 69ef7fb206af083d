"""Subjects whose files are sound, and a data set that stays what it was."""

from collections.abc import Sequence

from rich.console import Console

from kdnet.config import Config
from kdnet.config import DataConfig
from kdnet.data.checks import (
    Problem,
    check_subjects,
    keep_usable,
    problem_table,
    problems_as_rows,
    raise_for_problems,
)
from kdnet.data.description import Description
from kdnet.data.subjects import Subject
from kdnet.data.splits import Split
from kdnet.errors import UserError, printable
from kdnet.runs.folders import workers
from kdnet.runs.views import stacked
from kdnet.runs.run_folder import RunFolder


def usable(
    config: Config,
    run: RunFolder,
    description: Description,
    subjects: list[Subject],
    console: Console,
) -> tuple[list[Subject], list[Problem]]:
    """Leave out the subjects whose files are not sound, if that is asked for."""
    if not config.data.skip_invalid:
        return subjects, []
    before = run.read_skipped()
    if before is not None:
        return [subject for subject in subjects if subject.name not in before], []
    found = check_subjects(
        description,
        subjects,
        workers=workers(config.data),
        progress=console.is_terminal,
        modalities=stacked(config.data, description),
    )
    problems = _told(found, console)
    kept, left_out = keep_usable(subjects, problems)
    if problems:
        console.print(problem_table(problems))
        names = printable(", ".join(left_out[:10])) + ", ..." * (len(left_out) > 10)
        console.print(f"Left out: {len(left_out)} of {len(subjects)} subjects: {names}")
    return kept, problems


def record_skipped(config: Config, run: RunFolder, problems: Sequence[Problem]) -> None:
    """Note whom a run does without, as soon as its folder is there."""
    if config.data.skip_invalid and run.read_skipped() is None:
        names = dict.fromkeys(problem.subject for problem in problems)
        run.write_skipped(list(names), problems_as_rows(problems))


def check(
    data: DataConfig,
    description: Description,
    subjects: list[Subject],
    split: Split,
    console: Console,
) -> None:
    """Read every file of the subjects that are used and report all problems together."""
    labelled = {*split.train, *split.validation, *split.test}
    problems = [
        problem
        for names, need in ((labelled, True), ({*split.unlabelled}, False))
        for problem in check_subjects(
            description,
            [subject for subject in subjects if subject.name in names],
            workers=workers(data),
            progress=console.is_terminal,
            need_segmentation=need,
            modalities=stacked(data, description),
        )
    ]
    raise_for_problems(_told(problems, console))


def _told(problems: list[Problem], console: Console) -> list[Problem]:
    """Say in one line what only looks wrong, and return the rest."""
    unusual = [problem for problem in problems if problem.warning]
    if unusual:
        example = f"{unusual[0].subject}, {unusual[0].reason}"
        console.print(
            f"{len(unusual)} images look unusual, which check_data.py lists: {example}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    return [problem for problem in problems if not problem.warning]


def check_unchanged(run: RunFolder, description: Description, split: Split) -> None:
    """Refuse to go on with other subjects or labels than the run began with."""
    before = Split.read(run.cases)
    for part in ("train", "validation", "test", "unlabelled"):
        changed = set(getattr(before, part)) ^ set(getattr(split, part))
        if changed:
            raise UserError(
                f"{run.cases}: the {part} subjects of this run are not those found now; they "
                f"differ in {', '.join(sorted(changed)[:5])}. Restore the data set or the split "
                "file, or choose another --out."
            )
    if not run.has_description(description):
        raise UserError(
            f"{run.root}: the description of the data set has changed since this run began. "
            "Restore it, or choose another --out."
        )
