"""Figures of a study: what is drawn, what cannot be, and the same bytes each time."""

import pytest
from PIL import Image

from invented_runs import invented_facts, invented_study
from kdnet.studies.analysis import analyse
from kdnet.studies.figures import Missing, draw_all, gain_by_lead, headline, save
from kdnet.studies.rows import Study
from page_links import read_links

NAMES = ["headline", "dice", "gain-by-labelled", "gain-by-unlabelled", "gain-by-lead"]


def analysis(rows=None, **changes):
    rows = invented_study(regions=("TC", "WT")) if rows is None else rows
    return analyse(Study(invented_facts(**changes), rows), "native", resamples=100)


def texts(picture):
    """Everything that is written into a figure."""
    axes = picture.figure.axes
    found = [text.get_text() for panel in axes for text in panel.texts]
    found += [label.get_text() for panel in axes for label in panel.get_yticklabels()]
    found += [text.get_text() for legend in picture.figure.legends for text in legend.get_texts()]
    return found


@pytest.fixture(scope="module")
def drawn():
    return {picture.name: picture for picture in draw_all(analysis())}


def test_all_figures_are_drawn_with_a_panel_per_region(drawn):
    assert list(drawn) == NAMES
    assert {len(picture.figure.axes) for picture in drawn.values()} == {2}
    assert all(picture.caption.endswith(".") for picture in drawn.values())


def test_headline_has_fewest_and_most_labels_alone():
    rows = invented_study({"chosen": 0.1, "paper": 0.0}, labelled=(4, 8, 20))
    found = texts(headline(analysis(rows)))
    assert {"4 labelled", "4 labelled + 16 unlabelled", "20 labelled"} <= set(found)
    assert "8 labelled" not in found
    assert found.count("chosen recipe") == 2
    assert found.count("teacher") == 2
    assert "paper" not in found


def test_points_of_a_line_with_fewer_seeds_are_told_apart_in_the_caption(drawn):
    assert "Seeds of the line" not in drawn["gain-by-labelled"].caption
    whole = invented_study()
    rows = [row for row in whole if row.kind != "chosen" or row.labelled == 20 or not row.seed]
    caption = {one.name: one.caption for one in draw_all(analysis(rows))}["gain-by-labelled"]
    said = "Seeds of the line chosen recipe, all others unlabelled, from left to right: 1, 2."
    assert caption.endswith(said)


def test_dice_show_every_network_with_its_mean(drawn):
    found = texts(drawn["dice"])
    assert found.count("baseline") == 4
    assert sum(text.startswith("0.") for text in found) == 12


def test_lines_are_named_after_their_kind(drawn):
    assert texts(drawn["gain-by-labelled"])[-1] == "chosen recipe, all others unlabelled"
    assert texts(drawn["gain-by-unlabelled"])[-1] == "chosen recipe, 8 labelled"


def test_leads_are_named_after_setting_and_slope(drawn):
    legend = texts(drawn["gain-by-lead"])[-4:]
    assert [text.split(":")[0] for text in legend] == [
        *("TC, 8 labelled + 12 unlabelled", "TC, 20 labelled"),
        *("WT, 8 labelled + 12 unlabelled", "WT, 20 labelled"),
    ]
    assert "slope" in legend[0]


def test_all_points_lie_inside_the_axes(drawn):
    for picture in drawn.values():
        for panel in picture.figure.axes:
            left, right = panel.get_xlim()
            for line in panel.lines[:6]:
                if len(line.get_xdata()) == 1:
                    assert left <= line.get_xdata()[0] <= right


def test_without_chosen_rows_all_students_stand_beside_the_lead():
    rows = invented_study({"paper": 0.0, "soft": 0.1})
    found = analysis(rows)
    assert headline(found) == Missing("headline", "no row of the chosen recipe is stored.")
    assert "paper, 20 labelled: slope" in " ".join(texts(gain_by_lead(found)))


@pytest.mark.parametrize(
    ("keep", "missing"),
    [
        (lambda row: row.kind != "teacher", ["gain-by-lead"]),
        (lambda row: row.labelled == 20, ["gain-by-unlabelled"]),
        (lambda row: row.kind != "baseline", NAMES[2:]),
        (lambda row: row.kind == "baseline", ["headline", *NAMES[2:]]),
    ],
)
def test_figure_that_cannot_be_drawn_says_why(keep, missing):
    found = draw_all(analysis(list(filter(keep, invented_study()))))
    assert [one.name for one in found if isinstance(one, Missing)] == missing
    assert all(one.reason.endswith(".") for one in found if isinstance(one, Missing))


def test_few_cases_and_one_seed_are_drawn_without_intervals():
    found = draw_all(analysis(invented_study(cases=4, seeds=(0,))))
    assert [one.name for one in found] == NAMES
    assert not any(isinstance(one, Missing) for one in found)


def test_phantoms_are_called_so():
    assert "(phantom)" in headline(analysis(phantom=True)).title


def test_same_rows_give_the_same_bytes(tmp_path, drawn):
    name = "gain-by-lead"
    first = save(drawn[name], tmp_path / "first")
    again = save(gain_by_lead(analysis()), tmp_path / "again")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


def test_files_hold_no_date_version_or_font_of_this_machine(tmp_path, drawn):
    png, svg = save(drawn["headline"], tmp_path)
    markup = svg.read_text(encoding="utf-8")
    assert "DejaVu" not in markup
    assert "Matplotlib" not in markup
    assert "<title>invented: Dice with few labels and with all</title>" in markup
    with Image.open(png) as image:
        assert "Software" not in image.info
        assert image.width == 1040


def test_names_cannot_change_a_figure(tmp_path):
    labels = {"chosen": "<script>$x_", "baseline": "a & b"}
    picture = headline(analysis(labels=labels, name="<b> $5"))
    markup = save(picture, tmp_path)[1].read_text(encoding="utf-8")
    assert "<script" not in markup
    assert [link for link in read_links(markup).found if link.startswith("javascript")] == []
