"""Gain beside the teacher's lead: slopes and quarters by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from invented_runs import invented_facts, invented_study
from kdnet.studies.gains import Pairing
from kdnet.studies.lead import lead_and_gain
from kdnet.studies.rows import Study


def of_share(share, *, cases=24, noise=0.0, seeds=(0, 1), keep=lambda row: True):
    """A student that gains a share of the lead, which grows from case to case."""
    generator = np.random.default_rng(1)
    rows = []
    for row in invented_study(cases=cases, labelled=(8,), noise=0.0, seeds=seeds):
        lead = 0.01 * int(row.case[-2:])
        dice = 0.2 + {"baseline": 0.0, "chosen": share * lead, "teacher": lead}[row.kind]
        rows.append(replace(row, dice=float(dice + generator.normal(0, noise))))
    pairing = Pairing(Study(invented_facts(), list(filter(keep, rows))), "native", resamples=500)
    (comparison,) = pairing.compare()
    return lead_and_gain(pairing, comparison)


def test_slope_is_the_share_of_the_lead_that_is_gained():
    found = of_share(0.4)
    assert found.slope.value == pytest.approx(0.4)
    assert found.apart.value == pytest.approx(0.4)
    assert found.lead.mean == pytest.approx(0.01 * 11.5)
    assert found.gain.mean == pytest.approx(0.4 * found.lead.mean)


def test_luck_of_the_shared_reference_raises_the_slope_but_not_that_of_other_seeds():
    found = of_share(0.0, cases=80, noise=0.2)
    assert found.slope.value > found.apart.value + 0.1
    assert found.apart.interval.lower < 0 < found.apart.interval.upper


def test_quarters_hold_a_fourth_of_the_cases_each_in_order_of_lead():
    found = of_share(0.4)
    assert [len(part.gain.cases) for part in found.quartiles] == [6, 6, 6, 6]
    ends = [end for part in found.quartiles for end in (part.lowest, part.highest)]
    assert ends == pytest.approx([0.01 * lead for lead in (0, 5, 6, 11, 12, 17, 18, 23)])
    gains = [part.gain.mean for part in found.quartiles]
    assert gains == pytest.approx([0.004 * lead for lead in (2.5, 8.5, 14.5, 20.5)])


def test_small_quarters_have_no_interval_and_three_cases_no_quarters():
    quartiles = of_share(0.4, cases=8).quartiles
    assert {part.interval.reason for part in quartiles} == {"2 cases; at least 6 are needed"}
    assert of_share(0.4, cases=3).quartiles == []


def test_one_seed_has_no_lead_over_other_seeds():
    found = of_share(0.4, seeds=(0,))
    assert found.slope.value == pytest.approx(0.4)
    assert math.isnan(found.apart.value)
    assert found.apart.interval.reason == "0 cases; at least 6 are needed"


def test_cases_that_the_teacher_did_not_see_are_left_out():
    found = of_share(0.4, keep=lambda row: row.kind != "teacher" or row.case != "Case_05")
    assert "Case_05" not in found.lead.cases
    assert found.lead.cases == found.gain.cases
    assert "Case_05" in found.comparison.cells.cases


def test_without_a_teacher_there_is_no_lead():
    found = of_share(0.4, keep=lambda row: row.kind != "teacher")
    assert found.lead.cases == ()
    assert math.isnan(found.slope.value)
    assert found.quartiles == []
