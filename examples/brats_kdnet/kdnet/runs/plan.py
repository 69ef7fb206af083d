"""What a cross-validation consists of: rows, folds, seeds, and the units they make."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from kdnet.config import Config
from kdnet.runs.folds import Fold
from kdnet.errors import UserError
from kdnet.rows import Row
from kdnet.runs.run_folder import RunFolder


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
        lesions: Score single lesions too, into lesions.csv; needs panoptica and the label maps.
        jobs: Units trained at a time: a number, or "auto": one for each GPU; on a CPU one for
            every processor, up to 4, each with its share of threads.
        unit: Train this unit alone, by its name (fold0-seed0/kdnet) or number, and stop; for
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


@dataclass(frozen=True)
class Unit:
    """One row on one fold with one seed: what a process trains and scores.

    Attributes:
        fold: Which subjects.
        seed: Of weights and order.
        row: Which network.
    """

    fold: Fold
    seed: int
    row: Row

    @property
    def place(self) -> str:
        """Folder of its fold and seed."""
        return f"fold{self.fold.number}-seed{self.seed}"

    @property
    def name(self) -> str:
        """Folder and row, such as fold0-seed0/kdnet."""
        return f"{self.place}/{self.row.name}"


@dataclass(frozen=True)
class Plan:
    """A cross-validation, resolved.

    Attributes:
        config: What the rows share.
        rows: Teachers before their students.
        folds: Case lists.
        seeds: Of weights and order.
        subsets: Whether networks for any subset are scored on all of them.
        own_seeds: Seeds of rows that have others than `seeds`.
    """

    config: Config
    rows: tuple[Row, ...]
    folds: tuple[Fold, ...]
    seeds: tuple[int, ...]
    subsets: bool = True
    own_seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    _by_name: Mapping[str, Row] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {row.name: row for row in self.rows})

    @property
    def root(self) -> Path:
        """Folder of the cross-validation."""
        if self.config.run.out is None:
            raise ValueError("A plan needs a resolved configuration, with a run folder.")
        return self.config.run.out

    @property
    def cache(self) -> Path:
        """Where all units find preprocessed subjects and what teachers said."""
        return self.config.data.cache_dir or self.root / "cache"

    @property
    def trusted(self) -> frozenset[str]:
        """Networks that its rows name, so that its own model files may be built again."""
        networks = [row.configure(self.config).network for row in self.rows]
        return frozenset().union(*(network.vouched(own=True) for network in networks))

    def units(self) -> list[Unit]:
        """Return all units: every teacher, on all folds, before everything else."""
        teachers = {teacher for row in self.rows for teacher in row.teachers}
        order = {row.name: (self._generation(row), row.name not in teachers) for row in self.rows}
        return [
            Unit(fold, seed, row)
            for row in sorted(self.rows, key=lambda row: order[row.name])
            for seed in self.seeds_of(row.name)
            for fold in self.folds
        ]

    def seeds_of(self, row: str) -> tuple[int, ...]:
        """Return the seeds that a row is trained with."""
        # Teachers that do without a part of the subjects have the seeds of the one that does not.
        whole = row.partition("-without-")[0]
        return self.own_seeds.get(row, self.own_seeds.get(whole, self.seeds))

    def teachers_of(self, unit: Unit) -> list[Unit]:
        """Return the units whose networks a unit imitates, on the same fold."""
        found = []
        for name in unit.row.teachers:
            seeds = self.seeds_of(name)
            seed = unit.seed if unit.seed in seeds else seeds[0]
            found.append(replace(unit, row=self._by_name[name], seed=seed))
        return found

    def find(self, wanted: str | int) -> Unit:
        """Return a unit by its name or number."""
        units = self.units()
        by_name = {unit.name: unit for unit in units}
        numbered = {str(number): unit for number, unit in enumerate(units)}
        found = by_name.get(str(wanted)) or numbered.get(str(wanted))
        if found is None:
            raise UserError(
                f"--unit: there is no unit {wanted!r}; there are 0 to {len(units) - 1}, from "
                f"{units[0].name} to {units[-1].name}. --show units lists them."
            )
        return found

    def folder(self, unit: Unit) -> RunFolder:
        """Return the run folder of a unit, in which its row is one part."""
        return RunFolder(self.root / unit.place, part=unit.row.name)

    def configure(self, unit: Unit) -> Config:
        """Return the configuration of a unit's fold and seed, without the options of its row."""
        data = replace(
            self.config.data,
            folds=max(2, len(self.folds)),
            fold=unit.fold.number,
            cache_dir=self.cache,
        )
        return replace(
            self.config,
            data=data,
            training=replace(self.config.training, seed=unit.seed),
            run=replace(self.config.run, out=self.root / unit.place),
        )

    def is_done(self, unit: Unit) -> bool:
        """Say whether a unit is trained and scored, with all subsets if that is wanted."""
        run = self.folder(unit)
        wanted = self.subsets and unit.row.recipe == "missing_modality"
        return run.part_scores.is_file() and (run.subsets.is_file() or not wanted)

    def _generation(self, row: Row) -> int:
        taught = [1 + self._generation(self._by_name[name]) for name in row.teachers]
        return max(taught, default=0)
