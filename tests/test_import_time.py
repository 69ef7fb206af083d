"""The library alone is torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import privdistill
from figures import import_time

PACKAGE = Path(privdistill.__file__).parent
FOREIGN = {
    *("monai", "lightning", "lightning_fabric", "numpy", "scipy", "ignite", "accelerate", "timm"),
    *("nnunetv2", "nibabel", "pandas", "matplotlib", "rich", "onnx", "onnxruntime", "safetensors"),
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_no_file_of_the_core_imports_a_package_of_a_loop():
    core = [p for p in PACKAGE.rglob("*.py") if "integrations" not in p.parts]
    assert {p.name: found for p in core if (found := FOREIGN & set(imported(p)))} == {}


def test_importing_the_library_loads_none_of_them():
    # torch itself brings numpy where it is installed
    code = (
        "import sys, torch, typing_extensions; before = set(sys.modules); import privdistill;"
        f"print(sorted({FOREIGN!r} & (set(sys.modules) - before)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


@pytest.mark.slow
def test_importing_the_library_takes_fifty_milliseconds_at_most(tmp_path):
    import_time(str(tmp_path))  # compiles
    assert min(import_time(str(tmp_path)) for _ in range(3)) <= 50
