"""study.json: what it says, and what is wrong with it."""

import json

import pytest

from invented_runs import invented_facts
from kdnet.errors import UserError
from kdnet.studies.facts import read_facts, write_facts


def written(path, **changes):
    """A file in which some keys differ; None takes a key out."""
    write_facts(path, invented_facts())
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def test_facts_come_back_as_they_were(tmp_path):
    facts = invented_facts(phantom=True, commands=["python study.py"], chosen={"8-of-20": "kd"})
    write_facts(tmp_path / "study.json", facts)
    assert read_facts(tmp_path / "study.json") == facts


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": None, "labels": None}, "name, labels missing"),
        ({"names": "x"}, "found names"),
        ({"phantom": "no"}, "phantom is 'no'; expected true or false"),
        ({"labels": {"kd": 1}}, "labels is .* expected kinds and their names"),
        ({"commands": "python"}, "commands is 'python'; expected a list of commands"),
        ({"chosen": ["kd"]}, "chosen is .* expected a kind, or settings and their kinds"),
        ({"protocol": ""}, "protocol is ''; expected a sentence"),
    ],
)
def test_unfit_content_is_named(tmp_path, changes, expected):
    with pytest.raises(UserError, match=expected):
        read_facts(written(tmp_path / "study.json", **changes))


def test_missing_file_is_explained(tmp_path):
    with pytest.raises(UserError, match="what the rows beside it are about, found no such file"):
        read_facts(tmp_path / "study.json")


def test_what_is_optional_has_a_default(tmp_path):
    keys = ("reference", "chosen", "phantom", "commands")
    path = written(tmp_path / "study.json", **dict.fromkeys(keys))
    assert read_facts(path) == invented_facts()


def test_chosen_recipe_may_differ_between_settings():
    facts = invented_facts(chosen={"8-of-20": "kd", "20-of-20": "soft_t1"})
    assert facts.is_chosen("8-of-20_kd", "kd")
    assert not facts.is_chosen("20-of-20_kd", "kd")
    assert facts.is_chosen("20-of-20_soft_t1", "soft_t1")


def test_kinds_are_sorted_from_reference_to_teacher():
    kinds = ["teacher", "zeta", "alpha", "chosen", "baseline"]
    order = sorted(kinds, key=invented_facts().rank)
    assert order == ["baseline", "chosen", "alpha", "zeta", "teacher"]
