"""Every network of a study: its Dice, and its paired gain over the reference."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from kdnet.errors import UserError
from kdnet.results.significance import Interval, PairedTest, holm, paired_wilcoxon
from kdnet.studies.cells import RESAMPLES, Cells, Unit, mean_interval
from kdnet.studies.facts import TEACHER, Facts
from kdnet.studies.rows import SPACES, Study, StudyRow

Found = dict[tuple[str, Unit], float]
Labels = Literal["same", "most"]


@dataclass(frozen=True)
class Network:
    """A row of the study.

    Attributes:
        row: Full name.
        kind: "teacher", the reference, or a recipe's name.
        labelled: Fewest and most labelled subjects over the folds, which may differ by one.
        unlabelled: Fewest and most unlabelled subjects.
        steps: Mean number of optimizer steps over units.
    """

    row: str
    kind: str
    labelled: tuple[int, int]
    unlabelled: tuple[int, int]
    steps: float

    @property
    def setting(self) -> str:
        """What it was trained on, in words."""
        labelled = f"{_span(self.labelled)} labelled"
        return labelled + (f" + {_span(self.unlabelled)} unlabelled" if self.unlabelled[1] else "")

    @property
    def subjects(self) -> tuple[float, float]:
        """Labelled and unlabelled subjects, mean of fewest and most."""
        return sum(self.labelled) / 2, sum(self.unlabelled) / 2


@dataclass(frozen=True)
class NetworkDice:
    """Dice of a network in one region.

    Attributes:
        network: Which.
        region: Where.
        cells: Dice per case and unit; their mean pools folds and seeds, a case counting once.
        interval: Of the mean, over cases and seeds.
    """

    network: Network
    region: str
    cells: Cells
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """A network against the reference, in one region.

    Attributes:
        network: Which.
        region: Where.
        cells: Gain per case and unit.
        interval: Of the mean gain, over cases and seeds.
        test: Wilcoxon's signed-rank test on the cases' means.
        corrected: Its p value after Holm's correction over all comparisons of the list.
        steps: Optimizer steps relative to the reference's.
    """

    network: Network
    region: str
    cells: Cells
    interval: Interval
    test: PairedTest
    corrected: float
    steps: float

    @property
    def wins(self) -> int:
        """Cases that gain in the mean over seeds."""
        return int((self.cells.case_means > 0).sum())

    @property
    def losses(self) -> int:
        """Cases that lose."""
        return int((self.cells.case_means < 0).sum())

    @property
    def improved(self) -> float:
        """Share of the cases that gain; NaN without cases."""
        return self.wins / len(self.cells.cases) if self.cells.cases else math.nan


@dataclass(frozen=True)
class Pairing:
    """The Dice of one space, ready to be paired.

    Args:
        study: Rows in any order.
        space: "native" or "grid".
        seed: Of the bootstrap.
        resamples: Number of bootstrap samples.
    """

    study: Study
    space: str
    seed: int = 0
    resamples: int = RESAMPLES
    _dice: dict[tuple[str, str], Found] = field(init=False, repr=False, compare=False)
    _units: dict[tuple[str, Unit], StudyRow] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        dice: dict[tuple[str, str], Found] = {}
        units: dict[tuple[str, Unit], StudyRow] = {}
        for row in self.study.rows:
            if row.space == self.space:
                dice.setdefault((row.row, row.region), {})[row.case, row.unit] = row.dice
                units[row.row, row.unit] = row
        object.__setattr__(self, "_dice", dice)
        object.__setattr__(self, "_units", units)

    @property
    def facts(self) -> Facts:
        """What the study is about."""
        return self.study.facts

    @cached_property
    def networks(self) -> list[Network]:
        """All networks: by labelled and unlabelled subjects, then by kind."""
        names = dict.fromkeys(row for row, _ in self._units)
        found = [self._network(name) for name in names]

        def order(network: Network) -> tuple[object, ...]:
            kind = self.facts.rank(network.kind)
            return network.labelled, network.unlabelled, kind, network.row

        return sorted(found, key=order)

    @cached_property
    def regions(self) -> list[str]:
        """Names of the regions, sorted."""
        return sorted({region for _, region in self._dice})

    @property
    def students(self) -> list[Network]:
        """Networks that are neither teacher nor reference."""
        return [network for network in self.networks if self.facts.is_student(network.kind)]

    def is_chosen(self, network: Network) -> bool:
        """Say whether a network is the chosen recipe of its setting."""
        return self.facts.is_chosen(network.row, network.kind)

    def dice(self) -> list[NetworkDice]:
        """Dice of all networks and regions that have values."""
        result = []
        for network in self.networks:
            for region in self.regions:
                cells = Cells.of(self._dice.get((network.row, region), {}))
                if cells.cases:
                    interval = mean_interval(cells, self.seed, resamples=self.resamples)
                    result.append(NetworkDice(network, region, cells, interval))
        return result

    def compare(self, labels: Labels = "same") -> list[Comparison]:
        """Compare every student with the reference of the same fold, seed, case and region."""
        found = []
        for network in self.students:
            for region in self.regions:
                gains, steps = self._gains(network, region, labels)
                cells = Cells.of(gains)
                if cells.cases:
                    found.append(self._comparison(network, region, cells, steps))
        corrected = holm([one.test.p_value for one in found])
        return [replace(one, corrected=p) for one, p in zip(found, corrected, strict=True)]

    def missing(self) -> list[str]:
        """Name what has no partner, a unit in a sentence each; NaN too."""
        sentences: list[str] = []
        for network in self.students:
            units = sorted(unit for row, unit in self._units if row == network.row)
            for unit in units:
                sentences += self._unpaired(network.row, unit)
        return sentences

    def lead(self, comparison: Comparison, *, other_seeds: bool = False) -> Found:
        """The teacher's lead in the cells of a comparison: its Dice minus the reference's."""
        found: Found = {}
        for case, unit in comparison.cells.found():
            labelled = self._units[comparison.network.row, unit].labelled
            teacher = self._over_seeds(TEACHER, labelled, comparison.region, case, unit[0])
            reference = self._over_seeds(
                self.facts.reference, labelled, comparison.region, case, unit[0]
            )
            if other_seeds:
                reference.pop(unit[1], None)
            if teacher and reference:
                found[case, unit] = _mean(teacher) - _mean(reference)
        return found

    @cached_property
    def _kinds(self) -> dict[str, dict[tuple[int, Unit], str]]:
        """Kind to labelled subjects and unit to row, for the reference and teachers."""
        found: dict[str, dict[tuple[int, Unit], str]] = {}
        for (name, unit), row in sorted(self._units.items()):
            if not self.facts.is_student(row.kind):
                first = found.setdefault(row.kind, {}).setdefault((row.labelled, unit), name)
                if first != name:
                    raise UserError(
                        f"Study '{self.facts.name}': {first} and {name} are both of the kind "
                        f"{row.kind} with {row.labelled} labelled subjects, fold {unit[0]}, seed "
                        f"{unit[1]}; expected one. Give one of them another kind."
                    )
        return found

    def _network(self, name: str) -> Network:
        rows = [row for (row_name, _), row in self._units.items() if row_name == name]
        labelled = sorted(row.labelled for row in rows)
        unlabelled = sorted(row.unlabelled for row in rows)
        return Network(
            row=name,
            kind=rows[0].kind,
            labelled=(labelled[0], labelled[-1]),
            unlabelled=(unlabelled[0], unlabelled[-1]),
            steps=sum(row.steps for row in rows) / len(rows),
        )

    def _comparison(
        self, network: Network, region: str, cells: Cells, steps: Sequence[float]
    ) -> Comparison:
        return Comparison(
            network=network,
            region=region,
            cells=cells,
            interval=mean_interval(cells, self.seed, resamples=self.resamples),
            test=paired_wilcoxon(cells.case_means.tolist()),
            corrected=math.nan,
            steps=sum(steps) / len(steps) if steps else math.nan,
        )

    def _gains(self, network: Network, region: str, labels: Labels) -> tuple[Found, list[float]]:
        """Gain per case and unit, and the ratio of steps per unit."""
        gains: Found = {}
        ratios: dict[Unit, float] = {}
        for (case, unit), dice in self._dice.get((network.row, region), {}).items():
            partner = self._partner(network.row, unit, labels)
            before = self._dice.get((partner, region), {}).get((case, unit), math.nan)
            if not math.isnan(dice - before):
                gains[case, unit] = dice - before
                steps = self._units[partner, unit].steps
                ratios[unit] = self._units[network.row, unit].steps / steps if steps else math.nan
        return gains, [ratios[unit] for unit in sorted(ratios)]

    def _partner(self, row: str, unit: Unit, labels: Labels = "same") -> str:
        """Row of the reference that a unit pairs with; empty if there is none."""
        references = self._kinds.get(self.facts.reference, {})
        labelled = self._units[row, unit].labelled
        if labels == "same":
            return references.get((labelled, unit), "")
        most = max((count for count, other in references if other == unit), default=labelled)
        return references.get((most, unit), "") if most > labelled else ""

    def _over_seeds(
        self, kind: str, labelled: int, region: str, case: str, fold: int
    ) -> dict[int, float]:
        """Seed to Dice of a case, by the networks of one kind and fold."""
        found = {
            unit[1]: self._dice.get((row, region), {}).get((case, unit), math.nan)
            for (count, unit), row in self._kinds.get(kind, {}).items()
            if (count, unit[0]) == (labelled, fold)
        }
        return {seed: dice for seed, dice in found.items() if not math.isnan(dice)}

    def _unpaired(self, row: str, unit: Unit) -> Iterator[str]:
        where = f"{row}, fold {unit[0]}, seed {unit[1]}"
        partner = self._partner(row, unit)
        if not partner:
            labelled = self._units[row, unit].labelled
            yield (
                f"{where}: no {self.facts.reference} with {labelled} labelled subjects of this "
                "fold and seed; the unit has no pairs."
            )
            return
        own, other = self._places(row, unit), self._places(partner, unit)
        for name, missing in ((partner, own - other), (row, other - own)):
            if missing:
                yield f"{where}: {name} has no Dice of {_counted(missing)}."

    def _places(self, row: str, unit: Unit) -> set[tuple[str, str]]:
        """Case and region of the values of a unit."""
        return {
            (case, region)
            for region in self.regions
            for (case, other), dice in self._dice.get((row, region), {}).items()
            if other == unit and not math.isnan(dice)
        }


def spaces(study: Study) -> list[str]:
    """Return the spaces in which Dice were measured, native first."""
    found = {row.space for row in study.rows}
    return [space for space in SPACES if space in found]


def _span(ends: tuple[int, int]) -> str:
    low, high = ends
    return str(low) if low == high else f"{low} to {high}"


def _mean(values: Mapping[int, float]) -> float:
    return sum(values[key] for key in sorted(values)) / len(values)


def _counted(places: set[tuple[str, str]]) -> str:
    """How many cases of each region, with an example."""
    regions = Counter(region for _, region in places)
    case, _ = min(places)
    counts = ", ".join(f"{count} in {region}" for region, count in sorted(regions.items()))
    return f"{counts}, such as {case}"
