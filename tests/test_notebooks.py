"""Notebooks run from top to bottom and are stored with their outputs."""

import json
import re
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def printed(path):
    streams = [o for cell in cells(path) for o in cell["outputs"] if o["output_type"] == "stream"]
    return "".join("".join(o["text"]) for o in streams)


@pytest.fixture
def _undisturbed(monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot", reason="the extra brats is not installed")
    pytest.importorskip("timm", reason="the extra brats is not installed")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    backend, threads = plt.get_backend(), torch.get_num_threads()
    plt.switch_backend("Agg")
    yield
    plt.close("all")
    plt.switch_backend(backend)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_was_run_in_order(path):
    assert [cell["execution_count"] for cell in cells(path)] == list(range(1, len(cells(path)) + 1))
    kinds = {output["output_type"] for cell in cells(path) for output in cell["outputs"]}
    assert "display_data" in kinds
    assert "error" not in kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_names_a_machine(path):
    assert re.search(r"/(home|root|tmp|work|Users)/", path.read_text(encoding="utf-8")) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")  # timm compiles functions of its own
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
# What torch.Tensor and numpy 2 think of each other where matplotlib is given tensors.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.usefixtures("_undisturbed")
def test_the_rgbd_notebook_runs_and_the_teacher_leads():
    path = FOLDER / "rgbd.ipynb"
    namespace = {"__name__": "__main__"}
    for cell in cells(path):
        exec(compile("".join(cell["source"]), str(path), "exec"), namespace)
    scores = {
        name: namespace["overlap"](prediction)
        for name, prediction in namespace["predictions"].items()
    }
    assert scores["teacher"] > scores["baseline"]
