"""Which tables of the paper a page shows."""

from dataclasses import replace

from invented_runs import invented_scores
from kdnet.results.comparison import other_tables, paper_tables, subset_tables


def titles(tables):
    return [table.title.split(",")[0] for table in tables]


def test_tables_come_at_the_training_grid_first_then_native():
    grid, native = paper_tables(invented_scores(rows=("baseline", "gt_kl")), "here")
    assert "training grid" in grid[0].title
    assert "native space" in native[0].title
    assert titles(grid) == titles(native) == ["Table 1", "Table 2"]


def test_the_ablation_is_left_out_where_none_of_it_was_run():
    grid, _ = paper_tables(invented_scores(rows=("baseline", "hemis")), "here")
    assert titles(grid) == ["Table 1"]


def test_rows_and_regions_that_are_not_the_papers_have_no_table():
    assert paper_tables(invented_scores(rows=("mine",)), "here") == []
    lesions = [replace(score, region="lesion") for score in invented_scores(rows=("kdnet",))]
    assert paper_tables(lesions, "here") == []


def test_published_numbers_are_for_students_of_t1ce_alone():
    scores = invented_scores(rows=("kdnet",))
    assert len(other_tables(scores, ["t1ce"])) == 1
    assert other_tables(scores, ["flair"]) == other_tables(scores, []) == []


def test_subsets_are_shown_where_they_were_scored():
    assert subset_tables([], ["t1", "t2"]) == []
    scores = [replace(score, modalities="t1") for score in invented_scores(rows=("hemis",))]
    native, grid = subset_tables(scores, ["t1", "t2"])
    assert "native space" in native.title
    assert [row[0] for row in grid.rows] == ["t1", "t2", "t1+t2", "mean of 3"]
