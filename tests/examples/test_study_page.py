"""One command writes tables and figures of all studies of a folder."""

import random
import shutil

import pytest

from invented_runs import invented_study, write_invented_study
from kdnet.errors import UserError
from kdnet.studies.page import find_studies, write_study
from kdnet.studies.trials import Trial, search_folder, write_trials
from report import main, write_reports

FIGURES = ("headline", "dice", "gain-by-labelled", "gain-by-unlabelled", "gain-by-lead")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_invented_study(
        tmp_path_factory.mktemp("study") / "a", commands=["python x.py"], phantom=True
    )
    return write_study(folder, resamples=200)


def test_tables_and_figures_lie_beside_the_rows(page):
    names = {path.name for path in page.parent.iterdir()}
    figures = {f"{name}.{ending}" for name in FIGURES for ending in ("png", "svg")}
    assert names == {"rows.csv", "study.json", "tables.md"} | figures


def test_page_states_data_outcome_figures_and_commands(page):
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# invented\n\n**PHANTOM: synthetic subjects")
    assert "\nData: Nothing. Invented numbers, two folds.\n" in text
    assert "- 8 labelled + 12 unlabelled, tumour: chosen recipe gains +0.1" in text
    assert "over the baseline with most labels" in text
    assert all(f"]({name}.png)" in text for name in FIGURES)
    assert "```bash\npython x.py\n```" in text
    assert "training grid" in text
    assert str(page.parent) not in text
    assert "missing" not in text


def test_trials_of_searches_are_listed(page, tmp_path):
    for name in ("rows.csv", "study.json"):
        shutil.copy(page.parent / name, tmp_path)
    searched = search_folder(tmp_path, "few")
    searched.mkdir()
    (searched / "search.json").write_text('{"labelled": 8, "seeds": [0], "folds": [0]}')
    write_trials(searched, [Trial(0, {"imitation": 0.5}, 0.25, 0.125)])
    text = write_study(tmp_path, resamples=200).read_text(encoding="utf-8")
    assert "**Trials of the search few, training grid**" in text
    assert "| imitation 0.5 | 0 | 0.250 | +12.5 |" in text


def test_rows_in_any_order_give_the_same_files_in_any_folder(page, tmp_path):
    header, *lines = (page.parent / "rows.csv").read_text().splitlines()
    random.Random(0).shuffle(lines)
    (tmp_path / "rows.csv").write_text("\n".join([header, *lines]) + "\n")
    shutil.copy(page.parent / "study.json", tmp_path)
    other = write_study(tmp_path, tmp_path / "new" / "place", resamples=200)
    assert other == tmp_path / "new" / "place" / "tables.md"
    for path in other.parent.iterdir():
        assert (page.parent / path.name).read_bytes() == path.read_bytes(), path.name


def test_place_that_cannot_be_written_is_explained(page, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_study(page.parent, tmp_path / "file", resamples=200)


def test_missing_pairs_and_figures_are_named_and_old_figures_go(page, tmp_path):
    (tmp_path / "headline.png").touch()
    rows = [
        row for row in invented_study({"soft": 0.1}) if row.place[:2] != ("8-of-20_baseline", 1)
    ]
    text = write_study(write_invented_study(tmp_path, rows), resamples=200).read_text()
    assert "- 8-of-20_soft, fold 1, seed 0: no baseline with 8 labelled subjects" in text
    assert text.count("8-of-20_soft, fold 1, seed 0") == 1
    assert "No figure headline: no row of the chosen recipe is stored." in text
    assert not (tmp_path / "headline.png").exists()


def test_command_writes_every_study_below_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kdnet.studies.page.draw_all", lambda analysis: [])
    rows = invented_study(labelled=(8,), cases=6, seeds=(0,))
    for name in ("b", "a/deep"):
        write_invented_study(tmp_path / name, rows)
    write_invented_study(tmp_path / "begun", rows)
    (tmp_path / "begun" / "rows.csv").unlink()
    assert find_studies(tmp_path) == [tmp_path / "a/deep", tmp_path / "b"]
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "a/deep/tables.md"),
        str(tmp_path / "b/tables.md"),
    ]


def test_study_that_is_a_cross_validation_too_is_reported_as_a_study(tmp_path, monkeypatch):
    monkeypatch.setattr("kdnet.studies.page.draw_all", lambda analysis: [])
    write_invented_study(tmp_path, invented_study(labelled=(8,), cases=6, seeds=(0,)))
    for name in ("crossval.json", "config.yaml"):
        (tmp_path / name).write_text("{}")
    assert write_reports(tmp_path) == [tmp_path / "tables.md"]


def test_study_without_rows_is_explained(tmp_path, capsys):
    write_invented_study(tmp_path)
    (tmp_path / "rows.csv").unlink()
    assert main([str(tmp_path)]) == 2
    assert "expected rows.csv beside study.json, found none" in capsys.readouterr().err


def test_folder_of_nothing_names_all_that_fits(tmp_path):
    with pytest.raises(UserError, match=r"nor rows.csv with study.json in it or below it"):
        write_reports(tmp_path)
