import math

import pytest
from rich.console import Console

from kdnet.errors import UserError
from kdnet.evaluation.scoring import Score
from kdnet.results.paper_tables import (
    TABLE_TWO_ROWS,
    paired_table,
    published_table,
    subset_table,
    table_one,
    table_two,
)
from kdnet.results.published import TABLE_TWO, published

PROTOCOL = "phantoms, 12 cases, grid 16, 2 epochs, 2 folds, seed 0"


def scored(role, values, region="ET", *, modalities="t1ce", space="native"):
    """One case per value; three per fold."""
    return [
        Score(
            role, f"c{index}", region, space, dice, dice, 1.0, "mm", 9, 9, dice, "off", modalities,
            fold=index // 3,
        )
        for index, dice in enumerate(values)
    ]  # fmt: skip


def printed(table):
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table.text().rich())
    return capture.get()


def row_of(table, name):
    (row,) = [row for row in table.rows if row.row == name]
    return row


def test_our_numbers_over_folds_and_over_cases_by_hand():
    table = table_one(scored("kdnet", [0.1, 0.2, 0.3, 0.5, 0.6, 0.7]), PROTOCOL)
    cell = row_of(table, "kdnet").ours["ET"]
    assert (cell.folds_mean, cell.mean, cell.n) == (pytest.approx(40), pytest.approx(40), 6)
    assert cell.folds_sd == pytest.approx(40 / math.sqrt(2))  # of 20 and 60
    assert cell.sd == pytest.approx(100 * math.sqrt((0.09 + 0.04 + 0.01) * 2 / 5))


def test_published_number_stands_beside_ours_with_both_protocols():
    text = printed(table_one(scored("kdnet", [0.4] * 6), PROTOCOL))
    assert "40.00 ± 0.00" in text
    assert "71.67 ± 1.22" in text
    assert f"(1) ours: {PROTOCOL}." in text
    assert "(2) Hu, Maillard et al. 2020" in text


def test_rows_without_scores_are_marked():
    table = table_two([], PROTOCOL)
    assert [row.row for row in table.rows] == list(TABLE_TWO_ROWS)
    assert all(row.ours is None for row in table.rows)
    assert printed(table).count("not run") == 10


def test_table_two_shows_every_published_row():
    table = table_two([], PROTOCOL)
    assert {row.published.row for row in table.rows} == {row.row for row in published(TABLE_TWO)}


def test_data_set_of_one_region_fills_one_column():
    table = table_one(scored("baseline", [0.5] * 3, region="WT"), PROTOCOL)
    assert list(row_of(table, "baseline").ours) == ["WT"]
    (line, *_) = [line for line in table.text().rows if line[1] == "ours, over 3 cases"]
    assert line[3:] == ["", "", "50.00 ± 0.00"]


def test_spaces_are_kept_apart():
    scores = scored("baseline", [0.5] * 3) + scored("baseline", [0.9] * 3, space="grid")
    assert row_of(table_one(scores, PROTOCOL), "baseline").ours["ET"].mean == 50.0
    at_grid = table_one(scores, PROTOCOL, space="grid")
    assert row_of(at_grid, "baseline").ours["ET"].mean == 90.0
    assert "training grid" in at_grid.title


def test_row_with_several_subsets_is_refused():
    scores = scored("hemis", [0.5]) + scored("hemis", [0.6], modalities="t2")
    with pytest.raises(UserError, match="'hemis' has scores for the modalities t1ce and t2"):
        table_one(scores, PROTOCOL)


def test_every_network_is_compared_with_the_baseline():
    base = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    gained = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    better = [value + gain for value, gain in zip(base, gained, strict=True)]
    scores = scored("baseline", base) + scored("kdnet", better) + scored("gt_kl", base)
    table = paired_table(scores)
    assert [gain.role for gain in table.rows] == ["kdnet", "gt_kl"]
    kdnet, same = table.text().rows
    assert kdnet[:3] == ["kdnet", "ET", "+3.50"]
    assert kdnet[4:] == ["0.031", "0.031", "6"]
    assert same[4] == "all 6 differences are zero"
    assert [gain.role for gain in paired_table(scores, roles=["gt_kl"]).rows] == ["gt_kl"]


def test_comparison_with_a_network_that_was_not_run_is_refused():
    with pytest.raises(UserError, match=r"against 'baseline': expected it .* found kdnet"):
        paired_table(scored("kdnet", [0.5]))


def test_fifteen_subsets_and_their_mean():
    names = ("flair", "t1", "t1ce", "t2")
    rows = subset_table([]).rows
    assert len(rows) == 15
    assert rows[0].subset == ("flair",)
    assert rows[-1].subset == names
    scores = []
    for index, row in enumerate(rows):
        # The order within a subset is that of the network, not of the table.
        seen = "+".join(reversed(row.subset))
        scores += scored("hemis", [index / 20] * 2, modalities=seen)
    table = subset_table(scores + scored("baseline", [0.5]))
    assert table.rows[2].values == {"hemis": {"ET": 10.0}, "baseline": {"ET": 50.0}}
    assert table.mean("hemis", "ET") == pytest.approx(35)
    assert math.isnan(table.mean("baseline", "ET"))
    assert table.text().rows[0] == ["flair", "0.00", "not run"]
    assert table.text().rows[-1] == ["mean of 15", "35.00", "\N{EN DASH}"]


def test_modality_that_the_data_set_lacks_is_refused():
    with pytest.raises(UserError, match="saw some of flair, t1, t1ce, t2, found 'adc'"):
        subset_table(scored("hemis", [0.5], modalities="adc"))


def test_published_table_says_what_can_be_compared():
    table = published_table()
    assert ["DeMoSeg", "published"] in [row[:2] for row in table.rows]
    assert "Only numbers of one protocol can be compared." in table.notes[0]


def test_markdown_has_one_line_per_row_and_escapes_bars():
    table = table_one([], "grid 64 | crop 128").text()
    lines = table.markdown().splitlines()
    assert lines[2] == "| network | numbers | protocol | ET | TC | WT |"
    assert lines[3] == "| :-- | :-- | :-- | --: | --: | --: |"
    assert sum(line.startswith("|") for line in lines) == 2 + len(table.rows)
    assert all(line.count("|") == 7 for line in lines if line.startswith("|"))
