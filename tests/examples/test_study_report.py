"""What a study's published rows become: tables, figures, and sentences that say no more."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from invented_runs import invented_study, write_study
from kdnet.errors import UserError
from kdnet.results.figures import study_pictures
from kdnet.results.page import write_report, write_reports
from kdnet.results.stored import read_folder
from kdnet.results.study_tables import Study, outcomes, study_tables, trials_table, unpaired

DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


@pytest.fixture
def study(tmp_path):
    """Reads the invented rows as a study."""

    def read(rows=None, **changes):
        return Study(read_folder(write_study(tmp_path / "study", rows, **changes)), "native")

    return read


def table_of(study, start):
    (found,) = [table for table in study_tables(study) if table.title.startswith(start)]
    return found.frame


@pytest.mark.parametrize("gain", [-0.1, 0.0, 0.15])
def test_known_gain_lies_in_its_interval(study, gain):
    for one in study(invented_study({"chosen": gain}, cases=40)).gains:
        assert one.interval.lower < gain < one.interval.upper
        assert (one.p_holm < 0.05) == (gain != 0)


def test_few_labels_are_compared_with_most(study):
    (one,) = study().over_most
    assert (one.row, one.against) == ("8-of-20_chosen", "20-of-20_baseline")
    # 0.1 of the recipe less 0.005 for each of the 12 labels.
    assert one.mean == pytest.approx(0.04, abs=0.01)


def test_lines_hold_cases_units_and_steps(study):
    rows = invented_study()
    rows = rows[~((rows["kind"] == "chosen") & (rows["fold"] == 1) & (rows["seed"] == 1))]
    found = study(rows)
    first = table_of(found, "Gain in Dice over the baseline with as many labels").iloc[0]
    assert first["trained on"] == "8 labelled + 12 unlabelled"
    assert first["better / worse"].split(" / ")[0] == "20"
    assert first.iloc[-4:].tolist() == [f"3 of 2 {TIMES} 2", "30", "20", f"{TIMES} 2.50"]
    units = table_of(found, "Gain in Dice per fold and seed")
    assert units["seed 1"].tolist()[1] == DASH
    assert unpaired(found) == []
    rows.loc[rows["fold"] == 1, "labelled"] += 1
    found = study(rows)
    assert found.setting("8-of-20_chosen") == "8 to 9 labelled + 12 unlabelled"
    assert found.subjects("8-of-20_chosen") == (8.5, 12.0)


def test_what_has_no_partner_is_named(study):
    rows = invented_study()
    place = rows["row"] + rows["fold"].astype(str) + rows["seed"].astype(str)
    gone = (place == "8-of-20_baseline10") | (
        (place == "8-of-20_baseline01") & (rows["case"] == "Case_02")
    )
    found = study(rows[~gone])
    one, unit = unpaired(found)
    assert one.startswith("8-of-20_chosen, fold 0, seed 1: 1 cases have no Dice of tumour")
    assert one.endswith("such as Case_02.")
    assert unit.startswith("8-of-20_chosen, fold 1, seed 0: 10 cases")
    assert (1, 0) not in found.gains[0].cells.columns


def of_share(study, share, noise=0.0, cases=24, **options):
    """A student that gains a share of the lead, which grows from case to case."""
    rows = invented_study(cases=cases, labelled=(8,), **options)
    generator = np.random.default_rng(1)
    ahead = 0.24 / cases * rows["case"].str[-2:].astype(int)
    factor = rows["kind"].map({"baseline": 0.0, "chosen": share, "teacher": 1.0})
    return study(rows.assign(dice=0.1 + factor * ahead + generator.uniform(0, noise, len(rows))))


def test_slope_is_the_share_of_the_lead_that_is_gained(study):
    found = of_share(study, 0.4)
    line = table_of(found, "Gain against the teacher's lead").iloc[0]
    assert line.iloc[3:].tolist() == ["+0.115", "+0.046", *["0.40 (0.40 to 0.40)"] * 2, "24"]
    quarters = table_of(found, "Gain in Dice per quarter")
    assert quarters["lead"].tolist()[::3] == ["0.000 to +0.050", "+0.180 to +0.230"]
    assert quarters["gain"].tolist() == ["+0.010", "+0.034", "+0.058", "+0.082"]
    assert set(quarters["cases"]) == {"6"}
    alone = table_of(of_share(study, 0.4, seeds=(0,)), "Gain against").iloc[0]
    assert alone.iloc[6] == f"{DASH} (none)"  # there is no other seed
    rows = invented_study(labelled=(8,))
    assert study(rows[rows["kind"] != "teacher"]).leads == {}


def test_luck_of_the_shared_baseline_raises_the_slope_but_not_that_of_other_seeds(study):
    found = of_share(study, 0.0, noise=0.3, cases=80)
    line = table_of(found, "Gain against the teacher's lead").iloc[0]
    own, others = (
        float(line.iloc[place].split()[0].replace("\N{MINUS SIGN}", "-")) for place in (5, 6)
    )
    assert own > others + 0.05


def test_outcome_is_that_of_the_chosen_recipe_where_there_is_one(study, tmp_path):
    rows = invented_study({"chosen": 0.1, "paper": 0.0})
    assert all("chosen recipe gains" in sentence for sentence in outcomes(study(rows)))
    (sentence, *_) = outcomes(study(rows, chosen=["8-of-20_paper"]))
    assert sentence.startswith("8 labelled + 12 unlabelled, tumour: paper gains")
    without = study(rows, chosen=[])
    assert outcomes(without) == []
    assert "Chosen" not in write_report(without.results.root).read_text(encoding="utf-8")


def test_figures_show_the_numbers_of_the_tables(study):
    found = study(invented_study({"chosen": 0.1, "paper": -0.1}))
    headline, labelled = study_pictures(found)
    shown = {text.get_text() for axes in headline.figure.axes for text in axes.texts}
    lines = [line for _, line in table_of(found, "Dice").iterrows() if line["network"] != "paper"]
    assert {line["Dice"].split()[0] for line in lines} <= shown
    (axes,) = labelled.figure.axes
    heights = [
        float(value) for line in axes.lines if len(line.get_xdata()) for value in line.get_ydata()
    ]
    for gain in found.gains:
        assert any(math.isclose(height, gain.mean) for height in heights), gain.row
    assert "&lt;" not in str(labelled.svg)
    assert all(
        picture.title.startswith(found.results.facts.title) for picture in (headline, labelled)
    )


@pytest.mark.parametrize(("labelled", "there"), [((8, 20), False), ((4, 8, 20), True)])
def test_one_number_of_unlabelled_subjects_is_no_figure(study, labelled, there):
    names = [picture.name for picture in study_pictures(study(invented_study(labelled=labelled)))]
    assert ("gain-by-unlabelled" in names) == there


def test_with_one_number_of_labels_gains_stand_beside_the_recipes(study):
    found = study(invented_study({"chosen": 0.1, "paper": -0.1}, labelled=(8,)))
    _, picture = study_pictures(found)
    (axes,) = picture.figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    drawn = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
    assert picture.name == "gains"
    assert names == [found.results.label(gain.row) for gain in found.gains]
    assert drawn == pytest.approx([gain.mean for gain in found.gains])


def test_names_of_several_lines_stand_apart(study):
    names = {kind: f"{kind} of so many words that it takes lines" for kind in ("chosen", "teacher")}
    figure = study_pictures(study(labels=names))[0].figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    labels = figure.axes[0].get_yticklabels()
    assert any("\n" in label.get_text() for label in labels)
    boxes = [label.get_window_extent(renderer) for label in labels]
    assert all(lower.y1 < upper.y0 for upper, lower in pairwise(boxes))


def test_figures_of_nothing_are_not_there(study):
    rows = invented_study(labelled=(8,))
    pictures = study_pictures(study(rows[rows["kind"] != "chosen"]))
    assert [picture.name for picture in pictures] == ["headline"]


def test_report_of_every_study_below_a_folder_is_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        write_study(tmp_path / name, phantom=name == "a", commands=["study.py --study x"])
    first, second = write_reports(tmp_path)
    kept = {path.name: path.read_bytes() for path in first.parent.iterdir()}
    write_reports(tmp_path / "a")
    assert {path.name: path.read_bytes() for path in first.parent.iterdir()} == kept
    assert {"tables.md", "headline.png", "gain-by-labelled.png"} <= {*kept}
    text = first.read_text(encoding="utf-8")
    assert "PHANTOM" in text
    assert "study.py --study x" in text
    assert "PHANTOM" not in second.read_text(encoding="utf-8")


def test_trials_are_shown_and_damage_is_named(tmp_path):
    folder = tmp_path / "search-few"
    folder.mkdir()
    settings = {"labelled": 15, "seeds": [0, 1], "folds": [0], "options": {"latent_weight": 0.0}}
    (folder / "search.json").write_text(json.dumps(settings))
    trial = {"number": 1, "options": {"temperature": None}, "dice": 0.3, "gain": 0.02}
    trials = [trial, trial | {"number": 0, "gain": -0.01}]
    (folder / "trials.json").write_text(json.dumps(trials))
    found = trials_table(folder)
    assert found.frame.to_numpy().tolist() == [
        ["temperature none", "1", "0.300", "+2.0"],
        ["temperature none", "0", "0.300", "\N{MINUS SIGN}1.0"],
    ]
    assert "latent_weight 0.0" in found.notes[0]
    for content in ("{", "[3]", '[{"number": 1}]'):
        (folder / "trials.json").write_text(content)
        with pytest.raises(UserError, match="search-few"):
            trials_table(folder)
