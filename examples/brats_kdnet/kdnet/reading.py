"""Files that anybody may have written or damaged, read without trusting their form."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

# Parsers of damaged text raise all of these: PyYAML lets a conversion's own error through, and
# brackets in brackets exhaust the stack.
_DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError),
    *(RecursionError, csv.Error, yaml.YAMLError),
)
_SHOWN = 200


class UnreadableError(Exception):
    """A file is missing, or not of the form that it should have; the message says why."""


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return _read(path, json.loads)


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values."""
    return _read(path, yaml.safe_load)


def read_rows(path: Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """Read a CSV file whose rows are all as long as its header."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            rows: list[dict[str, str]] = list(reader)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
    except _DAMAGE as error:
        raise UnreadableError(said(error)) from error
    if missing:
        raise UnreadableError(f"it has no column {', '.join(missing)}")
    for number, row in enumerate(rows, start=1):
        # The module puts None where a row is too short or too long.
        if None in row or None in row.values():
            raise UnreadableError(f"row {number} is not as long as the header")
    return rows


def is_number(value: Any) -> bool:
    """Say whether a value is a number that can be counted with: not negative, and finite."""
    return type(value) in {int, float} and math.isfinite(value) and value >= 0


def said(error: BaseException) -> str:
    """Return what is wrong in one short line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except _DAMAGE as error:
        raise UnreadableError(said(error)) from error
