"""Every figure: learning curves and gains of cases for the page, and those of a study."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from kdnet.files import atomic
from kdnet.results.stats import Gain, cells, interval
from kdnet.results.study_tables import Study
from kdnet.results.tables import Label, number

# The colours of the page; on it, ink and rules follow its own, light or dark.
_INK, _SOFT, _RULE = "#1d2327", "#5d676e", "#dcdfdb"
_TEACHER, _BASELINE, _GAIN, _LOSS = "#6d4bc3", "#a85a08", "#1769aa", "#c2410c"
_COLOURS = ("#0b756c", "#1769aa", "#c2410c", "#8c6d1f", "#b0307a", "#5d676e", "#3f7d20", "#7a4b2a")
_MARKERS = "osD^vPX<"
_DASHED = (0, (4, 2))
# Text of 10 points on 5.2 inches is still 10 pixels high on a page of 400 pixels.
_WIDTH = 5.2
_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "study", "font.size": 10}


@dataclass(frozen=True)
class Picture:
    """A figure of a study and its words.

    Attributes:
        name: Of its files, without the ending.
        title: Above it.
        caption: Says what is seen, also to those who do not see it.
        figure: What is drawn; None where that cannot be done, and the caption says why.
    """

    name: str
    title: str
    caption: str
    figure: Figure | None

    @property
    def svg(self) -> Markup:
        """The figure as a part of a page."""
        return _inline(self.figure, self.title) if self.figure else Markup()

    def save(self, folder: Path) -> None:
        """Write it as PNG and SVG, the same bytes each time, or remove what older rows gave."""
        for ending, metadata in (
            ("png", {"Software": None}),
            ("svg", {"Date": None, "Creator": None, "Title": self.title}),
        ):
            path = folder / f"{self.name}.{ending}"
            if self.figure is None:
                path.unlink(missing_ok=True)
                continue
            buffer = io.BytesIO()
            with mpl.rc_context(_SETTINGS):
                self.figure.savefig(buffer, format=ending, dpi=200, metadata=metadata)
            content = buffer.getvalue()
            with atomic(path) as partial:
                partial.write_bytes(
                    _fonts(content.decode()).encode() if ending == "svg" else content
                )


def colours_of(rows: Sequence[str], teachers: Sequence[str], baseline: str) -> dict[str, str]:
    """Colour of every row on a page."""
    others = [row for row in rows if row not in {*teachers, baseline}]
    found = {row: _COLOURS[place % len(_COLOURS)] for place, row in enumerate(others)}
    return dict.fromkeys(teachers, _TEACHER) | {baseline: _BASELINE} | found


def learning_curves(
    histories: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, str]
) -> list[Markup]:
    """A chart for the loss, the Dice in validation, and each term; validation is dashed."""
    charts: dict[str, list[tuple[str, str]]] = {"loss": [], "Dice (validation)": []}
    for row, epochs in histories.items():
        for column in epochs[0] if epochs else ():
            part, _, name = column.partition("_")
            if part in {"train", "validation"} and name:
                known = {"loss": "loss", "dice": "Dice (validation)"}
                title = known.get(name, f"term: {name.replace('_', ' ')}")
                charts.setdefault(title, []).append((row, column))
    drawn = []
    for title, curves in charts.items():
        if curves:
            figure, axes = _chart(title)
            for row, column in curves:
                values = [epoch[column] for epoch in histories[row]]
                style = _DASHED if column.startswith("validation") else "-"
                place = range(1, len(values) + 1)
                # A line through one point would not be seen.
                marker = "o" if len(values) == 1 else ""
                colour = colours.get(row, _INK)
                axes.plot(place, values, color=colour, linestyle=style, marker=marker)
            axes.set_xlabel("epoch", color=_INK)
            axes.xaxis.get_major_locator().set_params(integer=True)
            drawn.append(_inline(figure, title))
    return drawn


def case_gains(gain: Gain, label: Label) -> Markup:
    """The gain of every case, sorted."""
    values = sorted(gain.means, reverse=True)
    better, worse = (sum(sign * value > 0 for value in values) for sign in (1, -1))
    figure, axes = _chart(f"{gain.region}: {better} of {len(values)} gain, {worse} lose")
    # One outline per colour: 285 bars of their own would be most of the page.
    edges = [edge - 0.5 for edge in range(len(values) + 1)]
    for colour, bound in ((_GAIN, max), (_LOSS, min)):
        heights = [bound(value, 0.0) for value in values]
        axes.stairs(heights, edges, baseline=0, fill=True, color=colour, linewidth=0)
    axes.axhline(0, color=_INK, linewidth=0.8)
    axes.axhline(gain.mean, color=_INK, linewidth=1.2, linestyle=_DASHED)
    # The outline falls from left to right: the right half above the mean is free.
    _note(axes, f"mean {number(gain.mean, signed='+')}", (edges[-1], gain.mean), (0, 3), ha="right")
    axes.set_xlabel(f"{len(values)} cases, sorted", color=_INK)
    axes.set_xticks([])
    words = f"gain in Dice of every case, {label(gain.row)} over {label(gain.against)}"
    return _inline(figure, f"{gain.region}: {words}; {better} of {len(values)} gain, {worse} lose")


def study_pictures(study: Study) -> list[Picture]:
    """All figures of a study."""
    name = study.results.title + " (phantom)" * study.results.phantom
    rows = [row for row in study.results.rows if not study.of(row).empty]
    return [
        _dots(study, "headline", f"{name}: Dice with few labels and with all", _ends(study, rows)),
        _dots(study, "dice", f"{name}: Dice of all networks", rows),
        _gain_lines(study, "gain-by-labelled", name, "labelled subjects", _by_labelled),
        _gain_lines(study, "gain-by-unlabelled", name, "unlabelled subjects", _by_unlabelled),
    ]


@dataclass(frozen=True)
class _Line:
    """Gains of one kind that make a line: places on the axis, and what is written there."""

    kind: str
    name: str
    dashed: bool
    points: list[tuple[float, Gain, str]]


def _ends(study: Study, rows: Sequence[str]) -> list[str]:
    """With fewest and with most labels: baseline, teacher, chosen recipe with all subjects."""
    chosen = [row for row in rows if study.is_chosen(row)]
    labelled = {row: study.subjects(row)[0] for row in rows}
    found = set()
    for count in {labelled[row] for row in (*chosen[:1], *chosen[-1:])}:
        own = [row for row in chosen if labelled[row] == count]
        found.add(max(own, key=lambda row: study.subjects(row)[1]))
        found |= {row for row in rows if labelled[row] == count and not study.is_student(row)}
    return [row for row in rows if row in found]


def _dots(study: Study, name: str, title: str, rows: Sequence[str]) -> Picture:
    if not rows:
        return Picture(name, title, "no row of the chosen recipe is stored.", None)
    places: dict[str, float] = {}
    for row, previous in zip(rows, ["", *rows], strict=False):
        same = previous and study.settings[previous] == study.settings[row]
        # A line is left free above each setting, for its name.
        places[row] = (places[previous] if previous else -0.7) + (1.0 if same else 1.7)

    def draw(axes: Any, region: str) -> None:
        named: set[str] = set()
        for row, height in places.items():
            own = study.of(row)
            _dot(axes, study, row, own[own["region"] == region], height)
            if study.settings[row] not in named:
                named.add(study.settings[row])
                where = {"xycoords": ("axes fraction", "data"), "fontweight": "bold"}
                _note(axes, study.settings[row], (0, height - 0.8), (3, 0), va="center", **where)
        names = [textwrap.fill(_plain(study.results.label(row)), 26) for row in places]
        axes.set_yticks(list(places.values()), names)
        axes.set_ylim(max(places.values()) + 0.6, -0.3)
        # Room for the number beside the last interval.
        left, right = axes.get_xlim()
        axes.set_xlim(left, right + 0.1 * (right - left))
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color=_RULE, linewidth=0.6)
        axes.set_xlabel("Dice", color=_INK)

    caption = (
        "Mean Dice of the held-out cases, all folds and seeds pooled, with its 95 % bootstrap "
        "interval over cases and seeds. Intervals of two networks may overlap although the paired "
        "gain is certain."
    )
    height = 0.6 + 0.25 * (len(rows) + 0.7 * len({study.settings[row] for row in rows}))
    return Picture(name, title, caption, _panels(study, title, draw, height))


def _dot(axes: Any, study: Study, row: str, own: Any, height: float) -> None:
    values = cells(own)
    if values.empty:
        return
    colour, marker = _style(study, study.kind(row))
    mean, found = values.mean(axis=1).mean(), interval(values)
    axes.plot([found.lower, found.upper], [height] * 2, color=colour, linewidth=2.2)
    axes.plot([mean], [height], marker, color=colour, markersize=7, markeredgecolor="white")
    _note(axes, number(mean), (mean if found.reason else found.upper, height), (7, 0), va="center")


def _gain_lines(
    study: Study,
    name: str,
    title: str,
    what: str,
    arrange: Callable[[Study, Sequence[Gain]], list[_Line]],
) -> Picture:
    """Gain over the baseline against a number of subjects, a line per kind."""
    title = f"{title}: gain over the {study.reference} against {what}"
    regions = dict.fromkeys(gain.region for gain in study.gains)
    lines = {r: arrange(study, [g for g in study.gains if g.region == r]) for r in regions}
    every = [line for own in lines.values() for line in own]
    if not every:
        return Picture(name, title, f"no student has pairs that differ in {what}.", None)
    ticks = sorted({x for line in every for x, _, _ in line.points})
    share = arrange is _by_unlabelled

    def draw(axes: Any, region: str) -> None:
        _draw_lines(axes, study, lines.get(region, []), [0.0, *ticks] if share else ticks)
        if share:
            axes.set_xlabel("unlabelled share of the training subjects, %", color=_INK)
        else:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xlabel("labelled training subjects", color=_INK)
        axes.set_ylabel("gain in Dice", color=_INK)

    caption = (
        f"Mean gain in Dice over the {study.reference} with as many labelled subjects, of the same "
        f"fold, seed and case, against the {'share' if share else 'number'} of {what}"
        + ", whose number is below the point"
        * share
        + "; bars and bands are 95 % bootstrap intervals over cases and seeds, each point for "
        "itself." + "".join(dict.fromkeys(map(_uneven_seeds, every)))
    )
    return Picture(name, title, caption, _panels(study, title, draw, 3.0))


def _by_labelled(study: Study, gains: Sequence[Gain]) -> list[_Line]:
    lines = []
    subjects = {gain.row: study.subjects(gain.row) for gain in gains}
    for kind in dict.fromkeys(study.kind(gain.row) for gain in gains):
        own = [gain for gain in gains if study.kind(gain.row) == kind]
        label = study.results.label(own[0].row)
        total = max((sum(subjects[g.row]) for g in own if subjects[g.row][1]), default=0.0)
        full = [gain for gain in own if sum(subjects[gain.row]) == total]
        plain = [gain for gain in own if not subjects[gain.row][1]]
        parts = [("all others unlabelled", full)] * bool(full)
        parts += [("labelled alone", plain)] * any(gain not in full for gain in plain)
        for place, (what, found) in enumerate(parts):
            points = [(subjects[gain.row][0], gain, "") for gain in found]
            lines.append(_Line(kind, f"{label}, {what}", bool(place), points))
    return lines


def _by_unlabelled(study: Study, gains: Sequence[Gain]) -> list[_Line]:
    lines: list[_Line] = []
    groups: dict[tuple[str, float], list[Gain]] = {}
    for gain in gains:
        groups.setdefault((study.kind(gain.row), study.subjects(gain.row)[0]), []).append(gain)
    for (kind, labelled), own in groups.items():
        more = [study.subjects(gain.row)[1] for gain in own]
        if any(more):
            points = [
                (100 * n / (labelled + n), gain, f"{n:g}")
                for n, gain in zip(more, own, strict=True)
            ]
            points.sort(key=lambda point: point[0])
            what = study.settings[own[0].row].partition(" + ")[0]
            name = f"{study.results.label(own[0].row)}, {what}"
            dashed = any(line.kind == kind for line in lines)
            lines.append(_Line(kind, name, dashed, points))
    return lines


def _draw_lines(axes: Any, study: Study, lines: Sequence[_Line], ticks: Sequence[float]) -> None:
    span = max(ticks) - min(ticks) or 1.0
    lowest: dict[tuple[float, str], float] = {}
    for index, line in enumerate(lines):
        colour, marker = _style(study, line.kind)
        # Intervals of several kinds at one number of subjects would hide each other.
        shift = 0.012 * span * (index - (len(lines) - 1) / 2)
        x = [place + shift for place, _, _ in line.points]
        mean = [gain.mean for _, gain, _ in line.points]
        lower, upper = (
            [g.mean if g.interval.reason else getattr(g.interval, end) for _, g, _ in line.points]
            for end in ("lower", "upper")
        )
        axes.fill_between(x, lower, upper, color=colour, alpha=0.1, linewidth=0)
        axes.vlines(x, lower, upper, color=colour, linewidth=1.2)
        axes.plot(
            x,
            mean,
            color=colour,
            marker=marker,
            markersize=6,
            markeredgecolor="white",
            linestyle=_DASHED if line.dashed else "-",
            label=_plain(line.name),
        )
        for (place, _, note), end in zip(line.points, lower, strict=True):
            lowest[place, note] = min(end, lowest.get((place, note), math.inf))
    for (place, note), end in lowest.items():
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}
        _note(axes, note, (place, end), (0, -3), ha="center", va="top", color=_SOFT, bbox=box)
    axes.axhline(0, color=_INK, linewidth=0.8)
    axes.set_xlim(min(ticks) - 0.12 * span, max(ticks) + 0.12 * span)


def _uneven_seeds(line: _Line) -> str:
    """What a line may not show: its points may rest on different numbers of seeds."""
    seeds = [len({seed for _, seed in gain.cells.columns}) for _, gain, _ in line.points]
    listed = ", ".join(map(str, seeds))
    return f" Seeds of the line {line.name}, from left to right: {listed}." * (len({*seeds}) > 1)


def _style(study: Study, kind: str) -> tuple[str, str]:
    """Colour and mark of a kind; the chosen recipe has those of a page's student."""
    if kind in {"teacher", study.results.facts.get("reference", "baseline")}:
        return (_TEACHER if kind == "teacher" else _BASELINE), "o"
    students = [row for row in study.results.rows if study.is_student(row)]
    chosen = [study.kind(row) for row in students if study.is_chosen(row)]
    order = list(dict.fromkeys([*chosen, *map(study.kind, students)]))
    index = order.index(kind) % len(_COLOURS)
    return _COLOURS[index], _MARKERS[index]


def _panels(study: Study, title: str, draw: Callable[[Any, str], None], height: float) -> Figure:
    """One panel per region below each other, and one legend for all."""
    regions = sorted(study.scores["region"].unique())
    with mpl.rc_context(_SETTINGS):
        figure = Figure(layout="constrained")
        named: dict[str, Any] = {}
        for axes, region in zip(
            figure.subplots(len(regions), 1, squeeze=False)[:, 0], regions, strict=True
        ):
            _plain_axes(axes, region if len(regions) > 1 else "")
            draw(axes, region)
            handles, labels = axes.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        if named:
            figure.legend(
                [*named.values()],
                [*named],
                loc="outside lower left",
                frameon=False,
                labelcolor=_INK,
                fontsize=9.5,
            )
        figure.set_size_inches(_WIDTH, 0.5 + height * len(regions) + 0.2 * len(named))
        wrapped = textwrap.fill(_plain(title), 58)
        figure.suptitle(wrapped, x=0.01, ha="left", color=_INK, fontsize=11)
    return figure


def _chart(title: str) -> tuple[Figure, Any]:
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        _plain_axes(axes, title)
    return figure, axes


def _plain_axes(axes: Any, title: str) -> None:
    axes.set_title(_plain(title), loc="left", color=_INK, fontsize=10)
    axes.tick_params(length=0, colors=_INK)
    axes.grid(visible=True, axis="y", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_RULE)


def _note(axes: Any, text: str, place: Any, offset: tuple[int, int], **options: Any) -> None:
    shown = {"xytext": offset, "textcoords": "offset points", "color": _INK, **options}
    axes.annotate(_plain(text), place, **shown)


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def _inline(figure: Figure, label: str) -> Markup:
    """A figure as SVG in a page, without its prologue, size, fonts and identifiers."""
    buffer = io.StringIO()
    with mpl.rc_context(_SETTINGS | {"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    head, rest = buffer.getvalue().partition("<svg")[2].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'<g id="[^"]*"', "<g", _fonts(rest))
    rest = rest.replace(_INK, "currentColor").replace(_RULE, "var(--line)")
    text = f'<svg role="img" aria-label="{escape(label)}" {box.group() if box else ""}>{rest}'
    return Markup(text)  # noqa: S704


def _fonts(markup: str) -> str:
    """Let the reader's own plain font stand for matplotlib's, which few have."""
    markup = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", markup)
    return re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", markup)
