"""Imports in `kdnet` run one way: a module imports its own layer and those below it."""

import ast
from pathlib import Path

import kdnet

PACKAGE = Path(kdnet.__file__).parent
ENTRIES = {path.stem for path in PACKAGE.parent.glob("*.py")}
#: From the bottom up; those on one line do not import each other.
LAYERS = (
    ("errors", "environment", "stopping"),
    ("files",),
    ("command",),
    ("config",),
    ("rows",),
    ("data", "models"),
    ("recipes",),
    ("evaluation",),
    ("training",),
    ("runs", "exported"),
    ("results",),
    ("studies",),
)
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}


def imported(path):
    """Modules of the application that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "kdnet":
            yield from (f"kdnet.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def is_above(part, other):
    """Say whether a part stands above another one, or beside it."""
    return part != other and HEIGHT[part] >= HEIGHT[other]


def test_every_module_has_a_layer():
    parts = {path.stem for path in PACKAGE.iterdir() if path.stem[0] != "_"}
    assert parts == {*HEIGHT}


def test_imports_run_one_way():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE).with_suffix("")
        for module in imported(path):
            top, _, rest = module.partition(".")
            upwards = top == "kdnet" and is_above(rest.split(".")[0], inside.parts[0])
            if upwards or top in ENTRIES:
                found.add(f"{'.'.join(inside.parts)} -> {rest or top}")
    assert found == set()
