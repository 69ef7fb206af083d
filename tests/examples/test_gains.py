"""Paired gains: values by hand, a known gain that is found, and what has no partner."""

import math
import random
from dataclasses import replace

import pytest

from invented_runs import invented_facts, invented_study
from kdnet.errors import UserError
from kdnet.studies.gains import Pairing, spaces
from kdnet.studies.rows import Study, StudyRow

NAN = math.nan


def row(kind, dice, *, case="a", seed=0, fold=0, labelled=8, unlabelled=0, steps=10):
    name = f"{labelled}_{kind}"
    place = (labelled, unlabelled, fold, seed, case, "WT", "native")
    return StudyRow("invented", name, kind, *place, dice, steps)


def pairing(rows, space="native", resamples=500, **changes):
    return Pairing(Study(invented_facts(**changes), list(rows)), space, resamples=resamples)


def test_gain_is_that_over_the_same_fold_seed_and_case():
    found = pairing(
        [
            *(row("baseline", 0.2), row("baseline", 0.4, seed=1), row("baseline", 0.5, case="b")),
            *(row("chosen", 0.3, steps=20), row("chosen", 0.8, seed=1, steps=40)),
            row("chosen", 0.4, case="b", steps=20),
            # The baseline of more labels is not the partner.
            row("baseline", 0.9, labelled=20),
        ]
    ).compare()
    (one,) = found
    assert one.cells.found() == pytest.approx(
        {("a", (0, 0)): 0.1, ("a", (0, 1)): 0.4, ("b", (0, 0)): -0.1}
    )
    assert one.cells.mean == pytest.approx((0.25 - 0.1) / 2)
    assert (one.wins, one.losses, one.improved) == (1, 1, 0.5)
    assert one.steps == pytest.approx(3.0)
    assert one.interval.reason == "2 cases; at least 6 are needed"
    assert math.isnan(one.corrected)


@pytest.mark.parametrize("gain", [-0.1, 0.0, 0.15])
def test_known_gain_lies_in_its_interval(gain):
    rows = invented_study({"chosen": gain}, cases=40)
    for one in pairing(rows).compare():
        assert one.interval.lower < gain < one.interval.upper
        assert one.interval.upper - one.interval.lower < 0.05
        assert (one.corrected < 0.05) == (gain != 0)


def test_order_of_rows_does_not_matter():
    rows = invented_study({"chosen": 0.1, "paper": -0.1})
    shuffled = random.Random(0).sample(rows, len(rows))
    one, other = pairing(rows), pairing(shuffled)
    assert one.networks == other.networks
    for first, second in zip(one.compare(), other.compare(), strict=True):
        assert (first.network, first.interval) == (second.network, second.interval)
        assert (first.test, first.corrected) == (second.test, second.corrected)


def test_row_of_one_seed_pairs_with_that_seed_alone():
    rows = [r for r in invented_study() if r.kind != "chosen" or r.seed == 1]
    found = pairing(rows)
    assert all(one.cells.seeds == [1] for one in found.compare())
    assert found.missing() == []


def test_p_is_corrected_over_all_comparisons():
    kinds = {"chosen": 0.1, "paper": 0.01, "soft": 0.0}
    found = pairing(invented_study(kinds, regions=("TC", "WT"))).compare()
    assert len(found) == 3 * 2 * 2
    assert min(one.corrected for one in found) == pytest.approx(
        12 * min(one.test.p_value for one in found)
    )


def test_few_labels_are_compared_with_most():
    found = pairing(invented_study()).compare("most")
    assert [one.network.row for one in found] == ["8-of-20_chosen"]
    # 0.1 of the recipe less 0.005 for each of the 12 labels.
    assert found[0].cells.mean == pytest.approx(0.04, abs=0.01)


def test_unit_without_reference_is_named():
    rows = [r for r in invented_study() if r.place[:3] != ("8-of-20_baseline", 1, 0)]
    found = pairing(rows)
    (sentence,) = found.missing()
    assert sentence.startswith(
        "8-of-20_chosen, fold 1, seed 0: no baseline with 8 labelled subjects"
    )
    assert (1, 0) not in found.compare()[0].cells.units


@pytest.mark.parametrize(
    ("lacks", "has"),
    [("8-of-20_baseline", "8-of-20_chosen"), ("8-of-20_chosen", "8-of-20_baseline")],
)
def test_case_without_partner_is_named(lacks, has):
    rows = [r for r in invented_study() if (r.row, r.case, r.seed) != (lacks, "Case_03", 1)]
    assert pairing(rows).missing() == [
        f"8-of-20_chosen, fold 1, seed 1: {lacks} has no Dice of 1 in tumour, such as Case_03."
    ]


def test_nan_is_no_pair_and_is_named():
    rows = [
        replace(r, dice=NAN) if (r.row, r.case) == ("8-of-20_chosen", "Case_03") else r
        for r in invented_study()
    ]
    found = pairing(rows)
    assert len(found.compare()[0].cells.cases) == 19
    assert len(found.missing()) == 2
    assert "has no Dice of 1 in tumour, such as Case_03" in found.missing()[0]


def test_student_without_any_reference_has_no_comparison():
    rows = [r for r in invented_study() if r.kind != "baseline"]
    found = pairing(rows)
    assert found.compare() == []
    assert len(found.missing()) == 8


def test_two_references_of_one_setting_are_refused():
    rows = [row("baseline", 0.1), replace(row("baseline", 0.2), row="again"), row("chosen", 0.2)]
    with pytest.raises(
        UserError, match=r"8_baseline and again are both of the kind baseline with 8"
    ):
        pairing(rows).compare()


def test_networks_are_sorted_by_subjects_and_kind():
    rows = invented_study({"paper": 0.0, "chosen": 0.1})
    assert [network.row for network in pairing(rows).networks] == [
        *("8-of-20_baseline", "8-of-20_teacher", "8-of-20_chosen", "8-of-20_paper"),
        *("20-of-20_baseline", "20-of-20_chosen", "20-of-20_paper", "20-of-20_teacher"),
    ]


def test_setting_tells_what_a_network_was_trained_on():
    networks = {network.row: network for network in pairing(invented_study()).networks}
    assert networks["8-of-20_chosen"].setting == "8 labelled + 12 unlabelled"
    assert networks["20-of-20_chosen"].setting == "20 labelled"


def test_folds_may_differ_by_one_subject():
    rows = [row("chosen", 0.5), replace(row("chosen", 0.5), fold=1, labelled=9)]
    rows += [row("baseline", 0.4), replace(row("baseline", 0.1), fold=1, labelled=9)]
    (one,) = pairing(rows).compare()
    assert one.network.setting == "8 to 9 labelled"
    assert one.network.subjects == (8.5, 0.0)
    assert one.cells.found() == pytest.approx({("a", (0, 0)): 0.1, ("a", (1, 0)): 0.4})


def test_dice_of_a_network_pools_folds_and_seeds():
    rows = [
        row("baseline", 0.2),
        row("baseline", 0.4, seed=1),
        row("baseline", 0.9, case="b", fold=1),
    ]
    (one,) = pairing(rows).dice()
    assert one.cells.mean == pytest.approx(0.6)


def test_spaces_are_kept_apart():
    study = Study(invented_facts(), invented_study({"chosen": 0.1}, noise=0.0))
    assert spaces(study) == ["native", "grid"]
    native, grid = (Pairing(study, space, resamples=100).dice() for space in spaces(study))
    assert grid[0].cells.mean - native[0].cells.mean == pytest.approx(0.01)


def test_lead_is_the_teachers_over_the_reference_of_all_seeds():
    rows = [
        *(row("baseline", 0.2), row("baseline", 0.4, seed=1)),
        *(row("chosen", 0.3), row("chosen", 0.5, seed=1), row("teacher", 0.8)),
    ]
    found = pairing(rows)
    (one,) = found.compare()
    assert found.lead(one) == pytest.approx({("a", (0, 0)): 0.5, ("a", (0, 1)): 0.5})
    apart = found.lead(one, other_seeds=True)
    assert apart == pytest.approx({("a", (0, 0)): 0.4, ("a", (0, 1)): 0.6})
