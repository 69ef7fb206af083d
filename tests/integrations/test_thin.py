"""Integrations are thin: a file is a page, and what several share knows none of them."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from privdistill.integrations import batch

FOLDER = Path(sys.modules[batch.__name__].__file__).parent
PACKAGE = "privdistill.integrations"
FILES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path
    for path in FOLDER.rglob("*.py")
    if path.name != "__main__.py"
}


def beside(path):
    """The files of the folder that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(PACKAGE):
            inner = node.module.removeprefix(PACKAGE).removeprefix(".")
            names = {f"{inner}.{name.name}".removeprefix(".") for name in node.names}
            yield from {inner, *names} & set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_in_one_go(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 310


def test_imports_point_one_way_and_what_is_shared_imports_none_of_them():
    imports = {name: set(beside(path)) for name, path in FILES.items()}
    assert {"nnunet.plans", "nnunet.export"} <= imports["nnunet.trainer"]
    assert list(TopologicalSorter(imports).static_order())  # raises for a cycle
    assert not imports["batch"]
    assert imports["lightning"] == imports["monai"] == {"batch"}
