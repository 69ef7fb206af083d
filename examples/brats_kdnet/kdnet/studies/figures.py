"""The figures of a study, in the look of the charts of a run."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from kdnet.files import atomic
from kdnet.results.tables import format_number
from kdnet.studies.analysis import Analysis
from kdnet.studies.gains import Comparison, Network, NetworkDice
from kdnet.studies.lead import LeadAndGain
from kdnet.studies.lines import Line, Point, by_labelled, by_unlabelled

# The colours of the report's page, on its white panel.
_INK, _SOFT, _RULE = "#1d2327", "#5d676e", "#dcdfdb"
_TEACHER, _REFERENCE = "#6d4bc3", "#a85a08"
_COLOURS = ("#0b756c", "#1769aa", "#c2410c", "#8c6d1f", "#b0307a", "#5d676e", "#3f7d20", "#7a4b2a")
_GAIN = "gain in Dice"
_MARKERS = "osD^vPX<"

# Text of 10 points on 5.2 inches is still 10 pixels high on a page of 400 pixels.
_WIDTH = 5.2
_DPI = 200
_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "study", "font.size": 10}


@dataclass(frozen=True)
class Picture:
    """A figure and its words.

    Attributes:
        name: Of its files, without the ending.
        title: Above it.
        caption: Says what is seen, also to those who do not see it.
        figure: What is drawn.
    """

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Missing:
    """A figure that cannot be drawn.

    Attributes:
        name: As in `Picture`.
        reason: A sentence.
    """

    name: str
    reason: str


def draw_all(analysis: Analysis) -> list[Picture | Missing]:
    """Draw all figures of a study."""
    draws = (headline, all_dice, gain_by_labelled, gain_by_unlabelled, gain_by_lead)
    return [draw(analysis) for draw in draws]


def save(picture: Picture, folder: Path) -> list[Path]:
    """Write a figure as PNG and SVG; the same figure gives the same bytes."""
    paths = []
    for ending, metadata in (
        ("png", {"Software": None}),
        ("svg", {"Date": None, "Creator": None, "Title": picture.title}),
    ):
        buffer = io.BytesIO()
        with mpl.rc_context(_SETTINGS):
            picture.figure.savefig(buffer, format=ending, dpi=_DPI, metadata=metadata)
        path = folder / f"{picture.name}.{ending}"
        with atomic(path) as partial:
            partial.write_bytes(
                _with_fonts(buffer.getvalue()) if ending == "svg" else buffer.getvalue()
            )
        paths.append(path)
    return paths


def headline(analysis: Analysis) -> Picture | Missing:
    """Dice of reference, chosen recipe and teacher with fewest and with most labels."""
    networks = _ends(analysis)
    if not networks:
        return Missing("headline", "no row of the chosen recipe is stored.")
    dice = [one for one in analysis.dice if one.network in networks]
    title = f"{_title(analysis)}: Dice with few labels and with all"
    return _dots(analysis, "headline", title, dice)


def all_dice(analysis: Analysis) -> Picture | Missing:
    """Dice of all networks."""
    return _dots(analysis, "dice", f"{_title(analysis)}: Dice of all networks", analysis.dice)


def gain_by_labelled(analysis: Analysis) -> Picture | Missing:
    """Gain against labelled subjects, a line per kind."""
    name = "gain-by-labelled"
    if not analysis.gains:
        return Missing(name, f"no student has pairs with the {analysis.facts.reference}.")
    ticks = sorted({one.network.subjects[0] for one in analysis.gains})
    lines = {region: by_labelled(_of(analysis.gains, region)) for region in _regions(analysis)}

    def draw(axes: Any, region: str) -> None:
        _draw_lines(axes, analysis, lines[region], ticks)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel("labelled training subjects", color=_INK)

    title = f"{_title(analysis)}: gain over the {_reference(analysis)} against labelled subjects"
    figure = _panels(analysis, title, draw, _GAIN)
    caption = _gain_caption(analysis, "number of labelled subjects", lines)
    return Picture(name, title, caption, figure)


def gain_by_unlabelled(analysis: Analysis) -> Picture | Missing:
    """Gain against the share of training subjects without a reference."""
    name = "gain-by-unlabelled"
    if not any(one.network.subjects[1] for one in analysis.gains):
        return Missing(name, "no student with pairs had unlabelled subjects.")
    lines = {region: by_unlabelled(_of(analysis.gains, region)) for region in _regions(analysis)}
    ticks = sorted({point.x for own in lines.values() for line in own for point in line.points})

    def draw(axes: Any, region: str) -> None:
        _draw_lines(axes, analysis, lines[region], [0.0, *ticks])
        axes.set_xlabel("unlabelled share of the training subjects, %", color=_INK)

    title = f"{_title(analysis)}: gain over the {_reference(analysis)} against unlabelled subjects"
    figure = _panels(analysis, title, draw, _GAIN)
    against = "share of unlabelled subjects, whose number is below the point"
    return Picture(name, title, _gain_caption(analysis, against, lines), figure)


def gain_by_lead(analysis: Analysis) -> Picture | Missing:
    """Gain of each case against the teacher's lead there."""
    name = "gain-by-lead"
    if not analysis.shown:
        return Missing(name, "no student has both a teacher and pairs with the reference.")

    def draw(axes: Any, region: str) -> None:
        shown = [one for one in analysis.shown if one.comparison.region == region]
        for index, one in enumerate(shown):
            _draw_lead(axes, analysis, one, _COLOURS[index % 8], _MARKERS[index % 8])
        _draw_whole_lead(axes)
        axes.set_xlabel("lead of the teacher in Dice", color=_INK)

    title = f"{_title(analysis)}: gain over the {_reference(analysis)} against the teacher's lead"
    caption = (
        "One small mark per held-out case (mean over seeds), large ones per fold and seed; the "
        "line is the least-squares slope, with its 95 % interval over cases and seeds. On the "
        "dotted line a student gains the whole lead. Lead and gain share the "
        f"{_reference(analysis)}, whose luck alone lets the points rise."
    )
    figure = _panels(analysis, title, draw, _GAIN, height=3.6)
    return Picture(name, title, caption, figure)


def _ends(analysis: Analysis) -> set[Network]:
    """With fewest and with most labels: reference, teacher, chosen recipe with all subjects."""
    networks = analysis.pairing.networks
    chosen = [network for network in networks if analysis.pairing.is_chosen(network)]
    found: set[Network] = set()
    for labelled in {network.labelled for network in (*chosen[:1], *chosen[-1:])}:
        own = [network for network in chosen if network.labelled == labelled]
        found.add(max(own, key=lambda network: network.unlabelled))
        found |= {
            network
            for network in networks
            if network.labelled == labelled and not analysis.facts.is_student(network.kind)
        }
    return found


def _dots(
    analysis: Analysis, name: str, title: str, dice: Sequence[NetworkDice]
) -> Picture | Missing:
    networks = list(dict.fromkeys(one.network for one in dice))
    groups = {network.setting for network in networks}

    def draw(axes: Any, region: str) -> None:
        places = _places(networks)
        for one in dice:
            if one.region == region:
                _draw_dot(axes, analysis, one, places[one.network])
        names = [textwrap.fill(_plain(analysis.name(network)), 26) for network in places]
        axes.set_yticks(list(places.values()), names)
        _draw_groups(axes, places)
        axes.set_ylim(max(places.values()) + 0.6, -0.3)
        # Room for the number beside the last interval.
        left, right = axes.get_xlim()
        axes.set_xlim(left, right + 0.1 * (right - left))
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color=_RULE, linewidth=0.6)

    height = 0.6 + 0.25 * (len(networks) + 0.7 * len(groups))
    caption = (
        "Mean Dice of the held-out cases, all folds and seeds pooled, with its 95 % bootstrap "
        "interval over cases and seeds. Intervals of two networks may overlap although the paired "
        "gain is certain."
    )
    return Picture(
        name, title, caption, _panels(analysis, title, draw, "", height=height, x="Dice")
    )


def _places(networks: Sequence[Network]) -> dict[Network, float]:
    """Height of every network; a line is left free above each setting."""
    places: dict[Network, float] = {}
    height, previous = -0.7, ""
    for network in networks:
        height += 1.0 if network.setting == previous else 1.7
        places[network] = height
        previous = network.setting
    return places


def _draw_dot(axes: Any, analysis: Analysis, one: NetworkDice, height: float) -> None:
    colour, marker = _style(analysis, one.network.kind)
    mean, interval = one.cells.mean, one.interval
    axes.plot([interval.lower, interval.upper], [height] * 2, color=colour, linewidth=2.2)
    axes.plot([mean], [height], marker, color=colour, markersize=7, markeredgecolor="white")
    end = mean if interval.reason else interval.upper
    axes.annotate(
        format_number(mean),
        (end, height),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=_INK,
    )


def _draw_groups(axes: Any, places: dict[Network, float]) -> None:
    """Write every setting above its networks."""
    first: dict[str, float] = {}
    for network, height in places.items():
        first.setdefault(network.setting, height)
    for setting, height in first.items():
        axes.annotate(
            setting,
            (0, height - 0.8),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            color=_INK,
            fontweight="bold",
        )


def _draw_lines(axes: Any, analysis: Analysis, lines: Sequence[Line], ticks: list[float]) -> None:
    span = max(ticks) - min(ticks) or 1.0
    for index, line in enumerate(lines):
        colour, marker = _style(analysis, line.kind)
        # Intervals of several kinds at one number of subjects would hide each other.
        shift = 0.012 * span * (index - (len(lines) - 1) / 2)
        x = [point.x + shift for point in line.points]
        lower, mean, upper = zip(*(point.band for point in line.points), strict=True)
        axes.fill_between(x, lower, upper, color=colour, alpha=0.1, linewidth=0)
        axes.vlines(x, lower, upper, color=colour, linewidth=1.2)
        axes.plot(
            x,
            mean,
            color=colour,
            marker=marker,
            markersize=6,
            markeredgecolor="white",
            linestyle=(0, (4, 2)) if line.dashed else "-",
            label=_plain(_line_name(analysis, line)),
        )
    _draw_notes(axes, [point for line in lines for point in line.points])
    axes.axhline(0, color=_INK, linewidth=0.8)
    axes.set_xlim(min(ticks) - 0.12 * span, max(ticks) + 0.12 * span)


def _draw_notes(axes: Any, points: Sequence[Point]) -> None:
    """Write what is noted once for each place, below all intervals there."""
    lowest: dict[tuple[float, str], float] = {}
    for point in points:
        place = point.x, point.note
        lowest[place] = min(point.band[0], lowest.get(place, math.inf))
    for (x, note), height in lowest.items():
        axes.annotate(
            note,
            (x, height),
            xytext=(0, -3),
            textcoords="offset points",
            ha="center",
            va="top",
            color=_SOFT,
            fontsize=9,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
        )


def _draw_lead(axes: Any, analysis: Analysis, one: LeadAndGain, colour: str, marker: str) -> None:
    x, y = one.lead.case_means, one.gain.case_means
    axes.plot(x, y, marker, color=colour, markersize=4, alpha=0.45, markeredgewidth=0)
    units = one.gain.unit_means
    leads = one.lead.unit_means
    axes.plot(
        [leads[unit] for unit in units],
        list(units.values()),
        marker,
        color=colour,
        markersize=7,
        markeredgecolor="white",
        linestyle="",
    )
    setting = one.comparison.network.setting
    several = len({other.comparison.network.kind for other in analysis.shown}) > 1
    what = f"{analysis.name(one.comparison.network)}, {setting}" if several else setting
    if len(_regions(analysis)) > 1:
        what = f"{one.comparison.region}, {what}"
    slope, interval = one.slope.value, one.slope.interval
    ends = np.array([x.min(), x.max()])
    label = f"{what}: slope {format_number(slope, 2)}"
    if interval.reason is None:
        label += f" ({format_number(interval.lower, 2)} to {format_number(interval.upper, 2)})"
    # Without a slope the line has no values, but its name stays in the legend.
    heights = one.gain.mean + slope * (ends - one.lead.mean)
    axes.plot(
        ends, heights, color=colour, linewidth=2, marker=marker, markevery=[], label=_plain(label)
    )


def _draw_whole_lead(axes: Any) -> None:
    axes.axhline(0, color=_INK, linewidth=0.8)
    axes.axvline(0, color=_RULE, linewidth=0.8)
    axes.axline((0, 0), slope=1, color=_SOFT, linewidth=0.9, linestyle=(0, (1, 2)))


def _panels(
    analysis: Analysis,
    title: str,
    draw: Callable[[Any, str], None],
    label: str,
    *,
    height: float = 3.0,
    x: str = "",
) -> Figure:
    """One panel per region below each other, and one legend for all."""
    regions = _regions(analysis)
    with mpl.rc_context(_SETTINGS):
        figure = Figure(layout="constrained")
        panels = figure.subplots(len(regions), 1, squeeze=False)[:, 0].tolist()
        for axes, region in zip(panels, regions, strict=True):
            _plain_axes(axes)
            if len(regions) > 1:
                axes.set_title(_plain(region), loc="left", color=_INK, fontsize=10)
            axes.set_ylabel(label, color=_INK)
            draw(axes, region)
            if x:
                axes.set_xlabel(x, color=_INK)
        lines = _legend(figure, panels)
        figure.set_size_inches(_WIDTH, 0.5 + height * len(regions) + 0.2 * lines)
        wrapped = textwrap.fill(_plain(title), 58)
        figure.suptitle(wrapped, x=0.01, ha="left", color=_INK, fontsize=11)
    return figure


def _legend(figure: Figure, panels: Sequence[Any]) -> int:
    """Name everything that is drawn, once; the number of names."""
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        figure.legend(
            list(found.values()),
            list(found),
            loc="outside lower left",
            frameon=False,
            labelcolor=_INK,
            fontsize=9.5,
        )
    return len(found)


def _plain_axes(axes: Any) -> None:
    axes.tick_params(length=0, colors=_INK)
    axes.grid(visible=True, axis="y", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_RULE)


def _style(analysis: Analysis, kind: str) -> tuple[str, str]:
    """Colour and mark of a kind; the chosen recipe has those of a run's student."""
    if kind == analysis.facts.reference:
        return _REFERENCE, "o"
    if not analysis.facts.is_student(kind):
        return _TEACHER, "o"
    chosen = {one.kind for one in analysis.pairing.students if analysis.pairing.is_chosen(one)}
    others = {one.kind for one in analysis.pairing.students} - chosen
    rank = analysis.facts.rank
    order = [*sorted(chosen, key=rank), *sorted(others, key=rank)]
    index = order.index(kind) % len(_COLOURS)
    return _COLOURS[index], _MARKERS[index]


def _of(found: Sequence[Comparison], region: str) -> list[Comparison]:
    return [one for one in found if one.region == region]


def _regions(analysis: Analysis) -> list[str]:
    return analysis.pairing.regions


def _reference(analysis: Analysis) -> str:
    return analysis.facts.label(analysis.facts.reference)


def _gain_caption(analysis: Analysis, what: str, lines: dict[str, list[Line]]) -> str:
    return (
        f"Mean gain in Dice over the {_reference(analysis)} with as many labelled subjects, of the "
        f"same fold, seed and case, against the {what}; bars and bands are 95 % bootstrap "
        "intervals over cases and seeds, each point for itself."
        + "".join(_uneven_seeds(analysis, lines))
    )


def _uneven_seeds(analysis: Analysis, lines: dict[str, list[Line]]) -> Iterator[str]:
    """What a line may not show: its points may rest on different numbers of seeds."""
    uneven = [line for own in lines.values() for line in own if len({*line.seeds}) > 1]
    for name, seeds in dict.fromkeys((_line_name(analysis, x), tuple(x.seeds)) for x in uneven):
        yield f" Seeds of the line {name}, from left to right: {', '.join(map(str, seeds))}."


def _line_name(analysis: Analysis, line: Line) -> str:
    return f"{analysis.facts.label(line.kind)}, {line.what}"


def _title(analysis: Analysis) -> str:
    return analysis.facts.name + " (phantom)" * analysis.facts.phantom


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def _with_fonts(markup: bytes) -> bytes:
    """Let the reader's own plain font stand for matplotlib's, which few have."""
    text = markup.decode("utf-8")
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    return re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text).encode()
