"""The case lists of all folds: made from a seed, or read from a file."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdnet.data.layouts import Subject
from kdnet.data.splits import Split, split_subjects
from kdnet.errors import UserError
from kdnet.files import UnreadableError, read_json
from kdnet.files import write_text

_PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Fold:
    """One split of the subjects, numbered through all repeats.

    Attributes:
        number: From 0.
        repeat: Which dealing of the subjects it belongs to, from 0; within one, every subject is
            tested at most once.
        split: Names of training, validation and test subjects.
    """

    number: int
    repeat: int
    split: Split


def deal(
    subjects: Sequence[Subject],
    *,
    folds: int,
    repeats: int,
    validation_fraction: float,
    seed: int,
) -> list[Fold]:
    """Deal the subjects into folds, once or several times."""
    return [
        Fold(
            number=repeat * folds + fold,
            repeat=repeat,
            split=split_subjects(
                subjects,
                folds=folds,
                fold=fold,
                validation_fraction=validation_fraction,
                seed=seed + repeat,
            ),
        )
        for repeat in range(repeats)
        for fold in range(folds)
    ]


def save_folds(path: Path, folds: Iterable[Fold]) -> None:
    """Write case lists as JSON, in the form that `load_folds` reads."""
    lists = [{"repeat": fold.repeat, **fold.split.to_dict()} for fold in folds]
    write_text(path, json.dumps({"folds": lists}, indent=2) + "\n")


def load_folds(path: Path, subjects: Iterable[Subject], *, validation: bool = True) -> list[Fold]:
    """Read case lists and check them against each other and the data set."""
    lists = _read(path)
    folds = [
        Fold(
            number, int(content.get("repeat", 0)), Split(**{p: _names(content[p]) for p in _PARTS})
        )
        for number, content in enumerate(lists)
    ]
    known = {subject.name for subject in subjects}
    needed = [part for part in _PARTS if validation or part != "validation"]
    problems = [problem for fold in folds for problem in _problems(fold, known, needed)]
    problems += _overlaps(folds)
    if problems:
        raise UserError(f"{path}: these folds cannot be used:\n" + "\n".join(problems))
    return folds


def _names(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(map(str, values))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        content = read_json(path)
    except UnreadableError as error:
        raise UserError(f"--folds_file: {path} cannot be read: {error}.") from error
    lists = content.get("folds") if isinstance(content, dict) else None
    right = isinstance(lists, list) and all(
        isinstance(fold, dict)
        and all(isinstance(fold.get(part), list) for part in _PARTS)
        and type(fold.get("repeat", 0)) is int
        and fold.get("repeat", 0) >= 0
        for fold in lists
    )
    if not lists or not right:
        raise UserError(
            f'--folds_file: {path}: expected {{"folds": [{{"train": [...], "validation": [...], '
            '"test": [...]}, ...]}, lists of case names for every fold, and perhaps "repeat", a '
            "number from 0."
        )
    return list(lists)


def _problems(fold: Fold, known: set[str], needed: Sequence[str]) -> list[str]:
    listed = [name for part in _PARTS for name in getattr(fold.split, part)]
    empty = [part for part in needed if not getattr(fold.split, part)]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    absent = sorted(set(listed) - known)
    found = {
        "no subjects for": empty,
        "named more than once:": twice,
        "not in the data set:": absent,
    }
    return [
        f"  fold {fold.number}: {what} {', '.join(names[:10])}"
        + f" and {len(names) - 10} more" * (len(names) > 10)
        for what, names in found.items()
        if names
    ]


def _overlaps(folds: Sequence[Fold]) -> list[str]:
    """Test sets of one repeat that share subjects; such a case would count twice."""
    problems = []
    for index, fold in enumerate(folds):
        for other in folds[index + 1 :]:
            shared = sorted({*fold.split.test} & {*other.split.test})
            if shared and fold.repeat == other.repeat:
                problems.append(
                    f"  folds {fold.number} and {other.number}: their test sets overlap: "
                    f"{', '.join(shared[:10])}. Repeated splits carry different numbers under "
                    '"repeat".'
                )
    return problems
