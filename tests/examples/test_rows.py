import pytest
from quick import QUICK

from kdnet.config import Config, ObjectiveConfig, parse_config
from kdnet.data.description import load_description
from kdnet.errors import UserError
from kdnet.rows import Row, read_rows, select_rows, sweep, with_part_teachers
from kdnet.runs.networks import build, describe_network


@pytest.fixture(scope="module")
def config() -> Config:
    return parse_config([*QUICK, "--backbone-arguments", '{"channels": [2, 4]}'])


def names(rows):
    return [row.name for row in rows]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_built_in_rows_have_options_that_the_configuration_knows(config):
    rows, groups = read_rows()
    for row in rows.values():
        row.configure(config)
        assert row.against is None or row.against in rows
    for members in groups.values():
        assert select_rows(members, rows, groups)


@pytest.mark.parametrize("name", read_rows()[0])
def test_the_network_of_every_built_in_row_can_be_built(config, name):
    row = read_rows()[0][name]
    build(describe_network(row.role, row.configure(config), load_description("brats2021"), name))


def test_rows_of_table_two_differ_from_the_paper_in_one_switch(config):
    rows, _ = read_rows()
    found = {name: rows[name].configure(config).objective for name in ("gt_kl", "gt_kd")}
    assert (found["gt_kl"].imitation, found["gt_kl"].latent_weight) == (0, 10)
    assert (found["gt_kd"].imitation, found["gt_kd"].latent_weight) == (0.75, 0)


def test_a_row_that_is_measured_against_no_row_is_refused_where_it_is_trained(tmp_path):
    rows, groups = read_rows(write(tmp_path / "own.yaml", "rows: {mine: {against: nope}}"))
    assert select_rows(["kdnet"], rows, groups)
    with pytest.raises(UserError, match="no row 'nope'"):
        select_rows(["mine"], rows, groups)


def test_a_row_says_what_it_is_measured_against(tmp_path):
    file = write(tmp_path / "own.yaml", "rows: {mild: {}, pet: {against: mild}, x: {against: }}")
    rows, _ = read_rows(file)
    chosen = ("teacher", "baseline", "kdnet", "hemis", "kdnet_0skips", "mild", "pet", "x")
    assert {name: rows[name].against for name in chosen} == {
        "teacher": None,
        "baseline": None,
        "kdnet": "baseline",
        "hemis": "baseline",
        "kdnet_0skips": "baseline_0skips",
        "mild": "baseline",
        "pet": "mild",
        "x": None,
    }


@pytest.mark.parametrize(
    ("row", "arguments"),
    [
        (
            Row("shallow", options={"backbone_arguments": {"skip_connections": 0}}),
            {"channels": [2, 4], "skip_connections": 0},
        ),
        (Row("other", options={"backbone": "multiresunet"}), {}),
        (read_rows()[0]["hemis"], {"channels": [4, 8, 16, 32]}),
        (
            read_rows()[0]["synthesised"],
            {"segmenter": "kdnet", "segmenter_arguments": {"channels": [2, 4]}},
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Row) else "",
)
def test_arguments_of_a_row_are_added_to_those_that_the_run_has_for_its_network(
    config, row, arguments
):
    assert row.configure(config).network.backbone_arguments == arguments


def test_under_the_papers_preset_networks_have_their_own_size():
    paper = parse_config(["--preset", "paper"])
    assert read_rows()[0]["hemis"].configure(paper).network.backbone_arguments == {}


def test_a_value_that_makes_no_sense_names_the_row(config):
    with pytest.raises(UserError, match=r"Row 'cold'.*temperature is 0.0"):
        Row("cold", options={"temperature": 0.0}).configure(config)
    with pytest.raises(UserError, match=r"Row 'wrong'.*epochs"):
        Row("wrong", options={"epochs": "many"}).configure(config)


def test_teachers_come_by_themselves_and_first_and_every_row_once():
    found = names(select_rows(["kdnet", "kdnet_0skips"], *read_rows()))
    assert found == ["teacher", "kdnet", "teacher_0skips", "kdnet_0skips"]
    found = names(select_rows(["paper", "table2", "baseline"], *read_rows()))
    assert len(found) == len(set(found)) == 10


def test_unknown_rows_and_teachers_in_a_circle_are_refused():
    with pytest.raises(UserError, match=r"'kdnett'.*teacher, baseline, kdnet"):
        select_rows(["kdnett"], *read_rows())
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
    assert names(select_rows(["both"], rows, groups)) == ["teacher", "mild", "baseline"]
    assert rows["baseline"].label == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: {a: {recipe: magic}}", "row 'a': .*recipe"),
        ("rows: {a: {recipe: distilled}}", "row 'a': .*teacher"),
        ("rows: {a: {role: pupil}}", "row 'a': .*role"),
        ("rows: {a: {options: 5}}", "row 'a': .*options"),
        ("rows: {a: {small: 3}}", "row 'a': .*small"),
        ("rows: {a: {labelled: few}}", "row 'a': .*labelled"),
        ("rows: {a: 5}", "row 'a': expected the keys recipe"),
        ("rows: {a: {options: {backbone_arguments: 3}}}", "backbone_arguments"),
        ("rows: {a: {teacher: teacher}}", "the recipe supervised takes no teacher"),
        ("rows: {a: {more_teachers: [teacher]}}", "more_teachers"),
        ("rows: {a: {options: {teacher_model: x}}}", "no options teacher_model"),
        ("rows: {a: {options: {labelled: 4}}}", "no options labelled"),
        ("rows: {predictions: {}}", "predictions"),
        ("groups: {a: baseline}", "groups"),
        ("rows: {a: {epochs: 3}}", "row 'a': expected the keys recipe"),
        ("rows: {../a: {}}", "name"),
        ("rows: [a]", "rows"),
        ("lines: {}", "expected the keys rows, groups"),
        ("rows: {", "cannot be read"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, text, message):
    with pytest.raises(UserError, match=rf"(?s)rows\.yaml.*{message}"):
        read_rows(write(tmp_path / "rows.yaml", text))


def test_a_sweep_repeats_students_and_shares_their_teacher(config):
    rows = select_rows(["baseline", "kdnet"], *read_rows())
    swept = {row.name: row for row in sweep(rows, ("t1", "FLAIR"))}
    repeated = ["baseline-t1", "kdnet-t1", "baseline-flair", "kdnet-flair"]
    assert list(swept) == ["teacher", *repeated]
    assert (swept["kdnet-flair"].teacher, swept["kdnet-t1"].against) == ("teacher", "baseline-t1")
    assert swept["baseline-flair"].configure(config).data.student_modalities == ("FLAIR",)
    alone = sweep([Row("small"), Row("smaller", "distilled", teacher="small")], ("t1",))
    assert alone[1].teacher == "small-t1"


TEACHER = Row("teacher", role="teacher", labelled=20)
STUDENT = Row("student", recipe="distilled", teacher="teacher")


def test_out_of_fold_gives_a_student_a_teacher_without_each_part():
    config = Config(objective=ObjectiveConfig(out_of_fold=2, latent_weight=0.0))
    rows = with_part_teachers((TEACHER, Row("baseline"), STUDENT, Row("b")), config)
    parts = ("teacher-without-0-of-2", "teacher-without-1-of-2")
    assert names(rows) == ["teacher", "baseline", *parts, "student", "b"]
    assert rows[4].teachers == parts
    assert [row.labelled for row in rows[2:4]] == [20, 20]
    assert [row.options["leave_out"] for row in rows[2:4]] == [[0, 2], [1, 2]]
    assert with_part_teachers((TEACHER, STUDENT), Config()) == (TEACHER, STUDENT)


def test_students_share_part_teachers_and_each_row_may_ask_for_its_own_number():
    options = {"out_of_fold": 3, "latent_weight": 0.0}
    own = [Row(name, "distilled", teacher="teacher", options=options) for name in ("a", "b")]
    assert len(with_part_teachers((TEACHER, *own), Config())) == 6
    with pytest.raises(UserError, match="--latent-weight 0"):
        Row("a", "distilled", teacher="teacher", options={"out_of_fold": 2}).configure(Config())
