"""The benchmark suite runs, and its page agrees with its files. No timing decides a test."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

import page
import run
from application import plain_objective
from contest import Interval
from draw import draw
from figures import FIGURES, Row
from kdnet.config import ObjectiveConfig
from kdnet.recipes.kdnet import student_objective
from privdistill import Step, TapPair

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance" / "index.md"
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_a_figure_runs_and_is_saved(tmp_path, capsys):
    run.main(["--quick", "--only", "wrapper", "--threads", "1", "--results", str(tmp_path)])
    saved = json.loads((tmp_path / "wrapper.json").read_text())
    first = saved["rows"][0]
    assert first["unit"] == "us"
    assert first["low"] <= first["value"] <= first["high"]
    assert "The wrapper" in capsys.readouterr().out


@pytest.mark.usefixtures("_threads")
def test_figures_that_are_there_are_not_made_again(tmp_path):
    for name in FIGURES:
        (tmp_path / f"{name}.json").write_text("{}")
    run.main(["--missing", "--threads", "1", "--results", str(tmp_path)])
    assert {path.read_text() for path in tmp_path.iterdir()} == {"{}"}


def test_the_plain_objective_is_that_of_the_application():
    options = ObjectiveConfig()
    student, teacher = torch.randn(2, 2, 4, 6, 6, 6)
    z_student, z_teacher = torch.randn(2, 2, 8, 3, 3, 3)
    classes = torch.randint(0, 4, (2, 6, 6, 6))
    target = torch.nn.functional.one_hot(classes, 4).movedim(-1, 1).float()
    step = Step(student, teacher, target=target, taps={"bottleneck": TapPair(z_student, z_teacher)})
    wanted, _ = student_objective(options)(step)
    found = plain_objective(student, teacher, target, (z_teacher, z_student), options)
    torch.testing.assert_close(found, wanted)


def test_the_page_is_what_the_files_say():
    text = PAGE.read_text(encoding="utf-8")
    made = page.render(text, RESULTS)
    if os.environ.get("PRIVDISTILL_WRITE_PAGES"):
        PAGE.write_text(made, encoding="utf-8")
    else:
        assert text == made, "PRIVDISTILL_WRITE_PAGES=1 pytest tests/benchmarks/test_run.py"


def test_every_figure_has_its_place_on_the_page():
    assert [name for _, name, _ in page.TABLE.findall(PAGE.read_text())] == list(FIGURES)


def test_a_row_shows_number_interval_and_goal():
    row = Row("a / b", Interval(1.0034, 0.9981, 1.0088), goal=1.01)
    assert page.cells(row) == "| a / b | 1.003 | 0.998 to 1.009 | ≤ 1.01 |"
    row = Row("memory", Interval(386.2, 386.2, 386.2), "MiB")
    assert page.cells(row) == "| memory | 386 MiB |  |  |"


def test_the_drawing_takes_whatever_was_measured(tmp_path):
    row = {"what": "a / b", "value": 1.0, "low": 0.9, "high": 1.1, "unit": "ratio", "goal": 1.05}
    rows = [row, row | {"unit": "us", "goal": None}, row | {"unit": "MiB"}]
    (tmp_path / "cache.json").write_text(json.dumps({"rows": rows}))
    draw(tmp_path, tmp_path / "new" / "drawing.png")
    assert (tmp_path / "new" / "drawing.png").stat().st_size > 1000


def test_files_name_no_place_of_a_machine():
    for file in RESULTS.glob("*.json"):
        assert not re.search(r"/(home|tmp|root|Users|work)/", file.read_text())
