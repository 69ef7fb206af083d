"""The page of a cross-validation that is invented here: no number in it comes from a training."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from invented_runs import invented_scores, write_crossval
from kdnet.data.description import load_description
from kdnet.errors import UserError
from kdnet.evaluation.scoring import read_scores, write_scores
from page_links import read_links
from report import write_report

ROWS = ("teacher", "baseline", "gt_kl", "kdnet")


@pytest.fixture(scope="module")
def crossval(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "crossval"
    return write_crossval(root, load_description("phantom"), ROWS, seeds=(0, 1))


@pytest.fixture(scope="module")
def page(crossval):
    return write_report(crossval).read_text(encoding="utf-8")


@pytest.fixture
def copy(crossval, tmp_path):
    """A folder to change, without slices and images, so that pages are made quickly."""
    ignored = shutil.ignore_patterns("slices.npz", "predictions", "*.safetensors")
    return shutil.copytree(crossval, tmp_path / "crossval", ignore=ignored)


def text_of(page):
    return re.sub(r"\s+", " ", " ".join(read_links(page).texts))


def test_page_loads_nothing_and_has_every_identifier_once(page):
    links = read_links(page)
    assert [s for s in links.found if not s.startswith(("data:image/png", "#"))] == []
    assert len(links.identifiers) == len(set(links.identifiers))


def test_page_says_what_was_run(page):
    text = text_of(page)
    assert "4 networks on phantoms: 3 folds, 2 seeds (0, 1), 12 held-out cases" in text
    assert "Protocol: phantom, 12 cases, 3 folds, 3 epochs" in text
    assert "<strong>PHANTOM</strong>" in page
    assert "6 of 6, 1 min 1 s each" in text
    assert "Of several seeds, the label maps of the first are shown." in text


def test_outcome_and_charts_are_those_of_kdnet_over_the_baseline(page):
    text = text_of(page)
    assert "Dice of KD-Net (GT+KL+KD) minus Dice of baseline" in text
    assert "KD-Net (GT+KL+KD) is better than baseline" in text
    assert 'aria-label="WT: Dice per case, baseline to kdnet; 12 of 12 gain, 0 lose"' in page


def test_every_network_is_shown_and_compared_with_the_baseline(page):
    text = text_of(page)
    for row in ("teacher", "gt_kl", "KD-Net (GT+KL+KD)"):
        assert f"{row} \N{MINUS SIGN} baseline" in text, row


def test_pictures_compare_without_help_with_it_and_the_teacher(page):
    pictures = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]+)"', page)
    shown = [text.split(": ")[1].removesuffix(" (phantom)") for text in pictures[:5]]
    assert shown == ["t1ce", "reference", "baseline", "kdnet", "teacher"]
    (_, data), _ = read_links(page).scripts
    assert [name for name, _ in json.loads(data)[0]["labels"]][-1] == "gt_kl"


def test_tables_of_the_paper_stand_beside_the_published_numbers(page):
    text = text_of(page)
    assert text.index("Table 1, comparison, training grid") < text.index("tables in native space")
    assert "Table 2, ablation, training grid" in text
    assert "71.67 ± 1.22" in text
    assert "not run" in text
    assert "ours: phantom, 12 cases, 3 folds, 3 epochs." in text
    assert "BraTS 2018, T1ce alone, published numbers" in text


def test_parts_that_were_not_run_are_left_out(copy):
    scores = [s for s in read_scores(copy / "scores.csv") if s.role == "baseline"]
    write_scores(copy / "scores.csv", [score for score in scores if score.space == "native"])
    text = text_of(write_report(copy).read_text(encoding="utf-8"))
    assert "There is no gain to report" in text
    assert "The label maps were not kept, so there is no figure." in text
    for absent in ("Paired gains", "Subsets of modalities", "Training grid,", "small regions"):
        assert absent not in text, absent


def test_regions_of_other_data_sets_have_no_published_numbers(copy):
    scores = read_scores(copy / "scores.csv")
    write_scores(copy / "scores.csv", [replace(s, region="lesion") for s in scores[::3]])
    text = text_of(write_report(copy).read_text(encoding="utf-8"))
    assert "Beside the published numbers" not in text


def test_post_processing_and_subsets_are_shown_where_they_were_scored(copy):
    scores = read_scores(copy / "scores.csv")
    treated = [replace(s, postprocessing="on") for s in scores if s.space == "native"]
    write_scores(copy / "scores.csv", scores + treated)
    subsets = [
        replace(score, modalities=seen)
        for seen in ("t1ce", "flair+t1ce")
        for score in invented_scores(rows=("hemis",))
    ]
    write_scores(copy / "subsets.csv", subsets)
    text = text_of(write_report(copy).read_text(encoding="utf-8"))
    assert "Native space, small regions removed" in text
    assert "hemis, ET" in text
    assert "mean of 15" in text


def test_names_are_escaped(copy):
    facts = json.loads((copy / "crossval.json").read_text())
    facts["labels"]["kdnet"] = "<script>alert(1)</script>"
    facts["protocol"] = "<img src=http://x>"
    (copy / "crossval.json").write_text(json.dumps(facts))
    page = write_report(copy).read_text(encoding="utf-8")
    assert read_links(page).scripts == []
    assert "http://x" not in " ".join(read_links(page).found)
    assert "&lt;script&gt;alert(1)" in page


def test_folder_without_scores_is_explained(copy):
    (copy / "scores.csv").unlink()
    with pytest.raises(UserError, match="expected the scores of a run"):
        write_report(copy)


def test_damaged_crossval_file_is_explained(copy):
    (copy / "crossval.json").write_text('{"folds": 3}')
    with pytest.raises(UserError, match="expected the keys rows, folds and seeds, found no rows"):
        write_report(copy)
