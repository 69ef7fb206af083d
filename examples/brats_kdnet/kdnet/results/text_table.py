"""A table of text that can be shown in the terminal and written as Markdown."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kdnet.errors import printable


@dataclass(frozen=True)
class TextTable:
    """Cells as they are printed.

    Attributes:
        title: Above the table.
        columns: Headings.
        rows: One text per column each.
        notes: Sentences below the table.
        words: Number of columns, from the left, that hold words; the others hold numbers.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    words: int = 1

    def rich(self) -> Group:
        """Return a renderable for the terminal; equal cells of the first column are shown once."""
        table = Table(title=Text(printable(self.title)), title_justify="left")
        for index, heading in enumerate(self.columns):
            table.add_column(
                Text(printable(heading, keep="\n")),
                justify="left" if index < self.words else "right",
            )
        previous = ""
        for first, *others in self.rows:
            cells = ("" if first == previous else first, *others)
            table.add_row(*(Text(printable(cell, keep="\n")) for cell in cells))
            previous = first
        return Group(table, *(Text(printable(note, keep="\n"), style="dim") for note in self.notes))

    def markdown(self) -> str:
        """Return the table as GitHub's Markdown, its notes as paragraphs."""
        rules = [":--" if index < self.words else "--:" for index in range(len(self.columns))]
        lines = [_line(self.columns), _line(rules), *(_line(row) for row in self.rows)]
        notes = "".join(f"\n\n{note}" for note in self.notes)
        return f"**{self.title}**\n\n" + "\n".join(lines) + notes + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(cell: str) -> str:
    """Names come from files; Markdown would take their HTML for its own."""
    return html.escape(cell, quote=False).replace("|", "\\|")
