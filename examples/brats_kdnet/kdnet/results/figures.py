"""Every figure: learning curves and gains of cases for the page, and those of a study."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from kdnet.files import atomic
from kdnet.results.stats import Gain, Interval, cells, interval
from kdnet.results.study_tables import Study
from kdnet.results.tables import Label, number

# The colours of the page; on it, ink and rules follow its own, light or dark.
_INK, _RULE = "#1d2327", "#dcdfdb"
_TEACHER, _BASELINE, _GAIN, _LOSS = "#6d4bc3", "#a85a08", "#1769aa", "#c2410c"
_COLOURS = ("#0b756c", "#1769aa", "#c2410c", "#8c6d1f", "#b0307a", "#5d676e", "#3f7d20", "#7a4b2a")
_MARKERS = "osD^vPX<"
_DASHED = (0, (4, 2))
# Text of 10 points on 5.2 inches is still 10 pixels high on a page of 400 pixels.
_WIDTH = 5.2
_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "kdnet", "font.size": 10}


@dataclass(frozen=True)
class Picture:
    """A figure of a study and its words.

    Attributes:
        name: Of its file, without the ending.
        title: Above it.
        caption: Says what is seen, also to those who do not see it.
        figure: What is drawn.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    @property
    def svg(self) -> Markup:
        """The figure as a part of a page."""
        return _inline(self.figure, self.title)

    def save(self, folder: Path) -> None:
        """Write it as PNG, the same bytes each time."""
        with atomic(folder / f"{self.name}.png") as partial, mpl.rc_context(_SETTINGS):
            self.figure.savefig(partial, format="png", dpi=200, metadata={"Software": None})


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
                # A line through one point would not be seen.
                marker = "o" if len(values) == 1 else ""
                place = range(1, len(values) + 1)
                axes.plot(place, values, color=colours[row], linestyle=style, marker=marker)
            axes.set_xlabel("epoch", color=_INK)
            axes.xaxis.get_major_locator().set_params(integer=True)
            drawn.append(_inline(figure, title))
    return drawn


def case_gains(gain: Gain, label: Label) -> Markup:
    """The gain of every case, sorted."""
    values = sorted(gain.means, reverse=True)
    counts = f"{gain.changed(1)} of {len(values)} gain, {gain.changed(-1)} lose"
    figure, axes = _chart(f"{gain.region}: {counts}")
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
    return _inline(figure, f"{gain.region}: {words}; {counts}")


def study_pictures(study: Study) -> list[Picture]:
    """Dice of the networks that matter, and gains of all recipes; those there are."""
    name = study.results.facts.title + " (phantom)" * study.results.facts.phantom
    return [
        _dice(study, f"{name}: mean Dice", _shown_rows(study)),
        *_gains(study, f"{name}: gain over the {study.reference}"),
        *_gain_lines(study, "gain-by-labelled", name, "labelled", _by_labelled),
        *_gain_lines(study, "gain-by-unlabelled", name, "unlabelled", _by_unlabelled),
    ]


def _shown_rows(study: Study) -> list[str]:
    """Baseline, teacher and chosen recipe with fewest and with most labels; else all rows."""
    rows, chosen = [*study.spans.index], study.chosen
    rows = [row for row in study.results.rows if row in rows]
    if not chosen:
        return rows
    labelled = {row: study.subjects(row)[0] for row in rows}
    counts = {labelled[chosen[0]], labelled[chosen[-1]]}
    students = {gain.row for gain in study.gains}
    return [
        row for row in rows if labelled[row] in counts and (row in chosen or row not in students)
    ]


def _dice(study: Study, title: str, rows: Sequence[str]) -> Picture:
    """Mean Dice of every row."""
    caption = (
        "Mean Dice of the held-out cases, all folds and seeds pooled, with its 95 % bootstrap "
        "interval over patients and seeds. Intervals of two networks may overlap although the "
        "paired gain is certain."
    )

    def values_of(row: str, region: str) -> tuple[float, Interval]:
        own = study.of(row)
        values = cells(own[own["region"] == region])
        return values.mean(axis=1).mean(), interval(values)

    return Picture(
        "headline", title, caption, _dots(study, title, rows, "Dice", values_of=values_of)
    )


def _gains(study: Study, title: str) -> Iterator[Picture]:
    """Gain of every student, where all had as many labels: lines over their number are points."""
    found = {(gain.row, gain.region): gain for gain in study.gains}
    rows = list(dict.fromkeys(row for row, _ in found))
    if len({study.subjects(row)[0] for row in rows}) != 1:
        return
    caption = (
        f"Mean gain in Dice over the {study.reference} of the same fold, seed and case, with its "
        "95 % bootstrap interval over patients and seeds. Rows may rest on different numbers of "
        "folds and seeds, which the table of gains gives."
    )

    def values_of(row: str, region: str) -> tuple[float, Interval]:
        return found[row, region].mean, found[row, region].interval

    figure = _dots(study, title, rows, "gain in Dice", values_of=values_of, signed="+")
    yield Picture("gains", title, caption, figure)


def _dots(
    study: Study,
    title: str,
    rows: Sequence[str],
    what: str,
    *,
    values_of: Callable[[str, str], tuple[float, Interval]],
    signed: str = "",
) -> Figure:
    """Mean and interval of every row, below the names of their settings."""
    heights, names = {}, {}
    labels = {row: textwrap.fill(_plain(study.results.label(row)), 28) for row in rows}
    below = 0.0
    for row in rows:
        # A line is left free above each setting, for its name.
        if study.setting(row) not in names:
            names[study.setting(row)] = below
            below += 0.7
        lines = 1 + labels[row].count("\n")
        below += 0.3 + 0.7 * lines
        heights[row] = below - 0.35 * (lines + 1)

    def draw(axes: Any, region: str) -> None:
        for row, height in heights.items():
            colour, marker = _style(study, study.kind(row))
            mean, found = values_of(row, region)
            end = mean if found.reason else found.upper
            axes.plot([found.lower, found.upper], [height] * 2, color=colour, linewidth=2.2)
            axes.plot([mean], [height], marker, color=colour, markersize=7, markeredgecolor="white")
            _note(axes, number(mean, signed=signed), (end, height), (7, 0), va="center")
        for name, height in names.items():
            where: Any = {"xycoords": ("axes fraction", "data"), "fontweight": "bold"}
            _note(axes, name, (0, height + 0.2), (3, 0), va="center", **where)
        if signed:
            # Below the name of the first setting, which it would cross.
            axes.vlines(0, min(heights.values()) - 0.5, below, color=_INK, linewidth=0.8)
        axes.set_yticks([*heights.values()], [*labels.values()])
        axes.set_ylim(below, -0.3)
        # Room for the number beside the last interval.
        left, right = axes.get_xlim()
        axes.set_xlim(left, right + 0.1 * (right - left))
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color=_RULE, linewidth=0.6)
        axes.set_xlabel(what, color=_INK)

    return _panels(study, title, draw, 0.6 + 0.25 * below)


def _gain_lines(
    study: Study,
    name: str,
    title: str,
    what: str,
    lines_of: Callable[[pd.DataFrame], Iterator[tuple[str, pd.DataFrame]]],
) -> Iterator[Picture]:
    """Gain over the baseline against a number of subjects, a line for every name."""
    gains = pd.DataFrame([_point(study, gain) for gain in study.gains])
    if gains.empty:
        return
    points = pd.concat([own.assign(line=line) for line, own in lines_of(gains)] or [gains[:0]])
    if points[what].nunique() < 2:
        return
    title = f"{title}: gain over the {study.reference}, by number of {what} subjects"
    ticks = sorted(points[what].unique())
    span = max(ticks) - min(ticks)

    def draw(axes: Any, region: str) -> None:
        shown = points[points["region"] == region].groupby("line", sort=False)
        for place, (line, own) in enumerate(shown):
            # Intervals of several lines at one number of subjects would hide each other.
            x = own[what] + 0.012 * span * (place - (len(shown) - 1) / 2)
            colour, marker = _style(study, own["kind"].iloc[0])
            axes.fill_between(x, own["lower"], own["upper"], color=colour, alpha=0.1, linewidth=0)
            axes.vlines(x, own["lower"], own["upper"], color=colour, linewidth=1.2)
            shape = {"marker": marker, "markersize": 6, "markeredgecolor": "white"}
            dashes = _DASHED if own["dashed"].any() else "-"
            label = _plain(str(line))
            axes.plot(x, own["gain"], color=colour, linestyle=dashes, label=label, **shape)
        axes.axhline(0, color=_INK, linewidth=0.8)
        axes.set_xlim(min(ticks) - 0.12 * span, max(ticks) + 0.12 * span)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel(f"{what} training subjects", color=_INK)
        axes.set_ylabel("gain in Dice", color=_INK)

    caption = (
        f"Mean gain in Dice over the {study.reference} with as many labelled subjects, of the same "
        f"fold, seed and case, against the number of {what} subjects; bars and bands are 95 % "
        "bootstrap intervals over patients and seeds, each point for itself. Points of a line may "
        "rest on different numbers of seeds, which the table of gains gives."
    )
    yield Picture(name, title, caption, _panels(study, title, draw, 3.0))


def _point(study: Study, gain: Gain) -> dict[str, Any]:
    labelled, unlabelled = study.subjects(gain.row)
    found = gain.interval
    return {
        "region": gain.region,
        "kind": study.kind(gain.row),
        "label": study.results.label(gain.row),
        "labelled": labelled,
        "unlabelled": unlabelled,
        "gain": gain.mean,
        "lower": gain.mean if found.reason else found.lower,
        "upper": gain.mean if found.reason else found.upper,
        "dashed": False,
    }


def _by_labelled(gains: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """For each kind a line of all subjects, and one without unlabelled subjects if it differs."""
    for _, own in gains.groupby("kind", sort=False):
        label, total = own["label"].iloc[0], own["labelled"] + own["unlabelled"]
        alone = own["unlabelled"] == 0
        full = total == total[~alone].max()
        if full.any():
            yield f"{label}, all others unlabelled", own[full]
        if (alone & ~full).any():
            yield f"{label}, labelled alone", own[alone].assign(dashed=full.any())


def _by_unlabelled(gains: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """For each kind and number of labelled subjects a line, if some have unlabelled ones."""
    drawn: set[str] = set()
    for (kind, labelled), own in gains.groupby(["kind", "labelled"], sort=False):
        if own["unlabelled"].any():
            line = own.sort_values("unlabelled").assign(dashed=kind in drawn)
            drawn.add(kind)
            yield f"{own['label'].iloc[0]}, {labelled:g} labelled", line


def _style(study: Study, kind: str) -> tuple[str, str]:
    """Colour and mark of a kind; the chosen recipe has those of a page's student."""
    students = [study.kind(gain.row) for gain in study.gains]
    if kind not in students:
        teachers = {study.kind(row) for row in study.results.teachers}
        return (_TEACHER if kind in teachers else _BASELINE), "o"
    order = list(dict.fromkeys([*map(study.kind, study.chosen), *students]))
    index = order.index(kind) % len(_COLOURS)
    return _COLOURS[index], _MARKERS[index]


def _panels(study: Study, title: str, draw: Callable[[Any, str], None], height: float) -> Figure:
    """One panel per region below each other, and one legend for all."""
    regions = sorted(study.scores["region"].unique())
    with mpl.rc_context(_SETTINGS):
        figure = Figure(layout="constrained")
        named: dict[str, Any] = {}
        every = figure.subplots(len(regions), 1, squeeze=False)[:, 0]
        for axes, region in zip(every, regions, strict=True):
            _plain_axes(axes, region if len(regions) > 1 else "")
            draw(axes, region)
            handles, labels = axes.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        if named:
            look: Any = {"frameon": False, "labelcolor": _INK, "fontsize": 9.5}
            figure.legend([*named.values()], [*named], loc="outside lower left", **look)
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
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    # The reader's own plain font stands for matplotlib's, which few have.
    rest = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", rest)
    rest = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", rest)
    rest = rest.replace(_INK, "currentColor").replace(_RULE, "var(--line)")
    text = f'<svg role="img" aria-label="{escape(label)}" {box.group() if box else ""}>{rest}'
    return Markup(text)  # noqa: S704
