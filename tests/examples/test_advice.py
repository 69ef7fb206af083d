"""The default recipe for small data is the one that the study chose: docs/results/when-it-helps."""

from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest
import yaml

from kdnet.config import RECIPE_FILE, parse_config
from kdnet.recipes.advice import FEWEST, LEAD, STUDIED, explain, judge
from kdnet.studies.design import read_design
from kdnet.studies.page import find_studies
from kdnet.studies.rows import read_study

CPU = ["--data-root", "x", "--preset", "cpu"]


def objective(*arguments):
    return parse_config(list(arguments)).objective


def test_recipe_auto_is_what_the_study_chose():
    """Changing configs/recipes/auto.yaml needs another study: studies/lgg.yaml, when-it-helps."""
    design = read_design("lgg")
    chosen = design.chosen["20-labelled"]
    assert yaml.safe_load(RECIPE_FILE.read_text()) == design.recipes[chosen].options


def test_the_explanation_says_what_may_be_expected():
    auto = objective(*CPU)
    assert "36 of 56 training subjects have no reference" in explain(auto, 20, 36)
    assert "no gain over the baseline" in explain(auto, 56, 0)
    assert "when-it-helps" in explain(auto, 56, 0)


@pytest.mark.parametrize(
    ("labelled", "pointed_out"), [(FEWEST - 1, True), (FEWEST, False), (STUDIED + 1, True)]
)
def test_numbers_of_subjects_outside_the_study_are_pointed_out(labelled, pointed_out):
    said = explain(objective(*CPU), labelled, 36)
    assert ("ompare with the baseline" in said) is pointed_out


def test_what_was_given_instead_is_named():
    said = explain(objective(*CPU, "--imitation", "0.5", "--latent_weight", "1"), 20, 36)
    assert "Recipe auto, but with imitation 0.5, latent_weight 1.0 as given" in said
    assert "tenth" not in said


def test_an_objective_with_terms_of_its_own_is_not_explained_by_the_study():
    said = explain(objective(*CPU, "--objective", "hinton"), 20, 36)
    assert said.startswith("--objective hinton has terms of its own")


def test_a_teacher_that_hardly_leads_promises_no_gain():
    assert "leads the baseline by +5.0 Dice points" in judge(0.55, 0.5)
    assert "expect no gain" in judge(0.5 + LEAD - 0.01, 0.5)
    assert "expect no gain" not in judge(0.5 + LEAD + 0.01, 0.5)


def test_every_study_lost_below_that_lead_and_one_gained_above():
    """Of the studies' own rows: mean lead and gain of the chosen recipe with few labels."""
    found = [
        (lead, gain)
        for study in find_studies(Path(__file__).parents[2] / "docs/results/when-it-helps")
        for lead, gain in few_labels(study)
    ]
    assert len(found) == 7  # one region of lgg, three each of BraTS and phantoms
    assert all(gain < 0 for lead, gain in found if lead < LEAD)
    assert any(gain > 0.1 for lead, gain in found if lead > LEAD)


def few_labels(folder):
    """Mean lead and gain of every region, in native space."""
    study = read_study(folder)
    means = defaultdict(lambda: defaultdict(list))
    few = min(row.labelled for row in study.rows)
    for row in study.rows:
        whole = row.unlabelled + row.labelled == max(r.labelled for r in study.rows)
        wanted = row.kind in {"teacher", "baseline"} or (row.kind == "soft" and whole)
        if row.space == "native" and row.labelled == few and wanted:
            means[row.region][row.kind].append(row.dice)
    for kinds in means.values():
        teacher, baseline, student = (mean(kinds[kind]) for kind in ("teacher", "baseline", "soft"))
        yield teacher - baseline, student - baseline
