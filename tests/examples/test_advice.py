"""The default recipe for small data is the one that the study chose: docs/results/when-it-helps."""

import pytest
import yaml

from config import Config, ObjectiveConfig, parse_config
from errors import UserError
from recipes.advice import ADVISED, STUDIED, advise, advised
from studies.design import read_design


def test_advice_is_what_the_study_chose():
    """Changing `recipes/advice.py` needs another study: studies/lgg.yaml, when-it-helps.md."""
    design = read_design("lgg")
    few = design.recipes[design.chosen["20-labelled"]].options
    every = design.recipes[design.chosen["all-labelled"]].options
    assert advise(20, 36).options == {"out_of_fold": 1} | few
    assert advise(56, 0).options == {"out_of_fold": 1} | every


def test_small_data_follow_the_study_and_the_paper_preset_does_not():
    assert parse_config(["--data-root", "x", "--preset", "cpu"]).objective.recipe == "auto"
    paper = parse_config(["--data-root", "x", "--preset", "paper"]).objective
    assert paper.recipe == "options"
    assert (paper.imitation, paper.temperature, paper.latent_weight) == (0.75, 5.0, 10.0)


def test_advice_says_why():
    config = Config(objective=ObjectiveConfig(recipe="auto"))
    chosen, said = advised(config, 20, 36)
    assert {name: getattr(chosen.objective, name) for name in ADVISED} == ADVISED
    assert "36 of 56 training subjects have no reference" in said
    assert "when-it-helps" in said


def test_more_subjects_than_were_studied_are_pointed_out():
    assert "compare with the baseline" in advise(STUDIED + 1, 0).why
    assert "compare with the baseline" not in advise(STUDIED, 0).why


def test_without_auto_nothing_is_chosen():
    config = Config()
    assert advised(config, 20, 36) == (config, None)


def test_an_option_that_is_given_wins_over_the_preset():
    objective = parse_config(
        ["--data-root", "x", "--preset", "cpu", "--imitation", "0.3"]
    ).objective
    assert (objective.recipe, objective.imitation) == ("options", 0.3)


def test_an_option_beside_recipe_auto_is_refused():
    with pytest.raises(UserError, match="--recipe auto chooses imitation itself"):
        parse_config(["--recipe", "auto", "--imitation", "0.3"])


def test_an_option_in_a_file_wins_too(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"data_root": "x", "temperature": 3.0}))
    objective = parse_config(["--config", str(file)]).objective
    assert (objective.recipe, objective.temperature) == ("options", 3.0)
