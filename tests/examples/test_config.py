import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import crossval
import study
import train
from crossval import CROSSVAL
from kdnet.config import Config, ObjectiveConfig, parse_config, parse_for, recipe_file
from kdnet.errors import UserError
from kdnet.studies.design import read_design

CPU = ["--data-root", "x", "--preset", "cpu"]
NAMES = ("imitation", "temperature", "binarisation", "latent_weight")


def test_without_arguments_the_demo_runs_on_phantoms_and_real_data_take_the_cpu_preset():
    config = parse_config([])
    assert (config.run.preset, config.run.out) == ("demo", Path("runs/demo"))
    assert config.data.data_root is None
    assert parse_config(["--data-root", "patients"]).run.preset == "cpu"


def test_paper_preset_is_the_paper():
    config = parse_config(["--preset", "paper"])
    objective, training, data = config.objective, config.training, config.data
    assert tuple(getattr(objective, name) for name in NAMES) == (0.75, 5.0, "auto", 10.0)
    assert (training.epochs, training.learning_rate, training.schedule) == (500, 1e-4, "plateau")
    assert (training.plateau_factor, training.plateau_patience) == (0.2, 50)
    assert config.network.backbone_arguments["channels"] == [30, 60, 120, 240, 480]
    assert (data.folds, data.flips, data.student_modalities) == (3, True, ("t1ce",))
    assert (training.weight_decay, training.gradient_clip) == (0, 0)


def recipe(situation):
    values = yaml.safe_load(recipe_file(situation).read_text())
    return tuple(values.get(name, getattr(ObjectiveConfig(), name)) for name in NAMES)


def constants(*arguments):
    found = parse_config(list(arguments)).objective
    return tuple(getattr(found, name) for name in NAMES)


def test_small_data_follow_the_study_unless_they_are_told_otherwise():
    every, few = (recipe(file) for file in ("all", "few"))
    assert constants(*CPU) == constants("--recipe=auto", "--labelled", "null") == every
    assert constants(*CPU, "--labelled", "9") == constants(*CPU, "--unlabelled_root", "y") == few
    assert constants(*CPU, "--imitation", "0.3") == (0.3, *every[1:])
    assert constants(*CPU, "--recipe", "options")[0] == 0.75
    assert parse_for(CROSSVAL, CPU)[0].objective.imitation == 0.75


@pytest.mark.parametrize("form", [["--config", "FILE"], ["--config=FILE"]])
def test_options_in_a_file_win_over_the_recipe_in_it(tmp_path, form):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"data_root": "x", "recipe": "auto", "temperature": 3.0}))
    found = constants(*(part.replace("FILE", str(file)) for part in form))
    assert found == (*recipe("all")[:1], 3.0, *recipe("all")[2:])


@pytest.mark.parametrize("flag", ["--data-root", "--data_root"])
def test_hyphens_and_underscores_are_the_same(flag):
    assert parse_config([flag, "x"]).data.data_root == Path("x")
    assert parse_config([f"{flag}=a-b_c"]).data.data_root == Path("a-b_c")


@pytest.mark.parametrize("value", ["64,64,32", "[64, 64, 32]"])
def test_sizes_need_no_brackets(value):
    assert parse_config(["--grid", value, "--crop=null"]).data.grid == (64, 64, 32)


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: paper\nepochs: 7\nfold: 2\n")
    config = parse_config(["--config", str(file), "--fold", "1"])
    assert (config.training.epochs, config.data.fold) == (7, 1)
    assert config.training.plateau_patience == 50
    assert config.run.preset == "paper"


def test_saved_configuration_reads_back_as_it_was(tmp_path):
    config = parse_config(["--preset", "cpu", "--grid", "8,8,8", "--teacher-modalities", "t1,t2"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    assert parse_config(["--config", str(file)]) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "big"], "'big': expected one of demo, cpu, paper"),
        (["--epoch", "3"], "--epoch 3"),
        (["--epochs", "many"], '"epochs"'),
        (["--schedule", "cosine"], "'plateau', 'onecycle', 'constant'"),
        (["--fold", "3"], "fold is 3; expected 0 to 1"),
        (["--epochs", "0", "--folds", "1"], "(?s)folds is 1.*epochs is 0"),
        (["--imitation", "1.5"], "imitation is 1.5"),
        *((["--temperature", value], "temperature") for value in ("0", "-1", "warm")),
        (["--leave-out", "2,2"], r"leave_out is \(2, 2\)"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--patch", "8,8,8"], "--grid null or --patch null"),
        (["--patch", "0,8,8", "--grid", "null"], r"patch is \(0, 8, 8\)"),
        (["--preset", "native", "--slices", "axial"], "--patch null or --slices null"),
        (["--patches-per-case", "2"], "patches_per_case is 2"),
        (["--empty-slices", "0.5"], "empty_slices is 0.5"),
        (["--slices", "oblique"], "'axial', 'coronal', 'sagittal'"),
        (["--validation-fraction", "0", "--selection", "best"], "--selection last"),
        (["--out-of-fold", "2", "--latent-weight", "10"], "--latent-weight 0"),
        (["--validation-loss", "ground_truth", "--imitation", "1"], "validation_loss"),
    ],
)
def test_mistakes_on_the_command_line_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_config(arguments)


@pytest.mark.parametrize("program", [CROSSVAL, study.STUDY])
def test_a_recipe_is_refused_where_rows_say_how_they_are_taught(program):
    with pytest.raises(UserError, match=r"train\.py"):
        parse_for(program, ["--recipe", "auto"])
    # A preset's is for train.py alone.
    assert parse_for(program, ["--preset", "cpu"])[0].objective.imitation == 0.75


def test_a_file_with_an_unknown_key_is_refused(tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text("epoch: 3\n")
    with pytest.raises(UserError, match="epoch"):
        parse_config(["--config", str(file)])


def shown(capsys, main, flag):
    with pytest.raises(SystemExit) as leaving:
        main([flag])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    return text, {*re.findall(r"^ +--([\w-]+)", text, re.MULTILINE)}


@pytest.mark.parametrize("program", [train, crossval, study])
def test_help_shows_what_people_use_first_and_help_all_every_option(program, capsys):
    text, first = shown(capsys, program.main, "--help")
    assert len(first - {"help-all", "config"}) == 12
    assert "Examples:\n" in text
    assert len(re.findall(r"configs/demo\.yaml", text)) == 1
    assert str(Path(program.__file__).parent) not in text
    text, every = shown(capsys, program.main, "--help-all")
    assert "Source: the paper" in text
    assert every >= first | {name.replace("_", "-") for name in Config().to_dict()}


def test_another_backbone_does_not_inherit_the_arguments_of_the_presets_own():
    assert parse_config(["--backbone", "multiresunet"]).network.backbone_arguments == {}
    given = ["--backbone", "x.Y", "--backbone-arguments", '{"channels": [1, 2]}']
    assert parse_config(given).network.backbone_arguments == {"channels": [1, 2]}
    assert "channels" in parse_config([]).network.backbone_arguments


def test_teacher_and_student_share_one_backbone_unless_told_otherwise():
    network = parse_config(["--backbone-arguments", '{"channels": [2, 4]}']).network
    assert network.of("teacher") == network.of("student") == ("kdnet", {"channels": [2, 4]})


@pytest.mark.parametrize(
    ("arguments", "teacher"),
    [
        (["--teacher-backbone", "x.Y"], ("x.Y", {})),
        (["--backbone", "x.Y", "--teacher-backbone", "x.Y"], ("x.Y", {})),
        (["--teacher-backbone-arguments", '{"channels": [4, 8]}'], ("kdnet", {"channels": [4, 8]})),
        (
            ["--backbone", "x.Y", "--teacher-backbone", "kdnet"],
            ("kdnet", {"channels": [8, 16, 32, 64], "prior": 0.01}),
        ),
        (
            ["--teacher-backbone", "x.Y", "--teacher-backbone-arguments", '{"width": 4}'],
            ("x.Y", {"width": 4}),
        ),
    ],
)
def test_a_teacher_of_its_own_has_arguments_of_its_own(arguments, teacher):
    network = parse_config(arguments).network
    assert network.of("teacher") == teacher
    assert network.of("baseline") == network.of("student")


def test_native_preset_has_patches_and_no_grid():
    config = parse_config(["--preset", "native"])
    paper = parse_config(["--preset", "paper"])
    assert (config.data.patch, config.data.grid, config.data.crop) == ((128, 128, 128), None, None)
    assert config.network == paper.network
    assert config.objective == replace(paper.objective, temperature="fit")
    assert config.training == paper.training


def test_recipe_auto_is_what_the_study_chose():
    """Changing configs/recipes needs another study: studies/lgg.yaml, when-it-helps."""
    fine, coarse = read_design("lgg_fine"), read_design("lgg")
    few = fine.recipes[fine.chosen["20-labelled"]]
    # With all labels no recipe gained; that of few labels in the first study did no harm.
    every = coarse.recipes[coarse.chosen["20-labelled"]]
    for situation, recipe in (("few", few), ("all", every)):
        assert yaml.safe_load(recipe_file(situation).read_text()) == recipe.options
