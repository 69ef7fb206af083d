import pytest
import yaml

from kdnet.errors import UserError
from kdnet.studies.design import Block, Design, Recipe, read_design, row_name

SOFT = {"soft": Recipe("soft targets", {"imitation": 0.9})}


def design(*blocks, **changes):
    usual = {"name": "x", "title": "t", "options": {}, "recipes": SOFT}
    return Design(**(usual | changes), blocks=blocks)


def test_rows_of_a_block_are_its_recipes_times_its_numbers():
    block = Block(("baseline", "soft"), labelled=(5, "all"), unlabelled=(0, "all"), seeds=(0, 1))
    rows, seeds = design(block).rows()
    assert {row.name for row in rows} == {
        *("5-labelled_teacher", "all-labelled_teacher"),
        *("5-labelled_baseline", "all-labelled_baseline"),
        *("5-labelled_soft", "5-labelled-0-unlabelled_soft"),
        *("all-labelled_soft", "all-labelled-0-unlabelled_soft"),
    }
    assert seeds["5-labelled_soft"] == (0, 1)
    assert seeds["5-labelled_teacher"] == (0,)


def test_teachers_come_first_and_know_the_labels_of_their_students():
    rows, _ = design(Block(("baseline", "soft"), labelled=(5,))).rows()
    by_name = {row.name: row for row in rows}
    assert by_name["5-labelled_soft"].teacher == "5-labelled_teacher"
    teacher, soft = by_name["5-labelled_teacher"], by_name["5-labelled_soft"]
    assert (teacher.labelled, teacher.unlabelled, teacher.options) == (5, 0, {})
    assert (soft.labelled, soft.unlabelled, soft.options) == (5, None, {"imitation": 0.9})
    assert soft.against == "5-labelled_baseline"
    assert [row.name for row in rows].index("5-labelled_teacher") < 2


def test_a_control_learns_without_a_teacher_and_gains_are_measured_against_it():
    recipes = {
        "longer": Recipe("longer", {"epochs": 9}, supervised=True),
        "soft": Recipe("soft targets", against="longer"),
    }
    block = Block(("baseline", "longer", "soft"), labelled=(5,), unlabelled=(0, 3))
    rows, _ = design(block, recipes=recipes).rows()
    by_name = {row.name: row for row in rows}
    longer = by_name["5-labelled_longer"]
    assert (longer.recipe, longer.teacher, longer.unlabelled) == ("supervised", None, 0)
    assert (longer.against, longer.options) == ("5-labelled_baseline", {"epochs": 9})
    for name in ("5-labelled-0-unlabelled_soft", "5-labelled-3-unlabelled_soft"):
        assert by_name[name].against == "5-labelled_longer"


def test_a_row_in_two_blocks_has_the_seeds_of_both():
    blocks = (Block(("baseline", "soft")), Block(("baseline", "soft"), seeds=(1, 2)))
    assert design(*blocks).rows()[1]["all-labelled_soft"] == (0, 1, 2)


def test_blocks_that_are_added_leave_the_teachers_seed_alone():
    first = Block(("baseline", "soft"), seeds=(1,))
    added = Block(("baseline", "soft"), seeds=(0, 1))
    for blocks in ((first,), (first, added)):
        assert design(*blocks).rows()[1]["all-labelled_teacher"] == (1,)


def test_what_readers_are_told_follows_from_the_recipes():
    chosen = {"5-labelled": "soft"}
    study = design(Block(("baseline", "soft"), labelled=(5, 20)), chosen=chosen)
    facts, kinds = study.facts(), {row.name: row.kind for row in study.rows()[0]}
    assert kinds["5-labelled_teacher"] == "teacher"
    assert kinds["20-labelled_soft"] == "soft"
    assert facts["labels"]["soft"] == "soft targets"
    assert facts["chosen"] == ("5-labelled_soft",)
    assert row_name("gt_kl", 20, 18) == "20-labelled-18-unlabelled_gt_kl"


@pytest.mark.parametrize("name", ["lgg", "lgg_fine", "phantoms", "brats2021"])
def test_every_study_of_ours_can_be_read(name):
    study = read_design(name)
    rows, seeds = study.rows()
    assert {row.name for row in rows} >= {*seeds}
    assert {row.kind for row in rows} <= {*study.recipes, "teacher", "baseline"}


SPACE = {"space": {"imitation": [0.5]}}
CONTENT = {
    "title": "t",
    "options": {},
    "recipes": {"soft": {"label": "soft"}},
    "blocks": [{"recipes": ["baseline", "soft"]}],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [{"recipes": ["sof"]}]}, "no recipe 'sof'; there are baseline, soft, teacher"),
        ({"recipes": {"teacher": {"label": "x"}}}, "'teacher' must"),
        ({"recipes": {"A b": {"label": "x"}}}, "'A b' must match"),
        ({"blocks": [{"recipes": ["soft"]}]}, "no baseline"),
        (
            {"recipes": {"soft": {"label": "x", "against": "nothing"}}},
            "against 'nothing'; .* without a teacher: baseline",
        ),
        ({"blocks": [{"recipes": ["baseline"], "labelled": ["few"]}]}, "few"),
        ({"blocks": [{"recipes": ["baseline"], "labelled": [-1]}]}, r"labelled is \(-1,\)"),
        ({"blocks": [{"recipies": ["baseline"]}]}, "recipies"),
        ({"recipes": {"soft": {"label": "x", "options": {"seed": 7}}}}, "options seed"),
        ({"recipes": {"soft": {"label": "x", "options": {"labelled": 7}}}}, "options labelled"),
        ({"searches": {"few": {"space": {"grid": [[8, 8, 8]]}}}}, "search 'few' may not have"),
        ({"searches": {"few": {"space": {"imitation": []}}}}, "has no imitation"),
        ({"chosen": "sotf"}, "the recipe 'sotf', which is not"),
        ({"chosen": {"7-labelled": "soft"}}, "7-labelled_soft, which is not there"),
        ({"blocks": []}, "there are no blocks"),
        ({"blocks": [{"recipes": ["baseline"], "seeds": []}]}, "block 1 has no seeds"),
        ({"options": {"labelled": 3}}, "options may not have labelled"),
        ({"options": {"search": "few"}}, "options may not have search"),
        ({"searches": {"few": SPACE | {"seeds": []}}}, "search 'few' has no seeds"),
        ({"searches": {"few": SPACE | {"folds": []}}}, "search 'few' has no folds"),
        ({"searches": {"few": SPACE | {"folds": [-1]}}}, "at least 0"),
        ({"searches": {"few": {"space": {}}}}, "search 'few' has no space"),
        ({"searches": {"few": SPACE | {"labelled": "some"}}}, "some"),
        ({"colour": "red"}, "expected the keys .*unknown keys colour"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(tmp_path, changes, message):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(CONTENT | {"chosen": "soft"} | changes))
    with pytest.raises(UserError, match=message):
        read_design(str(file))


def test_a_study_need_not_say_which_recipe_is_chosen(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(CONTENT))
    assert read_design(str(file)).facts()["chosen"] == ()


def test_a_study_that_is_not_there_names_those_that_are():
    with pytest.raises(UserError, match="one of brats2021, lgg, lgg_fine, phantoms"):
        read_design("nothing")


def test_options_become_arguments_that_others_may_follow():
    options = {"preset": "cpu", "grid": [8, 8, 8]}
    arguments = design(Block(("baseline",)), options=options).arguments()
    assert arguments == ["--labelled", "null", "--preset", "cpu", "--grid", "[8, 8, 8]"]
