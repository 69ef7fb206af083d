"""The page of results, whose tables are made from the files."""

import json
import re
from pathlib import Path
from typing import Any

from contest import Interval
from figures import FIGURES, Row

HEAD = "| what | measured | 95 % interval | goal |\n| --- | --- | --- | --- |"
TABLE = re.compile(r"(<!-- results: ([a-z-]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def load(results: Path) -> dict[str, dict[str, Any]]:
    """Read the figures that were measured.

    Args:
        results: Folder of the files.

    Returns:
        Content by name, in the order of the figures.
    """
    files = {name: results / f"{name}.json" for name in FIGURES}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in files.items()
        if path.is_file()
    }


def as_row(found: dict[str, Any]) -> Row:
    """The row that a file describes."""
    estimate = Interval(found["value"], found["low"], found["high"])
    return Row(found["what"], estimate, found["unit"], found["goal"])


def cells(row: Row) -> str:
    """A row of a table."""
    return f"| {row.what} | {' | '.join(row.words())} |"


def section(name: str, figures: dict[str, dict[str, Any]]) -> str:
    """The table of a figure and what belongs to it."""
    if name not in figures:
        return "Not measured yet.\n"
    found = figures[name]
    table = "\n".join([HEAD, *(cells(as_row(row)) for row in found["rows"])])
    how = f"{found['rounds']} rounds, {found['threads']} threads ({found['processor']}), "
    how += f"torch {found['torch']}, Python {found['python']}."
    return f"{table}\n\n{' '.join([*found['remarks'], how])}\n"


def render(text: str, results: Path) -> str:
    """Put the numbers into the page.

    Args:
        text: The page, with a pair of comments around each table.
        results: Folder of the files.

    Returns:
        The page.
    """
    figures = load(results)
    return TABLE.sub(lambda found: f"{found[1]}{section(found[2], figures)}{found[3]}", text)


def write_page(results: Path, page: Path) -> None:
    """Bring the page up to date."""
    page.write_text(render(page.read_text(encoding="utf-8"), results), encoding="utf-8")
