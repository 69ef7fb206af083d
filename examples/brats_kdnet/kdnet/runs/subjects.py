"""The subjects of a run: found once, checked, dealt into parts, and prepared for networks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kdnet.config import Config, DataConfig
from kdnet.data import checks
from kdnet.data.description import Description, load_description
from kdnet.data.loading import prepare
from kdnet.data.phantom_files import generate_phantoms, phantom_names
from kdnet.data.samples import samples_per_subject
from kdnet.data.splits import Split, seen_before, share_labels
from kdnet.data.subjects import Subject, check_patients, find_subjects
from kdnet.data.volumes import read_geometry
from kdnet.errors import UserError, printable
from kdnet.files import write_json
from kdnet.runs.folder import Folder
from kdnet.runs.networks import check_views, describe_network, stacked, view_of, workers


@dataclass(frozen=True)
class DataSet:
    """A data set and its subjects.

    Attributes:
        description: What it is.
        subjects: By name; of phantoms that are not made yet the names alone.
        further: Names of those among them that have no reference and belong to no fold.
        skipped: What is wrong with others, which were left out; None if nobody asked.
    """

    description: Description
    subjects: Mapping[str, Subject]
    further: tuple[str, ...] = ()
    skipped: tuple[checks.Problem, ...] | None = None

    @property
    def foldable(self) -> list[Subject]:
        """The subjects that folds are made of."""
        further = {*self.further}
        return [subject for name, subject in self.subjects.items() if name not in further]

    def named(self, names: Iterable[str], *, hidden: Iterable[str] = ()) -> list[Subject]:
        """Return subjects in the order of the data set, some of them without their reference."""
        wanted, bare = {*names}, {*hidden}
        return [
            replace(subject, segmentation=None) if name in bare else subject
            for name, subject in self.subjects.items()
            if name in wanted
        ]


def find_data(config: Config, console: Console) -> DataSet:
    """Find the subjects; writes nothing, and reads images only to leave out unsound ones."""
    data = config.data
    if data.data_root is None:
        description = load_description(Path("phantom"))
        # Their names are enough to deal them; the images are made when the folder is there.
        subjects = [Subject(name, {}) for name in phantom_names(data.phantoms)]
    else:
        given = None if data.description is None else load_description(Path(data.description))
        description, subjects = find_subjects(data.data_root, given)
    check_views(data, description)
    teacher, student = (view_of(role, data, description) for role in ("teacher", "student"))
    if {*teacher} <= {*student}:
        console.print(
            f"Warning: the teacher sees {', '.join(teacher)}, and nothing that the student does "
            "not see. Give more --teacher-modalities, or fewer --student-modalities.",
            soft_wrap=True,
        )
    found = DataSet(description, {subject.name: subject for subject in subjects})
    if data.data_root is not None and data.skip_invalid:
        found = _without_unsound(config, found, console)
    found = _with_further(data, found)
    for some in filter(None, (found.foldable, found.named(found.further))):
        if text := check_patients(some, description):
            console.print(f"Warning: {text}", soft_wrap=True)
    return found


def make_phantoms(config: Config, data: DataSet, cache: Path, console: Console) -> DataSet:
    """Make the phantoms that a run asks for, unless they are there."""
    if config.data.data_root is not None:
        return data
    count, size, seed = config.data.phantoms, config.data.phantom_size, config.training.seed
    root = cache / f"phantoms-{count}-{size}-seed{seed}"
    generate_phantoms(root, subjects=count, seed=seed, size=size, progress=console.is_terminal)
    _, subjects = find_subjects(root)
    return replace(data, subjects={**data.subjects, **{one.name: one for one in subjects}})


def _with_further(data: DataConfig, found: DataSet) -> DataSet:
    """Add the subjects of --unlabelled-root, which belong to no fold."""
    if data.unlabelled_root is None:
        return found
    _, more = find_subjects(data.unlabelled_root, found.description)
    # A student would learn from images that test it.
    known = seen_before((one.name for one in more), found.subjects, found.description)
    if known:
        raise UserError(
            f"--unlabelled-root: {data.unlabelled_root} holds {len(known)} patients of the data "
            f"set, such as {known[0]}, which may be among those that test. Remove them there, or "
            "give them other names if they are other patients."
        )
    every = {**found.subjects, **{subject.name: subject for subject in more}}
    return replace(found, subjects=every, further=tuple(subject.name for subject in more))


def _without_unsound(config: Config, found: DataSet, console: Console) -> DataSet:
    """Leave out the subjects whose files are not sound, or those that the run began without."""
    problems: list[checks.Problem] | None = None
    # A subject that was repaired since would change the folds.
    left_out = Folder(config.run.out or Path()).read_skipped()
    if left_out is None:
        problems = _told(_checked(config, found, found.subjects, console), console)
        _, left_out = checks.keep_usable(found.foldable, problems)
        if problems:
            console.out(checks.listed(problems))
            names = printable(", ".join(left_out[:10])) + ", ..." * (len(left_out) > 10)
            console.print(f"Left out: {len(left_out)} of {len(found.subjects)} subjects: {names}")
    kept = {name: one for name, one in found.subjects.items() if name not in {*left_out}}
    return replace(found, subjects=kept, skipped=None if problems is None else tuple(problems))


def record_skipped(folder: Folder, data: DataSet) -> None:
    """Note whom a run does without, as soon as its folder is there."""
    if data.skipped is not None and folder.read_skipped() is None:
        names = list(dict.fromkeys(problem.subject for problem in data.skipped))
        problems = checks.problems_as_rows(data.skipped)
        write_json(folder.skipped, {"subjects": names, "problems": problems})


def shared_out(data: DataConfig, split: Split, found: DataSet) -> Split:
    """Return the split in which as many subjects have a reference as the configuration says."""
    shared = share_labels(
        split, labelled=data.labelled, unlabelled=data.unlabelled, leave_out=data.leave_out
    )
    return replace(shared, unlabelled=(*shared.unlabelled, *found.further))


def with_equal_steps(config: Config, split: Split, found: DataSet) -> Config:
    """Make all trainings as long as that of the student, which alone sees unlabelled subjects."""
    split = shared_out(config.data, split, found)
    # A longer training would be an advantage of its own.
    if not split.unlabelled or config.training.samples_per_epoch:
        return config
    grid = describe_network("student", config, found.description).grid
    count = (len(split.train) + len(split.unlabelled)) * samples_per_subject(config.data, grid)
    return replace(config, training=replace(config.training, samples_per_epoch=count))


def check_files(config: Config, data: DataSet, splits: Sequence[Split], console: Console) -> None:
    """Read every file of the subjects that are used and report all problems together."""
    labelled = {name for s in splits for name in (*s.train, *s.validation, *s.test)}
    unlabelled = {name for s in splits for name in s.unlabelled} - labelled
    if data.skipped is not None:
        # All others have been read a moment ago.
        labelled, unlabelled = set(), unlabelled & {*data.further}
    problems = _checked(config, data, labelled, console)
    problems += _checked(config, data, unlabelled, console, labelled=False)
    checks.raise_for_problems(_told(problems, console))


def _checked(
    config: Config, data: DataSet, names: Iterable[str], console: Console, *, labelled: bool = True
) -> list[checks.Problem]:
    """What is wrong with the files of some subjects."""
    return checks.check_subjects(
        data.description,
        data.named(names, hidden=() if labelled else names),
        workers=workers(config.data),
        progress=console.is_terminal,
        need_segmentation=labelled,
        modalities=stacked(config.data, data.description),
    )


def _told(problems: list[checks.Problem], console: Console) -> list[checks.Problem]:
    """Say in one line what only looks wrong, and return the rest."""
    unusual = [problem for problem in problems if problem.warning]
    if unusual:
        console.print(
            f"{len(unusual)} images look unusual, which check_data.py lists: "
            f"{unusual[0].subject}, {unusual[0].reason}",
            soft_wrap=True,
        )
    return [problem for problem in problems if not problem.warning]


def prepare_parts(
    config: Config, data: DataSet, split: Split, cache: Path, console: Console
) -> dict[str, Any]:
    """Preprocess the subjects that train, validate or teach into the cache."""
    description = data.description
    preprocessing = replace(
        describe_network("teacher", config, description),
        modalities=stacked(config.data, description),
    ).preprocessing()
    return {
        part: prepare(
            data.named(getattr(split, part), hidden=split.unlabelled),
            preprocessing,
            cache,
            workers(config.data),
            progress=console.is_terminal,
        )
        for part in ("train", "validation", "unlabelled")
    }


def orientation_of(data: DataSet, split: Split) -> str:
    """Return the axis codes of the first training subject, such as "LPS"."""
    first = data.subjects[split.train[0]]
    return read_geometry(next(iter(first.images.values()))).orientation
