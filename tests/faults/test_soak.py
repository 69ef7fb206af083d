"""A long training keeps nothing that it should give back."""

import json
from pathlib import Path

import numpy as np
import pytest

from faults.soak import BLOCKS, slope, soak

ROOT = Path(__file__).parents[2]


def test_the_slope_of_a_line_is_found_with_an_interval_around_it():
    steps = np.arange(2000)
    noise = np.random.default_rng(0).normal(size=2000)
    middle, low, high = slope(3 + 0.002 * steps + noise, steps)
    assert low < 2 < high
    assert middle == pytest.approx(2, abs=0.3)
    assert high - low < 0.5
    assert slope(np.ones(BLOCKS), np.arange(BLOCKS)) == [0, 0, 0]


def test_a_short_training_opens_no_file_and_adds_no_hook(tmp_path):
    found = soak(tmp_path, steps=60, warm_up=20)
    assert found["open_files"][0] == found["open_files"][1]
    assert found["hooks"][0] == found["hooks"][1] > 0
    assert found["threads"][0] == found["threads"][1]


@pytest.mark.faults
def test_2000_steps_are_flat_in_memory_open_files_hooks_and_threads(tmp_path):
    found = soak(tmp_path)
    _, _, high = found["memory_mib_per_1000_steps"]
    # What grows is the history: fifty rows in a thousand steps of this training.
    assert high < 1.0
    assert found["open_files"][0] == found["open_files"][1]
    assert found["hooks"][0] == found["hooks"][1]
    assert found["threads"][0] == found["threads"][1]


def test_the_page_shows_the_numbers_that_were_measured():
    page = " ".join((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").split())
    found = json.loads((ROOT / "docs" / "soak.json").read_text(encoding="utf-8"))
    middle, low, high = found["memory_mib_per_1000_steps"]
    assert f"{middle:.2f} MiB per 1,000 steps (95 % interval {low:.2f} to {high:.2f})" in page
    assert f"{found['open_files'][0]} open files" in page
    assert f"{found['hooks'][0]} hooks" in page
