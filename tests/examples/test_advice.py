"""The default recipe for small data is the one that the study chose: docs/results/when-it-helps."""

from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest
import yaml

from kdnet.configuration.parsing import parse_config
from kdnet.configuration.presets import RECIPE_FILE
from kdnet.recipes.advice import FEWEST, LEAD, STUDIED, explain, judge
from kdnet.results.stored import read_folder
from kdnet.studies.design import read_design

STUDIES = Path(__file__).parents[2] / "docs/results/when-it-helps"
CPU = ["--data-root", "x", "--preset", "cpu"]


def objective(*arguments):
    return parse_config(list(arguments)).objective


def test_recipe_auto_is_what_the_study_chose():
    """Changing configs/recipes/auto.yaml needs another study: studies/lgg.yaml, when-it-helps."""
    design = read_design("lgg")
    chosen = design.chosen["20-labelled"]
    assert yaml.safe_load(RECIPE_FILE.read_text()) == design.recipes[chosen].options


def test_small_data_follow_the_study():
    found = objective(*CPU)
    assert (found.recipe, found.imitation, found.temperature) == ("auto", 0.9, 1.0)
    assert (found.binarisation, found.latent_weight) == ("soft", 0.0)


@pytest.mark.parametrize("preset", ["paper", "native", "demo"])
def test_other_presets_keep_the_constants_of_the_paper(preset):
    found = objective("--data-root", "x", "--preset", preset)
    assert (found.recipe, found.imitation, found.temperature) == ("options", 0.75, 5.0)
    assert found.latent_weight == 10.0


def test_any_preset_can_follow_the_study():
    assert objective("--recipe", "auto").imitation == 0.9
    assert objective("--recipe=auto").imitation == 0.9


def test_one_option_that_is_given_leaves_the_others_as_the_study_chose():
    found = objective(*CPU, "--imitation", "0.3")
    assert (found.imitation, found.temperature, found.latent_weight) == (0.3, 1.0, 0.0)


@pytest.mark.parametrize("form", [["--config", "FILE"], ["--config=FILE"]])
def test_an_option_in_a_file_wins_too(tmp_path, form):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"data_root": "x", "recipe": "auto", "temperature": 3.0}))
    found = objective(*(part.replace("FILE", str(file)) for part in form))
    assert (found.temperature, found.imitation) == (3.0, 0.9)


def test_the_recipe_can_be_refused():
    assert objective(*CPU, "--recipe", "options").imitation == 0.75


def test_rows_of_a_cross_validation_say_what_they_are():
    from crossval import CROSSVAL
    from kdnet.configuration.parsing import parse_for

    assert parse_for(CROSSVAL, CPU)[0].objective.imitation == 0.75


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
        for study in sorted(STUDIES.glob("*/rows.csv"))
        for lead, gain in few_labels(study)
    ]
    assert len(found) == 7  # one region of lgg, three each of BraTS and phantoms
    assert all(gain < 0 for lead, gain in found if lead < LEAD)
    assert any(gain > 0.1 for lead, gain in found if lead > LEAD)


def few_labels(folder):
    """Mean lead and gain of every region, in native space."""
    scores = read_folder(folder.parent).scores
    rows = list(scores.itertuples())
    means = defaultdict(lambda: defaultdict(list))
    few = scores["labelled"].min()
    for row in rows:
        whole = row.unlabelled + row.labelled == scores["labelled"].max()
        wanted = row.kind in {"teacher", "baseline"} or (row.kind == "soft" and whole)
        if row.space == "native" and row.labelled == few and wanted:
            means[row.region][row.kind].append(row.dice)
    for kinds in means.values():
        teacher, baseline, student = (mean(kinds[kind]) for kind in ("teacher", "baseline", "soft"))
        yield teacher - baseline, student - baseline
