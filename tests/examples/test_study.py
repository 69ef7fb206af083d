"""A study from its file to its stored rows, on tiny phantoms."""

import json
import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml
from quick import PLAIN, TINY

import study
from kdnet.errors import UserError
from kdnet.results.stored import read_folder
from kdnet.runs.folder import Folder
from kdnet.stopping import StoppedError
from kdnet.studies.design import Search
from kdnet.studies.search import check_unchanged_search
from kdnet.training.checkpoint import read_metadata
from phantoms import generate_phantoms

SMALL = [*TINY, *PLAIN, "--jobs", "1"]
FILE = {
    "title": "A tiny study",
    "options": {
        "activation": "sigmoid",
        "folds": 2,
        "validation_fraction": 0,
        "selection": "last",
        "schedule": "onecycle",
        "epochs": 1,
        "samples_per_epoch": 3,
        "batch_size": 2,
    },
    "recipes": {
        "soft": {"label": "soft targets", "options": {"binarisation": "soft"}},
        "parts": {"label": "out of fold", "options": {"out_of_fold": 2, "latent_weight": 0.0}},
    },
    "chosen": "soft",
    "blocks": [
        {"recipes": ["baseline", "soft"], "labelled": [2], "seeds": [0, 1]},
        {"recipes": ["baseline", "parts"]},
    ],
    "searches": {
        "few": {"labelled": 1, "space": {"imitation": [0.5, 0.9]}, "options": {"temperature": 1.0}}
    },
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("study")
    data = generate_phantoms(folder / "phantoms", subjects=8, seed=0, size=16, progress=False)
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(FILE))
    return ["--study", str(file), "--data-root", str(data), *SMALL]


@pytest.fixture(scope="module")
def finished(train_alone, arguments, tmp_path_factory) -> Path:
    """A folder in which every unit is trained."""
    out = tmp_path_factory.mktemp("runs") / "study"
    assert train_alone(study, [*arguments, "--out", str(out)]) == 0
    return out


def seen_by(out, row):
    model = Folder(out).unit(f"{row}/fold0-seed0").model
    return {*read_metadata(model).seen_cases}


def held_out(out):
    return {*json.loads((out / "folds.json").read_text())["folds"][0]["test"]}


def test_every_recipe_count_fold_and_seed_is_stored(finished):
    results = read_folder(finished)
    kinds = {name: row.kind for name, row in results.rows.items()}
    scores = results.scores.assign(kind=results.scores["row"].map(kinds))
    columns = ["kind", "labelled", "unlabelled", "fold", "seed"]
    units = {*scores[columns].itertuples(index=False, name=None)}
    rows = (("teacher", 0, [0]), ("baseline", 0, [0, 1]), ("soft", 2, [0, 1]))
    few = {
        (kind, 2, unlabelled, fold, seed)
        for kind, unlabelled, seeds in rows
        for fold, seed in product((0, 1), seeds)
    }
    every = {(kind, 4, 0, fold, 0) for kind in ("teacher", "baseline", "parts") for fold in (0, 1)}
    assert units == few | every
    assert {*scores["steps"]} == {2}
    assert scores["case"].nunique() == 8


def test_no_teacher_has_seen_more_labels_than_its_student(finished):
    rows = ("2-labelled_teacher", "2-labelled_baseline", "2-labelled_soft", "all-labelled_teacher")
    seen = {row: seen_by(finished, row) for row in rows}
    assert seen["2-labelled_teacher"] == seen["2-labelled_baseline"]
    assert len(seen["2-labelled_teacher"]) == 2
    assert seen["2-labelled_soft"] == seen["all-labelled_teacher"]
    assert not held_out(finished) & set().union(*seen.values())
    # Teachers without a part share no subject.
    one, other = (seen_by(finished, f"all-labelled_teacher-without-{k}-of-2") for k in (0, 1))
    assert not one & other
    assert len(one | other) == 4


def test_a_second_start_writes_the_same_rows(finished, arguments, monkeypatch, capsys):
    before = (finished / "scores.csv").read_bytes()
    monkeypatch.setattr("kdnet.runs.pool.run_unit", None)
    assert study.main([*arguments, "--out", str(finished)]) == 0
    assert (finished / "scores.csv").read_bytes() == before
    assert str(finished / "tables.md") in capsys.readouterr().out
    assert (finished / "headline.png").is_file()


@pytest.mark.usefixtures("training_alone")
def test_some_units_alone_are_trained_with_their_teachers(arguments, tmp_path):
    out = tmp_path / "study"
    assert study.main([*arguments, "--out", str(out), "--only", "2-labelled_soft/fold1-seed1"]) == 0
    trained = {file.parts[-3] for file in out.glob("units/*/*/model.safetensors")}
    assert trained == {"2-labelled_teacher", "2-labelled_soft"}


@pytest.mark.usefixtures("training_alone")
def test_a_search_never_reads_the_test_subjects_of_its_fold(finished, arguments, tmp_path):
    out = tmp_path / "study"
    assert study.main([*arguments, "--out", str(out), "--search", "few", "--trials", "1"]) == 0
    inner = json.loads((out / "search-few" / "run" / "folds.json").read_text())["folds"][0]
    assert not held_out(finished) & {*inner["train"], *inner["test"]}
    (trial,) = json.loads((out / "search-few" / "trials.json").read_text())
    assert {*trial} == {"number", "options", "dice", "gain"}


@pytest.mark.usefixtures("training_alone")
def test_a_search_goes_on_with_a_trial_that_was_cut_short(arguments, tmp_path, monkeypatch):
    def cut_short(*_):
        raise StoppedError(signal.SIGTERM)

    out = tmp_path / "study"
    given = [*arguments, "--out", str(out), "--search", "few", "--trials", "5"]
    with monkeypatch.context() as patch:
        patch.setattr("kdnet.studies.search.run_unit", cut_short)
        assert study.main(given) == 128 + signal.SIGTERM
    assert study.main(given) == 0
    trials = json.loads((out / "search-few" / "trials.json").read_text())
    assert {*trials[0]} == {"number", "options", "dice", "gain"}
    assert sorted(trial["options"]["imitation"] for trial in trials) == [0.5, 0.9]
    units = {path.name for path in (out / "search-few" / "run" / "units").glob("trial-*")}
    assert units == {"trial-0", "trial-1"}


def test_a_search_that_has_changed_is_refused(tmp_path):
    check_unchanged_search(tmp_path / "search.json", Search({"imitation": [0.5]}))
    check_unchanged_search(tmp_path / "search.json", Search({"imitation": [0.5]}))
    with pytest.raises(UserError, match="the search has changed since it began"):
        check_unchanged_search(tmp_path / "search.json", Search({"imitation": [0.9]}))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--teacher-model", "some.safetensors"], "--teacher-model"),
        (["--search", "few", "--show", "units"], "--show"),
        (["--search", "many"], "there are: few"),
        (["--search", "far"], "found fold 7 of 2"),
        (["--only", "fold7"], "--only fold7"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(arguments, tmp_path, refusal, more, named):
    far = {"space": {"imitation": [0.5]}, "folds": [7]}
    searches = FILE["searches"] | ({"far": far} if "far" in more else {})
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(FILE | {"searches": searches}))
    given = ["--study", tmp_path / "own.yaml", *arguments[2:], "--out", tmp_path / "x"]
    assert named in refusal(study, *given, *more)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("option", [{"epoch": 3}, {"epochs": "many"}])
def test_a_mistake_in_a_studys_options_names_its_file(tmp_path, refusal, option):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(FILE | {"options": option}))
    assert str(file) in refusal(study, "--study", file)
    # What stands on the command line is not the file's.
    file.write_text(yaml.safe_dump(FILE))
    assert str(file) not in refusal(study, "--study", file, "--epoch", "3")


def test_a_study_named_in_a_configuration_file_is_not_lost(arguments, tmp_path, refusal):
    file = tmp_path / "own.yaml"
    file.write_text("study: lgg\n")
    given = ["--config", file, *arguments[2:], "--out", tmp_path / "x", "--show", "units"]
    assert "give --study on the command line" in refusal(study, *given)


def test_the_stored_command_trains_every_unit_and_tells_no_path():
    given = ["--study", "lgg", "--data-root", "/home/me/LGG", "--only", "fold0", "--jobs=2"]
    assert study.published([*given, "--epochs", "3"]).endswith(
        "study.py --study lgg --data-root LGG --epochs 3"
    )


def test_a_study_without_a_name_is_an_error(refusal):
    assert "--study" in refusal(study, "--study")


def test_neither_help_nor_a_typo_in_a_study_waits_for_pytorch(tmp_path):
    code = """
import contextlib, sys, train, crossval, study
for program in (train, crossval, study):
    with contextlib.suppress(SystemExit):
        program.main(["--help"])
for file in sys.argv[1:]:
    study.main(["--study", file])
sys.exit("torch" in sys.modules or "monai" in sys.modules)
"""
    files = [tmp_path / "value.yaml", tmp_path / "key.yaml"]
    for file, typo in zip(files, ({"binarisation": "sotf"}, {"tempreature": 2}), strict=True):
        recipes = {"soft": {"label": "soft targets", "options": typo}}
        file.write_text(yaml.safe_dump(FILE | {"recipes": recipes, "blocks": FILE["blocks"][:1]}))
    done = subprocess.run(
        [sys.executable, "-c", code, *files],
        env=os.environ | {"PYTHONPATH": str(Path(study.__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert all(f"{program}.py --" in done.stdout for program in ("train", "crossval", "study"))
    assert "sotf" in done.stderr
    assert "tempreature" in done.stderr
