"""Learning curves as inline SVG and slices as PNG, in colours that the page decides."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import image as mpl_image
from matplotlib.figure import Figure
from numpy.typing import NDArray

from evaluation.slices import ShownCase
from evaluation.tables import ROLES

# Stand-ins that no chart uses otherwise; the page's own colours, light or dark, replace them.
_STAND_INS = {
    "#a10001": "currentColor",
    "#a10002": "var(--line)",
    "#a10011": "var(--teacher)",
    "#a10012": "var(--baseline)",
    "#a10013": "var(--student)",
}
_TEXT, _LINE = "#a10001", "#a10002"
_ROLE_COLOURS = dict(zip(ROLES, ("#a10011", "#a10012", "#a10013"), strict=True))

# Okabe and Ito's palette without its dark colours, which vanish on a grey image.
LABEL_COLOURS = ("#f0e442", "#56b4e9", "#d55e00", "#cc79a7", "#009e73", "#e69f00")
_OPACITY = 0.6


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
class Tile:
    """A picture of the figure.

    Attributes:
        title: What it shows.
        note: A second line, may be empty.
        source: PNG as a data URI.
        width: Width divided by height.
        coarse: Whether its pixels should stay visible when it is enlarged.
    """

    title: str
    note: str
    source: str
    width: float
    coarse: bool


def history_charts(
    histories: Mapping[str, Sequence[Mapping[str, float]]],
) -> dict[str, list[Curve]]:
    """Group the columns of the histories into charts.

    Args:
        histories: Role to the rows of its history.csv.

    Returns:
        Title to curves: the loss, the validation Dice, every term, the learning rate.
    """
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


def draw_chart(title: str, curves: Sequence[Curve]) -> str:
    """Draw a chart as SVG markup for the page.

    Args:
        title: Drawn above it, and read out by screen readers.
        curves: Against the epoch, from 1.

    Returns:
        An `<svg>` element without fixed colours, fonts or size.
    """
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            axes.plot(
                range(1, len(curve.values) + 1),
                curve.values,
                color=_ROLE_COLOURS.get(curve.role, _TEXT),
                linestyle=(0, (4, 2)) if curve.dashed else "-",
                linewidth=1.5,
                solid_capstyle="round",
            )
        _plain_axes(axes, title)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(buffer.getvalue(), title)


def tiles(case: ShownCase, seen: Sequence[str]) -> list[Tile]:
    """The pictures of one case: every modality, the reference, every prediction.

    Args:
        case: Slices.
        seen: Modalities of the student; the first is drawn under the labels.

    Returns:
        The tiles in the order in which they are shown.
    """
    pictures = []
    for name, grey in case.images.items():
        note = "seen by baseline and student" if name in seen else ""
        pictures.append(_tile(name, note, _rgb(grey), case.aspect))
    under = next((case.images[name] for name in seen if name in case.images), None)
    if under is None:
        under = next(iter(case.images.values()))
    for who, classes in case.labels.items():
        pictures.append(_tile(who, "", _overlaid(under, classes), case.aspect))
    return pictures


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
    axes.set_title(title, loc="left", color=_TEXT, fontsize=10)
    axes.set_xlabel("epoch", color=_TEXT)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(length=0, colors=_TEXT)
    axes.grid(visible=True, axis="y", color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_LINE)


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


def _rgb(grey: NDArray[np.uint8]) -> NDArray[np.float64]:
    return np.repeat(grey[..., None] / 255.0, 3, axis=2)


def _overlaid(grey: NDArray[np.uint8], classes: NDArray[np.uint8]) -> NDArray[np.float64]:
    picture = _rgb(grey)
    for index in np.unique(classes[classes > 0]):
        where = classes == index
        colour = np.array(mpl.colors.to_rgb(label_colour(int(index))))
        picture[where] = (1 - _OPACITY) * picture[where] + _OPACITY * colour
    return picture


def label_colour(index: int) -> str:
    """Colour of a class.

    Args:
        index: Class index, from 1.

    Returns:
        A hexadecimal colour.
    """
    return LABEL_COLOURS[(index - 1) % len(LABEL_COLOURS)]


def _tile(title: str, note: str, picture: NDArray[np.float64], aspect: float) -> Tile:
    buffer = io.BytesIO()
    mpl_image.imsave(buffer, np.ascontiguousarray(picture), format="png")
    rows, columns = picture.shape[:2]
    return Tile(
        title=title,
        note=note,
        source="data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"),
        width=columns / (rows * aspect),
        coarse=columns < 120,
    )
