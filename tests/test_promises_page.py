"""The page of promises names tests that exist, and all that belong to a promise."""

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "promises.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \|.*$", PAGE, re.MULTILINE)


@functools.cache
def names_by_file():
    found = {}
    for path in TESTS.rglob("test_*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        found[path.relative_to(TESTS).as_posix()] = {
            name for name in names if name.startswith("test_")
        }
    return found


def row(number):
    return next(line for line in PAGE.splitlines() if line.startswith(f"| {number} |"))


def test_there_are_nineteen_promises():
    assert list(map(int, ROWS)) == list(range(1, 20))


@pytest.mark.parametrize("number", range(1, 20))
def test_a_promise_names_its_tests_where_they_are(number):
    known = names_by_file()
    groups = re.findall(r"\[([\w/]+\.py)\]\(\.\./tests/\1\): ([^;|]+)", row(number))
    named = {(file, name) for file, names in groups for name in re.findall(r"`(\w+)`", names)}
    assert named
    assert all(name in known[file] for file, name in named)
    belonging = {
        (file, name)
        for file, names in known.items()
        for name in names
        if name.startswith(f"test_promise_{number}_")
    }
    assert belonging <= named
