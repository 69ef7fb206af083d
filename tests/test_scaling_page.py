"""docs/performance/scaling.md: its tables are what the measured numbers give."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COSTS = runpy.run_path(str(ROOT / "benchmarks" / "cost_table.py"))


def test_the_tables_of_the_page_are_made_from_the_measured_numbers():
    page = (ROOT / "docs" / "performance" / "scaling.md").read_text(encoding="utf-8")
    for table in COSTS["tables"]():
        assert table in page, f"python benchmarks/cost_table.py gives\n{table}"


def test_a_teacher_cache_entry_is_logits_and_bottleneck():
    # 30 subjects: 17 in training under 8 flips, 3 in validation
    assert COSTS["teacher_cache"]("paper", 30)[0] == "139"
    # (4 x 64^3 + 480 x 4^3) x 4 bytes = 4,317,184; 1,000 subjects: 567 x 8 + 100 = 4,636 entries
    assert COSTS["teacher_cache"]("paper", 1000) == ["4,636", "20.0 GB", "10.0 GB"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(90, "90 s"), (150, "2.5 min"), (9000, "2.5 h"), (3e8, "9.5 years")]
)
def test_durations_have_the_unit_that_fits(seconds, text):
    assert COSTS["duration"](seconds) == text
