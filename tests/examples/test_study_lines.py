"""Which gains make a line of a figure."""

import math

import pytest

from invented_runs import invented_facts, invented_study
from kdnet.studies.gains import Pairing
from kdnet.studies.lines import by_labelled, by_unlabelled
from kdnet.studies.rows import Study


def compared(*studies):
    rows = [row for study in studies for row in study]
    return Pairing(Study(invented_facts(), rows), "native", resamples=100).compare()


def relabelled(rows, labelled, unlabelled):
    """The students of a study, with other numbers of unlabelled subjects."""
    return [
        type(row)(
            **vars(row) | {"row": f"{labelled}+{unlabelled}_{row.kind}", "unlabelled": unlabelled}
        )
        for row in rows
        if row.labelled == labelled and row.kind == "chosen"
    ]


def test_students_with_all_subjects_make_one_line():
    (line,) = by_labelled(compared(invented_study()))
    assert (line.kind, line.what, line.dashed) == ("chosen", "all others unlabelled", False)
    assert [point.x for point in line.points] == [8, 20]


def test_students_on_their_labels_alone_make_a_second_line_with_the_same_end():
    rows = invented_study()
    first, second = by_labelled(compared(rows, relabelled(rows, 8, 0), relabelled(rows, 8, 6)))
    assert (second.what, second.dashed) == ("labelled alone", True)
    assert [point.x for point in second.points] == [8, 20]
    assert second.points[-1] == first.points[-1]


def test_without_unlabelled_subjects_the_only_line_is_solid():
    rows = [row for row in invented_study() if row.labelled == 20]
    (line,) = by_labelled(compared(rows))
    assert (line.what, line.dashed) == ("labelled alone", False)
    assert by_unlabelled(compared(rows)) == []


def test_share_is_that_of_all_training_subjects():
    rows = invented_study({"chosen": 0.1, "soft": 0.0})
    chosen, soft = by_unlabelled(compared(rows, relabelled(rows, 8, 0), relabelled(rows, 8, 8)))
    assert [point.x for point in chosen.points] == [0, 50, 60]
    assert [point.note for point in chosen.points] == ["0", "8", "12"]
    assert (chosen.what, soft.kind) == ("8 labelled", "soft")


def test_band_is_the_interval_or_the_mean_alone():
    point = by_labelled(compared(invented_study()))[0].points[0]
    interval = point.comparison.interval
    assert point.band == (interval.lower, point.comparison.cells.mean, interval.upper)
    few = by_labelled(compared(invented_study(cases=4)))[0].points[0]
    assert math.isnan(few.comparison.interval.lower)
    assert few.band == pytest.approx([few.comparison.cells.mean] * 3)
