import pytest

from kdnet.config import Config, parse_config
from kdnet.errors import UserError
from kdnet.recipes.rows import Row, read_rows, select_rows, sweep


@pytest.fixture(scope="module")
def config() -> Config:
    return parse_config(["--backbone_arguments", '{"channels": [2, 4]}'])


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_built_in_rows_have_options_that_the_configuration_knows(config):
    rows, groups = read_rows()
    for row in rows.values():
        row.configure(config)
    for members in groups.values():
        assert select_rows(members, rows, groups)


def test_rows_of_table_two_differ_from_the_paper_in_one_switch(config):
    rows, _ = read_rows()
    assert rows["gt_kl"].configure(config).objective.imitation == 0
    assert rows["gt_kl"].configure(config).objective.latent_weight == 10
    assert rows["gt_kd"].configure(config).objective.latent_weight == 0
    assert rows["gt_kd"].configure(config).objective.imitation == 0.75


def test_arguments_of_a_row_are_added_to_those_of_the_run(config):
    row = Row("shallow", options={"backbone_arguments": {"skip_connections": 0}})
    arguments = row.configure(config).network.backbone_arguments
    assert arguments == {"channels": [2, 4], "skip_connections": 0}


def test_another_backbone_gets_none_of_the_arguments_of_the_run(config):
    row = Row("other", options={"backbone": "multiresunet"})
    assert row.configure(config).network.backbone_arguments == {}


def test_small_presets_get_small_networks_and_the_paper_its_own(config):
    row = read_rows()[0]["hemis"]
    assert row.configure(config).network.backbone_arguments == {"channels": [4, 8, 16, 32]}
    paper = parse_config(["--preset", "paper"])
    assert row.configure(paper).network.backbone_arguments == {}


def test_a_synthesised_modality_is_segmented_by_the_network_of_the_run(config):
    network = read_rows()[0]["synthesised"].configure(config).network
    assert network.backbone == "synthesis"
    assert network.backbone_arguments["segmenter_arguments"] == {"channels": [2, 4]}


def test_a_value_that_makes_no_sense_names_the_row(config):
    with pytest.raises(UserError, match=r"Row 'cold'.*temperature is 0.0; expected above 0"):
        Row("cold", options={"temperature": 0.0}).configure(config)
    with pytest.raises(UserError, match=r"Row 'wrong'.*epochs"):
        Row("wrong", options={"epochs": "many"}).configure(config)


def test_teachers_come_by_themselves_and_first():
    names = [row.name for row in select_rows(["kdnet", "kdnet_0skips"], *read_rows())]
    assert names == ["teacher", "kdnet", "teacher_0skips", "kdnet_0skips"]


def test_a_row_in_two_groups_is_trained_once():
    names = [row.name for row in select_rows(["paper", "table2", "baseline"], *read_rows())]
    assert len(names) == len(set(names)) == 10


def test_an_unknown_row_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"no row 'kdnett'\. Rows: teacher, baseline, kdnet"):
        select_rows(["kdnett"], *read_rows())


def test_teachers_in_a_circle_are_refused():
    rows = {"a": Row("a", "distilled", teacher="b"), "b": Row("b", "distilled", teacher="a")}
    with pytest.raises(UserError, match="circle"):
        select_rows(["a"], rows, {})


def test_rows_of_a_file_are_added_and_win(tmp_path):
    file = write(
        tmp_path / "rows.yaml",
        "rows:\n  mild: {recipe: distilled, teacher: teacher, options: {temperature: 2.0}}\n"
        "  baseline: {label: mine}\n"
        "groups: {both: [mild, baseline]}\n",
    )
    rows, groups = read_rows(file)
    assert [row.name for row in select_rows(["both"], rows, groups)] == [
        "teacher",
        "mild",
        "baseline",
    ]
    assert rows["baseline"].label == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: {a: {recipe: magic}}", "row 'a': recipe must be one of supervised"),
        ("rows: {a: {recipe: distilled}}", "row 'a': distilled and shared need a teacher"),
        ("rows: {a: {role: pupil}}", r"row 'a': .*role"),
        ("rows: {a: {options: 5}}", r"row 'a': .*options"),
        ("rows: {a: {small: 3}}", r"row 'a': .*small"),
        ("rows: {a: {recipe: [x]}}", r"row 'a': .*recipe"),
        ("rows: {a: {options: {backbone_arguments: 3}}}", "must be names and values"),
        ("rows: {a: {teacher: teacher}}", "the recipe supervised takes no teacher"),
        ("rows: {a: {options: {teacher_model: x}}}", "it has no options teacher_model"),
        ("rows: {predictions: {}}", "a folder that all rows share"),
        ("groups: {a: baseline}", "group 'a' must be a list"),
        ("rows: {a: {epochs: 3}}", "row 'a' may have the keys recipe"),
        ("rows: {a: {options: {seed: 3}}}", "row 'a': it has no options seed"),
        ("rows: {../a: {}}", "its name must match"),
        ("rows: [a]", "rows must hold names"),
        ("lines: {}", "expected the keys rows and groups"),
        ("rows: {", "cannot be read"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read_rows(write(tmp_path / "rows.yaml", text))
    assert "rows.yaml" in str(caught.value)


def test_a_sweep_repeats_students_and_shares_their_teacher(config):
    rows = select_rows(["baseline", "kdnet"], *read_rows())
    swept = {row.name: row for row in sweep(rows, ("t1", "FLAIR"))}
    assert list(swept) == [
        *("teacher", "baseline-t1", "kdnet-t1"),
        *("baseline-flair", "kdnet-flair"),
    ]
    assert swept["kdnet-flair"].teacher == "teacher"
    assert swept["baseline-flair"].configure(config).data.student_modalities == ("FLAIR",)


def test_a_swept_teacher_that_sees_what_the_student_sees_is_repeated_too():
    rows = [Row("small"), Row("smaller", "distilled", teacher="small")]
    assert sweep(rows, ("t1",))[1].teacher == "small-t1"
