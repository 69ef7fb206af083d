"""The page of faults names tests, files and commands that exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "](../tests/" in line]


def names(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_every_row_has_a_promise_tests_a_figure_and_a_command():
    assert len(ROWS) >= 8
    for line in ROWS:
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        assert len(cells) == 4, line
        assert all(cells), line
        assert re.search(r"\d", cells[2]), f"no figure: {line}"
        assert re.search(r"`(make|python|HYPOTHESIS_PROFILE=\w+ make)\b[^`]*`", cells[3]), line


def test_every_test_named_exists():
    for line in ROWS:
        groups = re.findall(r"\]\(\.\./(tests/[\w/]+\.py)\)(?:: ([^;|]+))?", line)
        assert groups, line
        for file, listed in groups:
            known = names(ROOT / file)
            assert set(re.findall(r"`(test_\w+)`", listed)) <= known, (file, listed)


def test_every_file_of_a_command_exists_and_every_target():
    targets = re.findall(
        r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    for line in ROWS:
        command = line.strip("|").split(" | ")[-1]
        assert all((ROOT / file).is_file() for file in re.findall(r"[\w/]+\.py", command)), line
        assert set(re.findall(r"make ([a-z-]+)", command)) <= set(targets), line


def test_every_test_of_faults_is_cited():
    files = {path.name for path in (TESTS / "faults").glob("test_*.py")}
    assert files <= set(re.findall(r"tests/faults/(test_\w+\.py)", PAGE))
