"""One drawing of all ratios and exponents, with their intervals and goals."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from figures import FIGURES, UNITS, Row
from page import as_row, load

MET, OPEN, MISSED, NO_GOAL = "#1b7837", "#a66a00", "#b2182b", "#555555"
WIDTH, HEIGHT = 10.0, 0.25  # inches, of the whole and of a line
LEFT, RIGHT = 0.34, 0.7  # where the axis begins and ends; words stand on both sides


def draw(results: Path, path: Path) -> None:
    """Draw what was measured.

    Args:
        results: Folder of the files.
        path: The PNG.
    """
    groups = {
        name: [as_row(row) for row in figure["rows"] if row["unit"] != "MiB"]
        for name, figure in load(results).items()
    }
    lines = sum(len(rows) + 1 for rows in groups.values())
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT * lines + 0.7))
    figure.subplots_adjust(left=LEFT, right=RIGHT, top=0.99, bottom=0.6 / (HEIGHT * lines + 0.7))
    place = 0
    for name, rows in groups.items():
        heading = f"{list(FIGURES).index(name) + 1}  {FIGURES[name][0]}"
        at = axes.get_yaxis_transform()
        axes.text(-0.92, place, heading, transform=at, weight="bold", va="center")
        for row in rows:
            place += 1
            show(axes, row, place)
        place += 1
    finish(axes, place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(axes: Any, row: Row, place: int) -> None:
    """One line: name, interval, goal, and the numbers in words."""
    at = axes.get_yaxis_transform()
    axes.text(-0.89, place, row.what, transform=at, va="center", fontsize=9)
    value, low, high = row.estimate
    missed = row.goal is not None and value > row.goal
    color = judged(row)
    number, interval, goal = row.words()
    text = number + f"  ({interval})" * bool(interval) + f",  goal {goal}" * bool(goal)
    axes.text(1.03, place, text, transform=at, va="center", fontsize=9, color=color)
    if row.unit in UNITS:
        # Times have no place on the axis of ratios: the words must do.
        return
    axes.plot([low, high], [place, place], color=color, linewidth=3, solid_capstyle="butt")
    axes.plot(value, place, "X" if missed else "o", color=color, markersize=7)
    if row.goal is not None:
        axes.plot(row.goal, place, "|", color="black", markersize=15, markeredgewidth=2)


def judged(row: Row) -> str:
    """The color of a row: an interval that holds the goal decides nothing."""
    _, low, high = row.estimate
    if row.goal is None:
        return NO_GOAL
    if high <= row.goal:
        return MET
    return MISSED if low > row.goal else OPEN


def finish(axes: Any, lines: int) -> None:
    """Axis, grid, legend."""
    axes.set_ylim(lines - 0.3, -0.8)
    axes.set_xlim(left=0)
    axes.set_yticks([])
    axes.axvline(1, color="#bbbbbb", linewidth=1, zorder=0)
    axes.grid(axis="x", color="#eeeeee", zorder=0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_xlabel("ratio or exponent, 95 % interval; black: goal, at most")
