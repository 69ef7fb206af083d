"""Which subjects train, validate and test: stratified folds that a seed fixes."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kdnet.data.layouts import Subject
from kdnet.errors import UserError
from kdnet.files import UnreadableError, read_json, write_text


@dataclass(frozen=True)
class Split:
    """Names of the subjects of one fold; no name stands in two parts.

    Attributes:
        train: Subjects whose losses are minimised.
        validation: Subjects that choose the checkpoint and the learning rate.
        test: Subjects that are scored once, at the end.
        unlabelled: Subjects without a reference, from which students learn what the teacher says.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    unlabelled: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Write the names as JSON; the file appears when it is complete."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, Sequence[str]]:
        """Return the lists by name; that of unlabelled subjects only where there are any."""
        lists = asdict(self)
        if not self.unlabelled:
            del lists["unlabelled"]
        return lists

    @classmethod
    def read(cls, path: Path) -> Split:
        """Read a split without comparing it with any subjects."""
        return cls(**_read_parts(path))

    @classmethod
    def load(cls, path: Path, subjects: Iterable[Subject]) -> Split:
        """Read a split and check it against the subjects that were found."""
        split = cls.read(path)
        _check_names(path, split, {subject.name for subject in subjects})
        return split


def split_subjects(
    subjects: Sequence[Subject], *, folds: int, fold: int, validation_fraction: float, seed: int
) -> Split:
    """Deal subjects into folds, each with its share of every grade."""
    _check_numbers(len(subjects), folds, fold, validation_fraction)
    order = _stratified_order(subjects, seed)
    test = order[fold::folds]
    rest = [name for index, name in enumerate(order) if index % folds != fold]
    count = max(1, round(validation_fraction * len(rest))) if validation_fraction else 0
    # Evenly spaced places in an order sorted by grade take the same share of each grade.
    places = {int((index + 0.5) * len(rest) / count) for index in range(count)}
    validation = [name for index, name in enumerate(rest) if index in places]
    train = [name for index, name in enumerate(rest) if index not in places]
    if not train:
        raise UserError(
            f"{len(subjects)} subjects in {folds} folds with {count} for validation leave none to "
            "train on; use fewer folds or a smaller validation fraction."
        )
    return Split(tuple(sorted(train)), tuple(sorted(validation)), tuple(sorted(test)))


def share_labels(
    split: Split,
    *,
    labelled: int | None,
    unlabelled: int | None,
    leave_out: tuple[int, int] | None = None,
) -> Split:
    """Take the reference from some of the training subjects."""
    if labelled is None and unlabelled is None and leave_out is None:
        return split
    order = sorted(split.train)
    random.Random("labelled:" + "/".join(order)).shuffle(order)
    count = len(order) if labelled is None else labelled
    rest = order[count:]
    more = len(rest) if unlabelled is None else unlabelled
    if count > len(order) or more > len(rest):
        raise UserError(
            f"--labelled {count} and --unlabelled {more} ask for {count + more} training subjects; "
            f"this fold has {len(order)}. Ask for fewer, or give further subjects without a "
            "reference in a folder of their own: --unlabelled_root."
        )
    part, parts = leave_out or (-1, 1)
    if parts > count:
        raise UserError(
            f"{count} labelled training subjects cannot be dealt into {parts} parts; set "
            "--out_of_fold to a smaller number."
        )
    used = [name for place, name in enumerate(order[:count]) if place % parts != part]
    if not used:
        raise UserError(f"--leave_out {part},{parts} leaves none of {count} labelled subjects.")
    return replace(
        split,
        train=tuple(sorted(used)),
        unlabelled=(*split.unlabelled, *sorted(rest[:more])),
    )


def _stratified_order(subjects: Sequence[Subject], seed: int) -> list[str]:
    """Names grouped by grade, shuffled within each grade."""
    strata: dict[str, list[str]] = defaultdict(list)
    for subject in subjects:
        strata[subject.grade or ""].append(subject.name)
    order: list[str] = []
    for grade in sorted(strata):
        names = sorted(strata[grade])
        random.Random(f"{seed}:{grade}").shuffle(names)
        order += names
    return order


def _check_numbers(subjects: int, folds: int, fold: int, validation_fraction: float) -> None:
    if folds < 2 or not 0 <= fold < folds:
        raise UserError(
            f"folds must be at least 2 and fold between 0 and folds - 1; found folds {folds}, "
            f"fold {fold}."
        )
    if not 0 <= validation_fraction < 1:
        raise UserError(
            f"validation_fraction must be at least 0 and below 1; found {validation_fraction}."
        )
    if subjects < folds:
        raise UserError(f"{folds} folds need as many subjects; found {subjects}.")


def _read_parts(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        parts = read_json(path)
    except UnreadableError as error:
        raise UserError(f"{path}: expected a split as JSON; {error}.") from error
    names = ("train", "validation", "test")
    if not isinstance(parts, dict) or {*parts} - {"unlabelled"} != {*names}:
        found = ", ".join(parts) if isinstance(parts, dict) else type(parts).__name__
        raise UserError(
            f"{path}: expected the keys {', '.join(names)}, and perhaps unlabelled; found {found}."
        )
    if not all(isinstance(listed, list) for listed in parts.values()):
        raise UserError(f"{path}: expected a list of names for each of {', '.join(parts)}.")
    return {name: tuple(map(str, listed)) for name, listed in parts.items()}


def _check_names(path: Path, split: Split, known: set[str]) -> None:
    listed = [*split.train, *split.validation, *split.test, *split.unlabelled]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise UserError(f"{path}: named more than once: {', '.join(twice[:10])}.")
    unknown = sorted(set(listed) - known)
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} names are not in the data set: {', '.join(unknown[:10])}. "
            f"Known are for example {', '.join(sorted(known)[:3])}."
        )
