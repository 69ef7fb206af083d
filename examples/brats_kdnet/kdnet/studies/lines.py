"""Which comparisons of a study make a line of a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kdnet.studies.gains import Comparison


@dataclass(frozen=True)
class Point:
    """A mean gain with its interval.

    Attributes:
        x: Subjects, or the share of them in per cent.
        comparison: Where the gain is.
        note: Written beside the point.
    """

    x: float
    comparison: Comparison
    note: str = ""

    @property
    def band(self) -> tuple[float, float, float]:
        """Lower end, mean, upper end; the mean three times where there is no interval."""
        mean, interval = self.comparison.cells.mean, self.comparison.interval
        if math.isnan(interval.lower):
            return mean, mean, mean
        return interval.lower, mean, interval.upper


@dataclass(frozen=True)
class Line:
    """Points of one kind.

    Attributes:
        kind: Decides the colour.
        what: What its points share, added to the name of the kind.
        dashed: Whether to tell it from another line of its kind.
        points: From left to right.
    """

    kind: str
    what: str
    dashed: bool
    points: list[Point]

    @property
    def seeds(self) -> list[int]:
        """Number of seeds behind each point."""
        return [len(point.comparison.cells.seeds) for point in self.points]


def by_labelled(comparisons: Sequence[Comparison]) -> list[Line]:
    """Arrange gains against labelled subjects."""
    lines: list[Line] = []
    for kind in dict.fromkeys(one.network.kind for one in comparisons):
        own = [one for one in comparisons if one.network.kind == kind]
        plain = [one for one in own if not one.network.subjects[1]]
        helped = [one for one in own if one.network.subjects[1]]
        total = max((sum(one.network.subjects) for one in helped), default=0.0)
        full = [one for one in own if sum(one.network.subjects) == total]
        if full:
            lines.append(Line(kind, "all others unlabelled", False, _points_by_labelled(full)))
        if any(one not in full for one in plain):
            lines.append(Line(kind, "labelled alone", bool(full), _points_by_labelled(plain)))
    return lines


def by_unlabelled(comparisons: Sequence[Comparison]) -> list[Line]:
    """Arrange gains against the share of training subjects that are unlabelled."""
    lines: list[Line] = []
    groups = dict.fromkeys((one.network.kind, one.network.labelled) for one in comparisons)
    for kind, labelled in groups:
        own = [
            one
            for one in comparisons
            if (one.network.kind, one.network.labelled) == (kind, labelled)
        ]
        if any(one.network.subjects[1] for one in own):
            points = sorted(map(_point_by_share, own), key=lambda point: point.x)
            several = sum(other == kind for other, _ in groups) > 1
            first = all(line.kind != kind for line in lines)
            what = own[0].network.setting.split(" + ")[0]
            lines.append(Line(kind, what, several and not first, points))
    return lines


def _points_by_labelled(comparisons: Sequence[Comparison]) -> list[Point]:
    ordered = sorted(comparisons, key=lambda one: one.network.subjects)
    return [Point(one.network.subjects[0], one) for one in ordered]


def _point_by_share(comparison: Comparison) -> Point:
    labelled, unlabelled = comparison.network.subjects
    return Point(100 * unlabelled / (labelled + unlabelled), comparison, f"{unlabelled:g}")
