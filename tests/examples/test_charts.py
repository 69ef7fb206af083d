"""Charts: what is drawn, and that the page decides about colours."""

import re
from dataclasses import replace

import pytest

from invented_runs import invented_scores
from kdnet.results.charts import (
    Curve,
    Pairs,
    draw_chart,
    draw_gains,
    draw_pairs,
    history_charts,
    pairs_of,
)
from page_links import read_links


def pairs(count, names=("baseline", "student")):
    values = [(index / count, min(1.0, index / count + 0.1)) for index in range(count)]
    return Pairs("ET", names, values)


def test_colours_of_charts_are_left_to_the_page():
    markup = draw_chart("a & b", [Curve("student", [1.0, 0.5]), Curve("teacher", [1.0, 2.0])])
    assert markup.startswith('<svg role="img" aria-label="a &amp; b" viewBox')
    assert "var(--student)" in markup
    assert "#a1000" not in markup
    assert "DejaVu" not in markup


def test_history_columns_become_charts_in_order():
    row = {"epoch": 1, "step": 5, "learning_rate": 0.1, "seconds": 2.0, "train_loss": 1.0}
    row |= {"train_latent_kl": 0.2, "validation_loss": 1.0, "validation_dice": 0.5}
    charts = history_charts({"student": [row]})
    assert list(charts) == ["loss", "Dice (validation)", "term: latent kl", "learning rate"]
    assert [curve.dashed for curve in charts["loss"]] == [False, True]


def test_pairs_average_seeds_and_leave_out_the_training_grid_and_post_processing():
    scores = [
        replace(score, dice=dice, seed=seed)
        for seed, dice in ((0, 0.2), (1, 0.4))
        for score in invented_scores(cases=1, rows=("baseline", "student"), first=1)
    ]
    others = [replace(score, dice=0.9, space="grid") for score in scores]
    others += [replace(score, dice=0.9, postprocessing="on") for score in scores]
    found = pairs_of(scores + others, student="student", baseline="baseline")
    assert [found_in.region for found_in in found] == ["ET", "TC", "WT"]
    ((before, after),) = found[0].values
    assert (before, after) == (pytest.approx(0.3), pytest.approx(0.3))


def test_cases_of_one_network_alone_are_no_pairs():
    scores = [score for score in invented_scores() if score.role == "student"]
    assert pairs_of(scores, student="student", baseline="baseline") == []


def test_gains_losses_and_ties_are_counted_and_drawn_apart():
    three = Pairs("ET", ("a", "b"), [(0.1, 0.2), (0.2, 0.1), (0.3, 0.3)])
    markup = draw_pairs(three)
    assert "1 of 3 gain, 1 lose" in markup
    assert "var(--gain)" in markup
    assert "var(--loss)" in markup
    assert "stroke-dasharray" in markup  # a loss is also told without colours


@pytest.mark.parametrize("draw", [draw_pairs, draw_gains])
@pytest.mark.parametrize("count", [1, 12, 285])
def test_charts_of_any_number_of_cases_stay_small(draw, count):
    assert len(draw(pairs(count))) < 100_000


def test_sorted_gains_show_their_mean():
    markup = draw_gains(Pairs("ET", ("a", "b"), [(0.1, 0.4), (0.2, 0.1)]))
    assert "mean +0.100" in markup
    assert "2 cases, sorted" in markup


def test_all_values_lie_inside_the_dice_axis():
    markup = draw_pairs(Pairs("ET", ("a", "b"), [(0.0, 1.0), (0.0, 1.0)]))
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", markup)]
    box = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', markup).group(1))
    assert max(heights) <= box


@pytest.mark.parametrize("name", ["<b>&", "$x$", 'a" onload="b', "a" * 60])
def test_names_of_rows_cannot_change_a_chart(name):
    markup = draw_pairs(pairs(3, ("baseline", name)))
    assert "<b>" not in markup
    assert [link for link in read_links(markup).found if not link.startswith("#")] == []
    assert ("$x$" in markup) == (name == "$x$")
