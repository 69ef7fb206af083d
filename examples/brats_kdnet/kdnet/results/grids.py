"""Tables of a cross-validation: any number of networks, one column per region."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdnet.evaluation.scoring import Postprocessing, Score, Space
from kdnet.results.results import empties, interval_of, measured, metric_title, relation, verdict
from kdnet.results.tables import (
    POSTPROCESSING_NAMES,
    SPACE_NAMES,
    Gain,
    Metric,
    Moments,
    Summary,
    format_number,
    summarise,
)

Label = Callable[[str], str]


@dataclass(frozen=True)
class Cell:
    """One field of a table.

    Attributes:
        text: What stands out.
        notes: Smaller lines below it.
        verdict: "better", "worse" or "open"; decides the colour.
    """

    text: str
    notes: tuple[str, ...] = ()
    verdict: str = "open"


@dataclass(frozen=True)
class Grid:
    """A table as the page prints it.

    Attributes:
        title: Its heading.
        columns: Headings of the columns after the name of the row.
        rows: Name and fields.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Chapter:
    """The tables of one space, with or without post-processing.

    Attributes:
        title: Space and post-processing.
        space: "native" or "grid".
        grids: One per metric.
        empties: What the networks make of empty regions.
    """

    title: str
    space: Space
    grids: list[Grid]
    empties: Grid


def chapters(scores: Sequence[Score], label: Label) -> list[Chapter]:
    """All results of all networks."""
    found = {(score.space, score.postprocessing) for score in scores}
    spaces: tuple[Space, ...] = ("native", "grid")
    treatments: tuple[Postprocessing, ...] = ("off", "on")
    summaries = {treatment: summarise(scores, postprocessing=treatment) for treatment in treatments}
    return [
        _chapter([row for row in summaries[treatment] if row.space == space], label)
        for space in spaces
        for treatment in treatments
        if (space, treatment) in found
    ]


def gain_grid(
    gains: Sequence[Gain], metric: Metric, title: str, label: Label, space: Space = "native"
) -> Grid:
    """Gains of every network over the one it is compared with."""
    chosen = [gain for gain in gains if (gain.metric, gain.space) == (metric, space)]
    regions = list(dict.fromkeys(gain.region for gain in chosen))
    places = {(gain.role, gain.region): gain for gain in chosen}
    digits = 1 if metric == "hd95" else 3
    rows = []
    for role, against in dict.fromkeys((gain.role, gain.against) for gain in chosen):
        cells = [_gained(places.get((role, region)), digits) for region in regions]
        rows.append((f"{label(role)} \N{MINUS SIGN} {label(against)}", cells))
    return Grid(title, regions, rows)


def _chapter(rows: Sequence[Summary], label: Label) -> Chapter:
    first = rows[0]
    treated = POSTPROCESSING_NAMES[first.postprocessing]
    return Chapter(
        title=f"{SPACE_NAMES[first.space]}, {treated}",
        space=first.space,
        grids=[_grid(rows, metric, label) for metric in measured(rows)],
        empties=_empty_grid(rows, label),
    )


def _grid(rows: Sequence[Summary], metric: Metric, label: Label) -> Grid:
    regions = list(dict.fromkeys(row.region for row in rows))
    names = list(dict.fromkeys((row.role, row.modalities) for row in rows))
    places = {(row.role, row.modalities, row.region): row for row in rows}
    # What a network saw is said where its name alone does not tell the rows apart.
    roles = [role for role, _ in names]
    lines = []
    for role, seen in names:
        name = f"{label(role)} ({seen})" if roles.count(role) > 1 and seen else label(role)
        found = [places.get((role, seen, region)) for region in regions]
        lines.append((name, [_cell(getattr(row, metric, None), metric) for row in found]))
    return Grid(metric_title(metric, rows), regions, lines)


def _empty_grid(rows: Sequence[Summary], label: Label) -> Grid:
    lines = empties(rows)
    columns = [f"{region}: reference empty in {count}" for region, count, _ in lines]
    roles = dict.fromkeys(row.role for row in rows)
    dash = format_number(float("nan"))
    return Grid(
        "Empty regions",
        columns,
        [(label(role), [Cell(words.get(role, dash)) for _, _, words in lines]) for role in roles],
    )


def _cell(moments: Moments | None, metric: Metric) -> Cell:
    if moments is None or not moments.n:
        return Cell(format_number(float("nan")))
    digits = 1 if metric == "hd95" else 3
    mean, sd, median, low, high = (
        format_number(value, digits)
        for value in (
            moments.mean,
            moments.sd,
            moments.median,
            moments.lower_quartile,
            moments.upper_quartile,
        )
    )
    folds, seeds = format_number(moments.folds_sd, digits), format_number(moments.seeds_sd, digits)
    interval = moments.interval
    ends = " to ".join(format_number(end, digits) for end in (interval.lower, interval.upper))
    notes = (
        f"median {median} ({low} to {high})",
        f"{interval.level:.0%} interval {ends}" if interval.reason is None else interval.reason,
        f"sd of folds {folds}, of seeds {seeds}; n {moments.n}",
    )
    return Cell(f"{mean} ± {sd}", notes)


def _gained(gain: Gain | None, digits: int) -> Cell:
    if gain is None:
        return Cell(format_number(float("nan")))
    interval = gain.interval.reason or interval_of(gain, digits)
    # Too few cases have no interval and no test for the same reason, which is given once.
    tested = gain.test.reason or (
        f"p {relation(gain.test.p_value)}, Holm p {relation(gain.p_holm)}; n {gain.n}"
    )
    text = format_number(gain.mean, digits, signed=True)
    return Cell(text, tuple(dict.fromkeys((interval, tested))), verdict(gain))
