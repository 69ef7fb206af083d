"""Without its package an integration says what to install."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def without(monkeypatch):
    """Make a package look as if it were not installed."""

    def block(package):
        for name in [package, *sys.modules]:
            if name == package or name.startswith(f"{package}."):
                monkeypatch.setitem(sys.modules, name, None)
        for name in [name for name in sys.modules if name.startswith("privdistill.integrations.")]:
            monkeypatch.delitem(sys.modules, name)

    return block


@pytest.mark.parametrize(
    ("integration", "package", "extra"),
    [
        ("lightning", "lightning", "lightning"),
        ("monai", "monai", "monai"),
        ("monai", "ignite", "monai"),
        ("nnunet", "nnunetv2", "nnunet"),
    ],
)
def test_an_integration_names_the_package_and_the_extra(without, integration, package, extra):
    without(package)
    said = (
        rf"integrations\.{integration} needs .*{package}.*pip install '\./privdistill\[{extra}\]'"
    )
    with pytest.raises(ImportError, match=said):
        importlib.import_module(f"privdistill.integrations.{integration}")


def test_the_example_with_accelerate_names_the_package(without):
    without("accelerate")
    path = EXAMPLES / "accelerate_loop.py"
    spec = importlib.util.spec_from_file_location("accelerate_loop", path)
    with pytest.raises(
        ImportError, match=r"accelerate, .*pip install '\./privdistill\[accelerate\]'"
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("package", ["lightning", "monai", "ignite", "nnunetv2"])
def test_what_integrations_share_needs_none_of_them(without, package):
    without(package)
    importlib.import_module("privdistill.integrations.batch")
