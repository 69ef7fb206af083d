"""Integrations are thin: what users name is a page, and what it stands on does not know it."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from privdistill.integrations import terms

FOLDER = Path(sys.modules[terms.__name__].__file__).parent
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "__init__")
INTEGRATIONS = ("lightning", "monai", "nnunet")


def beside(path):
    """The files of the folder that a file imports."""
    package = "privdistill.integrations"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith(f"{package}."):
            yield node.module.removeprefix(f"{package}.")


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_an_integration_has_less_than_150_lines(name):
    assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 150


def test_imports_point_one_way_and_none_at_an_integration():
    imports = {path.stem: set(beside(path)) for path in FILES}
    assert imports["nnunet"]
    assert list(TopologicalSorter(imports).static_order())  # raises for a cycle
    assert not set().union(*imports.values()) & set(INTEGRATIONS)
