"""Which subjects train, validate, test and teach without a reference."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kdnet.config import Config
from kdnet.config import DataConfig
from kdnet.data.description import Description, load_description
from kdnet.data.subjects import Subject, find_subjects
from kdnet.data.splits import Split, seen_before, share_labels, split_subjects
from kdnet.errors import UserError
from kdnet.runs.subjects import own_description
from phantoms import phantom_names


def split_of(config: Config, subjects: list[Subject]) -> Split:
    """Return the split of a file, or the fold that the configuration names."""
    data = config.data
    if data.split_file is not None:
        split = Split.load(data.split_file, subjects)
        empty = [part for part in ("train", "validation", "test") if not getattr(split, part)]
        if empty:
            raise UserError(f"{data.split_file}: {' and '.join(empty)} must not be empty.")
        return split
    return split_subjects(
        subjects,
        folds=data.folds,
        fold=data.fold,
        validation_fraction=data.validation_fraction,
        seed=config.training.seed,
    )


def find_split(config: Config) -> Split:
    """Say which subjects will train, validate and test, without reading or writing any image."""
    data = config.data
    if data.data_root is None:
        # Phantoms may not be there yet; they have no grade.
        description = load_description(Path("phantom"))
        subjects = [Subject(name, {}) for name in phantom_names(data.phantoms)]
    else:
        description, subjects = find_subjects(data.data_root, own_description(data))
    return without_references(data, description, subjects, split_of(config, subjects))[1]


def shared_out(data: DataConfig, split: Split) -> Split:
    """Return the split in which as many subjects have a reference as the configuration says."""
    return share_labels(
        split, labelled=data.labelled, unlabelled=data.unlabelled, leave_out=data.leave_out
    )


def without_references(
    data: DataConfig, description: Description, subjects: Sequence[Subject], split: Split
) -> tuple[list[Subject], Split]:
    """Take the reference from the subjects that shall have none, and add the further ones."""
    split = shared_out(data, split)
    more: list[Subject] = []
    if data.unlabelled_root is not None:
        _, more = find_subjects(data.unlabelled_root, description)
        own, others = ([subject.name for subject in found] for found in (subjects, more))
        known = seen_before(others, own, description)
        if known:
            raise UserError(
                f"--unlabelled_root: {data.unlabelled_root} holds {len(known)} patients of the "
                f"data set, such as {known[0]}, which may be among those that test. Remove them "
                "there, or give them other names if they are other patients."
            )
    names = (*split.unlabelled, *(subject.name for subject in more))
    hidden = {*names}
    every = [
        replace(subject, segmentation=None) if subject.name in hidden else subject
        for subject in (*subjects, *more)
    ]
    return every, replace(split, unlabelled=names)
