"""Charts as inline SVG, in colours that the page decides."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from kdnet.evaluation.scoring import Score
from kdnet.results.tables import ROLES, format_number

# Stand-ins that no chart uses otherwise; the page's own colours, light or dark, replace them.
_STAND_INS = {
    "#a10001": "currentColor",
    "#a10002": "var(--line)",
    "#a10003": "var(--gain)",
    "#a10004": "var(--loss)",
    "#a10011": "var(--teacher)",
    "#a10012": "var(--baseline)",
    "#a10013": "var(--student)",
}
_TEXT, _LINE, _GAIN, _LOSS = "#a10001", "#a10002", "#a10003", "#a10004"
_ROLE_COLOURS = dict(zip(ROLES, ("#a10011", "#a10012", "#a10013"), strict=True))

# With more cases than this, lines become thin, the small changes pale, and their ends lose dots.
_MANY = 40


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        role: Decides the colour.
        values: One number per epoch.
        dashed: Whether it is a validation curve.
    """

    role: str
    values: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True)
class Pairs:
    """Two networks on the same cases, in one region.

    Attributes:
        region: Name of the region.
        names: The network compared with, and the one of interest.
        values: Their Dice, one pair per case; seeds are averaged.
    """

    region: str
    names: tuple[str, str]
    values: list[tuple[float, float]]

    @property
    def gains(self) -> list[float]:
        """Second minus first, one per case."""
        return [after - before for before, after in self.values]


def history_charts(
    histories: Mapping[str, Sequence[Mapping[str, float]]],
) -> dict[str, list[Curve]]:
    """Group the columns of the histories into charts."""
    charts: dict[str, list[Curve]] = {}
    for role, rows in histories.items():
        for column in rows[0] if rows else ():
            title, dashed = _place(column)
            if title:
                values = [row[column] for row in rows]
                charts.setdefault(title, []).append(Curve(role, values, dashed))
    order = ["loss", "Dice (validation)"]
    terms = [title for title in charts if title not in {*order, "learning rate"}]
    # With a single term the term is the loss, and its chart would say the same twice.
    return {title: charts[title] for title in (*order, *terms, "learning rate") if title in charts}


def pairs_of(scores: Sequence[Score], *, student: str, baseline: str) -> list[Pairs]:
    """Pair the native Dice of two networks, case by case, without post-processing."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for score in scores:
        if score.space == "native" and score.postprocessing == "off":
            values.setdefault((score.region, score.role, score.case), []).append(score.dice)
    means = {place: statistics.fmean(found) for place, found in values.items()}
    result = []
    for region in dict.fromkeys(region for region, _, _ in means):
        cases = [case for where, role, case in means if (where, role) == (region, student)]
        paired = [
            (means[region, baseline, case], means[region, student, case])
            for case in cases
            if (region, baseline, case) in means
        ]
        if paired:
            result.append(Pairs(region, (baseline, student), paired))
    return result


def draw_chart(title: str, curves: Sequence[Curve]) -> str:
    """Draw learning curves as SVG markup for the page."""

    def draw(axes: Any) -> None:
        for curve in curves:
            axes.plot(
                range(1, len(curve.values) + 1),
                curve.values,
                color=_ROLE_COLOURS.get(curve.role, _TEXT),
                linestyle=(0, (4, 2)) if curve.dashed else "-",
                linewidth=1.5,
                solid_capstyle="round",
            )
        axes.set_xlabel("epoch", color=_TEXT)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _drawn(title, title, draw)


def draw_pairs(pairs: Pairs) -> str:
    """Draw one line per case from one network's Dice to the other's."""
    count = len(pairs.values)
    better, worse = (sum(sign * gain > 0 for gain in pairs.gains) for sign in (1, -1))
    label = f"{pairs.region}: Dice per case, {pairs.names[0]} to {pairs.names[1]}; "
    label += f"{better} of {count} gain, {worse} lose"

    def draw(axes: Any) -> None:
        _draw_lines(axes, pairs)
        means = [statistics.fmean(column) for column in zip(*pairs.values, strict=True)]
        axes.plot([0, 1], means, color=_TEXT, linewidth=3, marker="o", markersize=6)
        for side, mean, where in ((0, means[0], "right"), (1, means[1], "left")):
            axes.annotate(
                format_number(mean),
                (side, mean),
                xytext=(10 if side else -10, 0),
                textcoords="offset points",
                ha=where,
                va="center",
                color=_TEXT,
            )
        axes.set_xlim(-0.42, 1.42)
        axes.set_ylim(*_limits(pairs))
        axes.set_xticks([0, 1], [_short(name) for name in pairs.names])

    return _drawn(f"{pairs.region}: {better} gain, {worse} lose", label, draw)


def draw_gains(pairs: Pairs) -> str:
    """Draw the gain of every case, sorted."""
    ordered = sorted(pairs.gains, reverse=True)
    mean = statistics.fmean(ordered)
    text = format_number(mean, signed=True)

    def draw(axes: Any) -> None:
        _draw_bars(axes, ordered)
        axes.axhline(0, color=_TEXT, linewidth=0.8)
        axes.axhline(mean, color=_TEXT, linewidth=1.2, linestyle=(0, (4, 2)))
        # The curve falls from left to right: the right half above the mean is free.
        axes.annotate(
            f"mean {text}",
            (len(ordered) - 0.5, mean),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=_TEXT,
        )
        axes.set_xlim(-0.5, len(ordered) - 0.5)
        axes.set_xlabel(f"{len(ordered)} cases, sorted", color=_TEXT)
        axes.set_xticks([])

    label = f"{pairs.region}: gain in Dice of every case, sorted; mean {text}"
    return _drawn(f"{pairs.region}: gain per case", label, draw)


def _draw_lines(axes: Any, pairs: Pairs) -> None:
    many = len(pairs.values) > _MANY
    largest = max(map(abs, pairs.gains)) or 1.0
    kinds = (
        (_TEXT, "-", [pair for pair in pairs.values if pair[0] == pair[1]]),
        (_GAIN, "-", [pair for pair in pairs.values if pair[0] < pair[1]]),
        (_LOSS, (0, (4, 2)), [pair for pair in pairs.values if pair[0] > pair[1]]),
    )
    for colour, style, chosen in kinds:
        if not chosen:
            continue
        lines = LineCollection(
            [[(0, before), (1, after)] for before, after in chosen],
            colors=colour,
            linestyles=[style],
            linewidths=0.7 if many else 1.2,
            # Among hundreds of lines those that change most are to be seen.
            alpha=[0.1 + 0.7 * abs(after - before) / largest for before, after in chosen]
            if many
            else 0.85,
        )
        axes.add_collection(lines)
        if not many:
            for side in (0, 1):
                ends = [pair[side] for pair in chosen]
                axes.plot([side] * len(ends), ends, ".", color=colour, markersize=6)


def _limits(pairs: Pairs) -> tuple[float, float]:
    """Ends of the Dice axis: all values, with a little air, and never less than 0.2."""
    values = [value for pair in pairs.values for value in pair]
    air = 0.1 * max(max(values) - min(values), 0.2)
    return max(min(values) - air, -0.02), min(max(values) + air, 1.02)


def _draw_bars(axes: Any, ordered: Sequence[float]) -> None:
    if len(ordered) <= _MANY:
        colours = [_GAIN if gain > 0 else _LOSS for gain in ordered]
        axes.bar(range(len(ordered)), ordered, width=0.8, color=colours)
        return
    # One outline per colour: 285 bars of their own would be most of the page.
    edges = [edge - 0.5 for edge in range(len(ordered) + 1)]
    for colour, heights in (
        (_GAIN, [max(gain, 0.0) for gain in ordered]),
        (_LOSS, [min(gain, 0.0) for gain in ordered]),
    ):
        axes.stairs(heights, edges, baseline=0, fill=True, color=colour, linewidth=0)


def _drawn(title: str, label: str, draw: Callable[[Any], None]) -> str:
    """One chart with the axes that all of them have."""
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 9}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        _plain_axes(axes, title)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(buffer.getvalue(), label)


def _place(column: str) -> tuple[str, bool]:
    """Title of the chart in which a column of history.csv is drawn, and whether it is dashed."""
    if column in {"train_loss", "validation_loss"}:
        return "loss", column.startswith("validation")
    if column == "validation_dice":
        return "Dice (validation)", True
    if column == "learning_rate":
        return "learning rate", False
    part, _, term = column.partition("_")
    if part in {"train", "validation"} and term:
        return f"term: {term.replace('_', ' ')}", part == "validation"
    return "", False


def _plain_axes(axes: Any, title: str) -> None:
    axes.set_title(_plain(title), loc="left", color=_TEXT, fontsize=10)
    axes.tick_params(length=0, colors=_TEXT)
    axes.grid(visible=True, axis="y", color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_LINE)


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def _short(name: str) -> str:
    return _plain(name if len(name) <= 18 else f"{name[:17]}\N{HORIZONTAL ELLIPSIS}")


def _for_page(markup: str, title: str) -> str:
    """Cut the prologue, fixed size, fonts, colours and identifiers out of matplotlib's SVG."""
    body = markup[markup.index("<svg") :]
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    rest = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", rest)
    rest = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", rest)
    for stand_in, colour in _STAND_INS.items():
        rest = rest.replace(stand_in, colour)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'<svg role="img" aria-label="{label}" {box.group() if box else ""}>{rest}'
