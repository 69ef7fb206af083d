"""The table of steps on a GPU is that of the file, and the default follows from it."""

import json
from pathlib import Path

import gpu

ROOT = Path(__file__).parents[2]
FOUND = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text())
PRECISIONS = ("32-true", "bf16-mixed")


def test_the_page_says_what_the_file_says():
    page = (ROOT / "docs" / "performance" / "index.md").read_text()
    for name in FOUND["milliseconds"]["32-true"]:
        single, half = (FOUND["milliseconds"][precision][name] for precision in PRECISIONS)
        assert f"| {name} | {single:.2f} | {half:.2f} |" in page


def test_every_step_can_be_taken(monkeypatch):
    for name, value in {"WIDTHS": (2, 4), "SIZE": 8, "ROUNDS": 1}.items():
        monkeypatch.setattr(gpu, name, value)
    assert [*gpu.measure(None, "cpu")] == [*FOUND["milliseconds"]["32-true"]]


def test_a_cache_saves_a_tenth_of_a_step_at_most_and_filling_it_costs_more():
    # What --teacher-cache auto rests on.
    for precision in PRECISIONS:
        times = FOUND["milliseconds"][precision]
        assert times["served from disk"] > 0.9 * times["the library's terms"]
        assert times["kept on disk"] > 1.4 * times["the library's terms"]
