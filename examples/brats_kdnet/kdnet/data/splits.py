"""Which subjects train, validate and test: stratified folds that a seed fixes.

All subjects of a patient, who may have come several times, stay in one part.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kdnet.data.description import Description
from kdnet.data.subjects import Subject, patient_of
from kdnet.errors import UserError


@dataclass(frozen=True)
class Split:
    """Names of the subjects of one fold; no name stands in two parts.

    Attributes:
        train: Subjects whose losses are minimised.
        validation: Subjects that choose the checkpoint and the learning rate.
        test: Subjects that are scored once, at the end.
        unlabelled: Subjects without a reference, from which students learn what the teacher says.
        patients: Whose visits subjects are, where that is not a patient of the subject's name.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    unlabelled: tuple[str, ...] = ()
    patients: Mapping[str, str] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the parts by name; unlabelled subjects and patients only where there are any."""
        optional = {"unlabelled": self.unlabelled, "patients": self.patients}
        return {k: v for k, v in asdict(self).items() if v or k not in optional}

    @property
    def names(self) -> tuple[str, ...]:
        """All its subjects."""
        return (*self.train, *self.validation, *self.test, *self.unlabelled)

    def torn(self) -> str:
        """Say which patients stand in more than one part; empty if none do."""
        parts = ((*self.train, *self.unlabelled), self.validation, self.test)
        # Unlabelled subjects teach as well: they count as training.
        found = [{self.patients.get(name, name) for name in part} for part in parts]
        shared = sorted(found[0] & found[1] | found[0] & found[2] | found[1] & found[2])
        if not shared:
            return ""
        return (
            f"{len(shared)} patients stand in more than one part: {', '.join(shared[:5])}. Keep "
            "all their visits in one, or say in the description's `patient` whose visit a name is."
        )


def patients_of(subjects: Iterable[Subject]) -> dict[str, str]:
    """Return whose visits subjects are; one that is not listed is a patient of its own."""
    return {s.name: s.patient for s in subjects if s.patient not in {"", s.name}}


def seen_before(names: Iterable[str], seen: Iterable[str], description: Description) -> list[str]:
    """Return the subjects of whose patients a network has seen any visit."""
    # By patient, as another visit shows the same tumour.
    patients = {patient_of(name, description.visits) for name in seen}
    return sorted(name for name in names if patient_of(name, description.visits) in patients)


def split_subjects(
    subjects: Sequence[Subject], *, folds: int, fold: int, validation_fraction: float, seed: int
) -> Split:
    """Deal subjects into folds, each with its share of every grade."""
    order = _stratified_order(subjects, seed)
    if folds > len(order) or fold >= folds:
        raise UserError(
            f"{len(order)} patients can be dealt into as many folds at most, numbered from 0; "
            f"found fold {fold} of {folds}."
        )
    # Every so-manieth of an order sorted by grade: folds share grades evenly.
    test = order[fold::folds]
    rest = [patient for index, patient in enumerate(order) if index % folds != fold]
    count = max(1, round(validation_fraction * len(rest))) if validation_fraction else 0
    # Evenly spaced places in an order sorted by grade take the same share of each grade.
    places = {int((index + 0.5) * len(rest) / count) for index in range(count)}
    validation = [patient for index, patient in enumerate(rest) if index in places]
    train = [patient for index, patient in enumerate(rest) if index not in places]
    if not train:
        raise UserError(
            f"{len(order)} patients in {folds} folds with {count} for validation leave none to "
            "train on; use fewer folds or a smaller validation fraction."
        )
    patients = patients_of(subjects)
    return Split(_names(train), _names(validation), _names(test), patients=patients)


def share_labels(
    split: Split,
    *,
    labelled: int | None,
    unlabelled: int | None,
    leave_out: tuple[int, int] | None = None,
) -> Split:
    """Take the reference from some of the training subjects.

    Of a patient with several visits all keep it or none, so there may be fewer than asked for.
    """
    if labelled is None and unlabelled is None and leave_out is None:
        return split
    order = _groups(sorted(split.train), split.patients)
    # The same whatever the numbers are, so that who is labelled among 5 is so among 10.
    random.Random("labelled:" + "/".join(sorted(split.train))).shuffle(order)
    total = len(split.train)
    count = total if labelled is None else labelled
    more = max(total - count, 0) if unlabelled is None else unlabelled
    if count + more > total:
        raise UserError(
            f"--labelled {count} and --unlabelled {more} ask for more than the {total} training "
            "subjects of this fold. Ask for fewer, or give further subjects without a reference in "
            "a folder of their own: --unlabelled-root."
        )
    # Unlabelled ones come after the labelled, so that more labels add to those there were.
    chosen, rest = _first(order, count)
    part, parts = leave_out or (-1, 1)
    used = [patient for place, patient in enumerate(chosen) if place % parts != part]
    if parts > len(chosen) or not used:
        raise UserError(
            f"--labelled {count} takes {len(chosen)} patients (the first has {len(order[0])} "
            f"visits), which cannot be dealt into --out-of-fold {parts} parts with some left to "
            "train on. Ask for more labelled subjects, or for fewer parts."
        )
    others = _names(_first(rest, more)[0])
    return replace(split, train=_names(used), unlabelled=(*split.unlabelled, *others))


def _groups(names: Iterable[str], patients: Mapping[str, str]) -> list[list[str]]:
    """Names by patient, in the order of each one's first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[patients.get(name, name)].append(name)
    return list(groups.values())


def _first(groups: Sequence[list[str]], count: int) -> tuple[list[list[str]], list[list[str]]]:
    """As many of the first groups as have at most so many members, and the others."""
    # Whole patients, so that none is labelled in one visit and unlabelled in another.
    sizes = itertools.accumulate(len(group) for group in groups)
    place = sum(size <= count for size in sizes)
    return list(groups[:place]), list(groups[place:])


def _names(groups: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(sorted(itertools.chain.from_iterable(groups)))


def _stratified_order(subjects: Sequence[Subject], seed: int) -> list[list[str]]:
    """Patients grouped by grade, shuffled within each grade."""
    # By grade and name alone, not by the order of files on the disk.
    grades = {subject.name: subject.grade or "" for subject in subjects}
    groups = _groups(sorted(grades), patients_of(subjects))
    order: list[list[str]] = []
    for grade in sorted({*grades.values()}):
        own = [group for group in groups if grades[group[0]] == grade]
        random.Random(f"{seed}:{grade}").shuffle(own)
        order += own
    return order
