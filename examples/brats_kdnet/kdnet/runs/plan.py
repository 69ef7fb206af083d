"""What a run consists of: rows, folds and seeds, and the units that they make."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from kdnet.config import Config
from kdnet.data.splits import Split, patients_of, split_subjects
from kdnet.data.subjects import Subject
from kdnet.errors import UserError
from kdnet.files import UnreadableError, read_json
from kdnet.rows import Row, with_part_teachers
from kdnet.runs.folder import Folder, UnitFolder
from kdnet.runs.subjects import DataSet, shared_out

#: What stands beside the lists of a fold.
_BESIDE = ("number", "repeat", "patients")


@dataclass(frozen=True)
class Fold:
    """One split of the subjects.

    Attributes:
        number: From 0, through all repeats.
        repeat: Which dealing of the subjects it belongs to, from 0; within one, every subject is
            tested at most once.
        split: Names of training, validation and test subjects.
    """

    number: int
    repeat: int
    split: Split

    def to_dict(self) -> dict[str, Any]:
        """Return its numbers and lists of names."""
        return {"number": self.number, "repeat": self.repeat, **self.split.to_dict()}


@dataclass(frozen=True)
class Unit:
    """One row on one fold with one seed: what a process trains and scores.

    Attributes:
        row: Which network.
        fold: Which subjects.
        seed: Of weights and order.
    """

    row: Row
    fold: Fold
    seed: int

    @property
    def place(self) -> str:
        """Its fold and seed."""
        return f"fold{self.fold.number}-seed{self.seed}"

    @property
    def name(self) -> str:
        """Row, fold and seed, such as kdnet/fold0-seed0; its folder below units/."""
        return f"{self.row.name}/{self.place}"


@dataclass(frozen=True)
class Plan:
    """A run, resolved: whatever its command, it is a list of units.

    Attributes:
        kind: "train", "crossval" or "study".
        title: Of its page.
        config: What the rows share.
        configs: Of each row, with its own options.
        rows: In the order of the tables.
        folds: Case lists.
        seeds: Of weights and order, by row.
        data: The data set.
        subsets: Whether networks for any subset of modalities are scored on all of them.
        facts: What plan.json says besides, for whoever reads the results.
        experiments: What decides the numbers of each row, as units record it; filled by
            `rehearse_rows`.
    """

    kind: Literal["train", "crossval", "study"]
    title: str
    config: Config
    configs: Mapping[str, Config]
    rows: tuple[Row, ...]
    folds: tuple[Fold, ...]
    seeds: Mapping[str, tuple[int, ...]]
    data: DataSet
    subsets: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)
    experiments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The folder given by --out."""
        return self.config.run.out or Path("runs") / self.config.run.preset

    @property
    def files(self) -> Folder:
        """Its files."""
        return Folder(self.root)

    @property
    def cache(self) -> Path:
        """Where all units find preprocessed subjects and what teachers said."""
        return self.config.data.cache_dir or self.root / "cache"

    @property
    def trusted(self) -> frozenset[str]:
        """Networks that its rows name, so that its own model files may be built again."""
        networks = [config.network for config in self.configs.values()]
        return frozenset().union(*(network.vouched(own=True) for network in networks))

    def row(self, name: str) -> Row:
        """Return a row by its name."""
        return next(row for row in self.rows if row.name == name)

    def configure(self, unit: Unit) -> Config:
        """Return the configuration of a unit."""
        config = self.configs[unit.row.name]
        # Folds of further repeats, or of a file, may have higher numbers than --folds.
        folds = max(config.data.folds, unit.fold.number + 1)
        data = replace(config.data, folds=folds, fold=unit.fold.number, cache_dir=self.cache)
        return replace(config, data=data, training=replace(config.training, seed=unit.seed))

    def split(self, unit: Unit) -> Split:
        """Return the subjects of a unit, with the references that its row has."""
        return shared_out(self.configure(unit).data, unit.fold.split, self.data)

    def units(self) -> list[Unit]:
        """Return all units: every teacher, on all folds, before everything else."""
        # So that array jobs can wait for them, and a pool finds its first students ready early.
        teachers = {teacher for row in self.rows for teacher in row.teachers}
        order = {row.name: (self._generation(row), row.name not in teachers) for row in self.rows}
        return [
            Unit(row, fold, seed)
            for row in sorted(self.rows, key=lambda row: order[row.name])
            for seed in self.seeds[row.name]
            for fold in self.folds
        ]

    def teachers_of(self, unit: Unit) -> list[Unit]:
        """Return the units whose networks a unit imitates, on the same fold."""
        found = []
        for name in unit.row.teachers:
            seeds = self.seeds[name]
            # Without a twin of its own seed a student learns from the first: one that is given.
            seed = unit.seed if unit.seed in seeds else seeds[0]
            found.append(replace(unit, row=self.row(name), seed=seed))
        return found

    def with_teachers(self, units: Iterable[Unit]) -> list[Unit]:
        """Return units behind their teachers, and theirs, each once."""
        found: dict[str, Unit] = {}
        for unit in units:
            for one in (*self.with_teachers(self.teachers_of(unit)), unit):
                found.setdefault(one.name, one)
        return list(found.values())

    def find(self, wanted: str | int) -> Unit:
        """Return a unit by its name or number."""
        units = self.units()
        for number, unit in enumerate(units):
            if str(wanted) in {unit.name, str(number)}:
                return unit
        raise UserError(
            f"--unit: there is no unit {wanted!r}; there are 0 to {len(units) - 1}, from "
            f"{units[0].name} to {units[-1].name}. --show units lists them."
        )

    def folder(self, unit: Unit) -> UnitFolder:
        """Return the folder of a unit."""
        return self.files.unit(unit.name)

    def is_done(self, unit: Unit) -> bool:
        """Say whether a unit is trained and scored, with all subsets if that is wanted."""
        folder = self.folder(unit)
        # Scores are written last, so that they vouch for weights and predictions.
        wanted = self.subsets and unit.row.recipe == "missing_modality"
        return folder.scores.is_file() and (folder.subsets.is_file() or not wanted)

    def _generation(self, row: Row) -> int:
        taught = [1 + self._generation(self.row(name)) for name in row.teachers]
        return max(taught, default=0)


def make_plan(
    kind: Literal["train", "crossval", "study"],
    title: str,
    config: Config,
    rows: Sequence[Row],
    folds: Sequence[Fold],
    *,
    data: DataSet,
    seeds: Mapping[str, tuple[int, ...]] | None = None,
    subsets: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> Plan:
    """Resolve a run; nothing is written."""
    parts, given = with_part_teachers(rows, config), seeds or {}
    every = {row.name: given.get(row.name, (config.training.seed,)) for row in parts}
    whole = {row.name: row.teacher for row in rows}
    for row in parts:
        # Teachers that do without a part of the subjects have the seeds of the one that does not.
        for name in {*row.teachers} - {*given}:
            every[name] = every[str(whole[row.name])]
    configs = {row.name: row.configure(config) for row in parts}
    plan = Plan(
        kind, title, config, configs, parts, tuple(folds), every, data, subsets, facts or {}
    )
    for unit in plan.units():
        plan.split(unit)  # refuses more labelled subjects or parts than there are
    return plan


def deal(subjects: Sequence[Subject], config: Config, repeats: int = 1) -> list[Fold]:
    """Deal the subjects into folds, once or several times."""
    data = config.data
    return [
        Fold(
            number=repeat * data.folds + fold,
            repeat=repeat,
            split=split_subjects(
                subjects,
                folds=data.folds,
                fold=fold,
                validation_fraction=data.validation_fraction,
                seed=config.training.seed + repeat,
            ),
        )
        for repeat in range(repeats)
        for fold in range(data.folds)
    ]


def fold_of(subjects: Sequence[Subject], config: Config) -> Fold:
    """Return the fold that the configuration names, or that of its file."""
    data = config.data
    if data.split_file is None:
        return deal(subjects, config)[data.fold]
    folds = load_folds(data.split_file, subjects)
    if len(folds) > 1:
        raise UserError(
            f"--split-file: {data.split_file} holds {len(folds)} folds; expected one. "
            "crossval.py --protocol takes several."
        )
    return replace(folds[0], number=data.fold)


def load_folds(path: Path, subjects: Iterable[Subject], *, validation: bool = True) -> list[Fold]:
    """Read case lists and check them against each other and the data set."""
    subjects = list(subjects)
    folds = _read(path, patients_of(subjects))
    known = {subject.name for subject in subjects}
    needed = ("train", "validation", "test") if validation else ("train", "test")
    problems = [problem for fold in folds for problem in _problems(fold, needed)]
    listed = {name for fold in folds for name in fold.split.names}
    if missing := sorted(listed - known):
        counted = f"{len(missing)} of {len(listed)} subjects are not in the data set"
        problems.append(f"  {counted}: {_first(missing, 100)}")
    for one, other in itertools.combinations(folds, 2):
        # Within one repeat such a case would count twice.
        shared = sorted({*one.split.test} & {*other.split.test})
        if shared and one.repeat == other.repeat:
            problems.append(
                f"  folds {one.number} and {other.number}: their test sets overlap: "
                f'{_first(shared)}. Repeated splits carry different numbers under "repeat".'
            )
    if problems:
        raise UserError(f"{path}: these folds cannot be used:\n" + "\n".join(problems))
    return folds


def unused_text(folds: Iterable[Fold], subjects: Sequence[Subject]) -> str:
    """Say which subjects are in no fold; empty if all are in one."""
    used = (fold.split.names for fold in folds)
    unused = sorted({one.name for one in subjects}.difference(*used))
    counted = f"{len(unused)} of {len(subjects)} subjects are in no fold and are not used"
    return f"{counted}: {_first(unused)}" if unused else ""


def folds_content(folds: Iterable[Fold]) -> dict[str, Any]:
    """Return case lists in the form that `load_folds` reads."""
    return {"folds": [fold.to_dict() for fold in folds]}


def _read(path: Path, patients: Mapping[str, str]) -> list[Fold]:
    try:
        content = read_json(path)
        # The lists of a single fold may stand alone.
        folds = [
            Fold(
                int(lists.get("number", number)),
                int(lists.get("repeat", 0)),
                # Whose visits subjects are is read from their names anew.
                Split(
                    **{part: tuple(own) for part, own in lists.items() if part not in _BESIDE},
                    patients=patients,
                ),
            )
            for number, lists in enumerate(content.get("folds", [content]))
        ]
        # Whatever stands in the lists is looked for among the subjects.
        if not folds or not all({*map(type, fold.split.names)} <= {str} for fold in folds):
            raise ValueError("no folds, or no names in them")
    except (UnreadableError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f'{path} cannot be read ({error}): expected {{"train": [...], "validation": [...], '
            '"test": [...]}, lists of case names, and perhaps "unlabelled"; of several folds '
            '{"folds": [...]}, with a number from 0 as "repeat" where subjects are dealt anew; '
            'beside them perhaps "options".'
        ) from error
    return folds


def _problems(fold: Fold, needed: Sequence[str]) -> list[str]:
    split = fold.split
    found = {
        "no subjects for": [part for part in needed if not getattr(split, part)],
        "named more than once:": sorted(name for name, n in Counter(split.names).items() if n > 1),
    }
    told = [f"{what} {_first(which)}" for what, which in found.items() if which]
    return [
        f"  fold {fold.number}: {problem}" for problem in (*filter(None, [split.torn()]), *told)
    ]


def _first(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)
