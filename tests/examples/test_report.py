"""The report of a run folder that is invented here: no number in it comes from a training."""

import base64
import hashlib
import re
from dataclasses import replace

import pytest

from invented_runs import write_run
from kdnet.data.description import load_description
from kdnet.errors import UserError
from page_links import read_links
from report import main, write_report


@pytest.fixture(scope="module")
def phantom_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "run"
    return write_run(folder, load_description("phantom"), {"note": "<script>alert(1)</script>"})


@pytest.fixture(scope="module")
def page(phantom_run):
    return write_report(phantom_run).read_text(encoding="utf-8")


def test_page_loads_nothing(page):
    loaded = [
        link for link in read_links(page).found if not link.startswith(("data:image/png", "#"))
    ]
    assert loaded == []
    assert re.findall(r"url\((?!#)", page) == []
    assert "default-src 'none'" in page
    assert "@import" not in page


def test_identifiers_are_unique(page):
    identifiers = read_links(page).identifiers
    assert len(identifiers) == len(set(identifiers))


def test_phantom_is_shown_large_and_with_every_section(page):
    assert "<strong>PHANTOM</strong>" in page
    assert page.count('<span class="tag">phantom</span>') == 8
    assert "(phantom)</title>" in page


def test_real_data_are_not_called_phantoms(tmp_path):
    description = replace(load_description("brats2021"), name="Invented", citation="A. Author")
    page = write_report(write_run(tmp_path / "run", description)).read_text(encoding="utf-8")
    assert "phantom" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower()
    assert "cites: A. Author" in page


def test_text_from_the_run_is_escaped(page):
    kinds = [kind for kind, _ in read_links(page).scripts]
    assert kinds == ["application/json", "text/javascript"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_browser_is_told_the_only_script_it_may_run(page):
    _, (_, script) = read_links(page).scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_page_states_both_conventions_and_counts(page):
    assert "Dice, all cases" in page
    assert "Dice, cases with the region in the reference" in page
    assert "1 of 8" in page
    assert "1 predicted all the same, 0 missed" in page
    assert "HD95 [mm]" in page
    assert "373.13 mm" in page


def test_page_holds_settings_cases_times_and_memory(page):
    for text in ("temperature", "versions: torch", "Case_b", "train: 2", "1 min 1 s", "1,234 MiB"):
        assert text in page, text


def test_strip_shows_what_the_student_sees_the_reference_and_the_networks(page):
    pictures = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]+)"', page)
    assert len(pictures) == 3 * 8  # three cases, five tiles and three modalities to unfold
    shown = [text.split(": ")[1] for text in pictures[:8]]
    strip = ["t1ce", "reference", "baseline", "student", "teacher"]
    assert shown == [f"{name} (phantom)" for name in [*strip, "flair", "t1", "t2"]]


def test_gain_charts_are_drawn_per_region(page):
    labels = re.findall(r'aria-label="([^"]+)"', page)
    assert "TC: Dice per case, baseline to student; 8 of 8 gain, 0 lose" in labels
    assert sum("gain in Dice of every case" in label for label in labels) == 3


def test_report_is_the_same_when_made_again(phantom_run, page):
    assert write_report(phantom_run).read_text(encoding="utf-8") == page


def test_report_without_slices_history_and_summary(phantom_run, tmp_path):
    for name in ("config.yaml", "scores.csv"):
        (tmp_path / name).write_text((phantom_run / name).read_text())
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "there is no figure" in page
    assert "No history was kept" in page


def test_folder_of_no_run_is_status_two(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "found neither config.yaml nor crossval.json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_run_without_scores_is_explained(tmp_path):
    (tmp_path / "config.yaml").write_text("fold: 0\n")
    with pytest.raises(UserError, match="expected the scores of a run"):
        write_report(tmp_path)
