"""The page of a folder that is invented here: no number in it comes from a training."""

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace

import pandas as pd
import pytest

import report
from invented_runs import invented_scores, write_plan
from kdnet.data.description import load_description
from kdnet.evaluation.scoring import read_scores, write_scores
from kdnet.results.figures import learning_curves
from kdnet.results.page import write_report
from page_links import read_links

ROWS = ("teacher", "baseline", "gt_kl", "kdnet")
NOTE = {"note": "<script>alert(1)</script>"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "run"
    return write_plan(root, load_description("phantom"), config=NOTE)


@pytest.fixture(scope="module")
def crossval(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "crossval"
    description = load_description("phantom")
    return write_plan(root, description, ROWS, folds=2, cases=4, kind="crossval")


@pytest.fixture(scope="module")
def run_page(run):
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def crossval_page(crossval):
    return write_report(crossval).read_text(encoding="utf-8")


@pytest.fixture(params=["run", "crossval"])
def page(request):
    return request.getfixturevalue(f"{request.param}_page")


@pytest.fixture
def copy(crossval, tmp_path):
    """A folder to change, without slices, images and curves, so that pages are made quickly."""
    ignored = shutil.ignore_patterns("slices.json", "predictions", "*.safetensors", "history.csv")
    return shutil.copytree(crossval, tmp_path / "crossval", ignore=ignored)


def text_of(page):
    return re.sub(r"\s+", " ", " ".join(read_links(page).texts))


def test_page_loads_nothing_and_has_every_identifier_once(page):
    links = read_links(page)
    assert [s for s in links.found if not s.startswith(("data:image/png", "#"))] == []
    assert len(links.identifiers) == len(set(links.identifiers))
    assert re.findall(r"url\((?!#)", page) == []
    assert "default-src 'none'" in page
    assert "@import" not in page
    (kind, _), (_, script) = links.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert kind == "application/json"
    assert f"script-src 'sha256-{digest}'" in page  # the only one that a browser may run


def test_phantom_is_shown_large_and_with_every_section(page):
    assert "<strong>PHANTOM</strong>" in page
    headings = re.findall(r"<h[23]>(.*?)</h[23]>", page)
    untagged = [heading for heading in headings if "phantom" not in heading]
    assert untagged == ["Run"]
    assert "(phantom)</title>" in page


def test_real_data_are_not_called_phantoms(tmp_path):
    description = replace(load_description("brats2021"), name="Invented", citation="A. Author")
    root = write_plan(tmp_path / "run", description, cases=2)
    page = write_report(root).read_text(encoding="utf-8")
    assert "phantom" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower()
    assert "cites: A. Author" in page
    assert "PHANTOM" not in (root / "tables.md").read_text(encoding="utf-8")


def test_a_page_is_the_same_when_made_again(run, run_page):
    assert write_report(run).read_text(encoding="utf-8") == run_page


def test_page_states_both_conventions_counts_settings_cases_and_times(run_page):
    text = text_of(run_page)
    for wanted in (
        *("Dice, reference present (n)", "cases with the region in the reference", "1 of 8"),
        *("predicted all the same", "373.13 mm", "4.0 ± 0.0 mm", "temperature", '"torch": "2.x"'),
        *("Case_b", "1234", "<script>alert(1)"),
    ):
        assert wanted in text, wanted


def test_what_a_diagnosis_found_is_shown_as_it_is(copy, crossval_page):
    assert "Diagnosis" not in crossval_page
    unit = copy / "units" / "kdnet"
    (unit / "fold0-seed0" / "diagnosis.md").write_text("| term | share |\n<b>KL</b> 0.3")
    page = write_report(copy).read_text(encoding="utf-8")
    assert (
        "<summary>kdnet/fold0-seed0</summary><pre>| term | share |\n&lt;b&gt;KL&lt;/b&gt; 0.3"
        in page
    )


def test_outcome_and_charts_are_those_of_kdnet_over_the_baseline(crossval_page):
    text = text_of(crossval_page)
    assert "4 networks on phantoms, 8 held-out cases" in text
    assert "Protocol: phantom, 8 cases, 2 folds, 3 epochs" in text
    assert "Options of their own: gt_kl: imitation 0.0." in text
    assert "KD-Net (GT+KL+KD) is better than baseline" in text
    labels = re.findall(r'aria-label="([^"]+)"', crossval_page)
    assert sum("gain in Dice of every case" in label for label in labels) == 3
    assert any(label.startswith("WT: ") and "8 of 8 gain" in label for label in labels)
    for row in ("gt_kl", "KD-Net (GT+KL+KD)"):
        assert f"{row} \N{MINUS SIGN} baseline" in text, row
    for table in ("Table 1 of the paper, training grid", "Table 2 of the paper"):
        assert table in text


def test_pictures_compare_without_help_with_it_and_the_teacher(crossval_page):
    pictures = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]+)"', crossval_page)
    assert len(pictures) == 3 * 8  # three cases, four modalities and four label maps
    shown = [text.split(": ")[1].removesuffix(" (phantom)") for text in pictures[4:8]]
    order = ["reference", "baseline", "KD-Net (GT+KL+KD)", "teacher"]
    assert shown == order
    data = json.loads(read_links(crossval_page).scripts[0][1])
    assert [name for name, _ in data[0]["labels"]] == [*order, "gt_kl"]


def test_parts_that_were_not_run_are_left_out(copy):
    scores = read_scores(copy / "scores.csv")
    plain = scores[(scores["row"] == "baseline") & (scores["space"] == "native")]
    write_scores(copy / "scores.csv", plain[plain["region"] == "WT"].assign(region="lesion"))
    text = text_of(write_report(copy).read_text(encoding="utf-8"))
    assert "There is no gain to report" in text
    assert "The label maps were not kept, so there is no figure." in text
    for absent in ("Paired gains", "Subsets", "On the training grid", "With small", "published"):
        assert absent not in text, absent
    shutil.rmtree(copy / "units")
    for name in ("config.yaml", "environment.json", "folds.json", "description.json"):
        (copy / name).unlink()
    assert "No history was kept" in text_of(write_report(copy).read_text(encoding="utf-8"))


def test_post_processing_and_subsets_are_shown_where_they_were_scored(copy):
    scores = read_scores(copy / "scores.csv")
    native = scores[scores["space"] == "native"].assign(postprocessing="on")
    write_scores(copy / "scores.csv", pd.concat([scores, native]))
    subsets = invented_scores(rows=("hemis",), modalities="flair+t1ce")
    write_scores(copy / "subsets.csv", subsets)
    text = text_of(write_report(copy).read_text(encoding="utf-8"))
    assert "small regions removed" in text
    assert "hemis, ET" in text
    assert "mean of 15" in text
    assert "hemis, ET" in (copy / "tables.md").read_text(encoding="utf-8")


def test_folder_of_no_run_or_without_scores_is_refused(copy, tmp_path, refusal):
    (tmp_path / "empty").mkdir()
    assert "plan.json" in refusal(report, tmp_path / "empty")
    (copy / "scores.csv").unlink()
    assert "scores.csv" in refusal(report, copy)
    assert not [*(tmp_path / "empty").iterdir()]


def test_the_curve_of_a_single_epoch_shows_as_a_point():
    (chart,) = learning_curves({"baseline": [{"train_loss": 1.4}]}, {"baseline": "#123456"})
    assert "fill: #123456" in chart
    (chart,) = learning_curves({"baseline": [{"train_loss": 1.4}] * 2}, {"baseline": "#123456"})
    assert "fill: #123456" not in chart
