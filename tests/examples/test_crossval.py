import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file

import crossval
from kdnet.config import parse_for
from kdnet.errors import UserError
from kdnet.evaluation.scoring import read_scores
from kdnet.runs.folder import open_plan
from kdnet.runs.jobs import number_of_jobs
from kdnet.runs.plan import Plan
from kdnet.runs.schedule import run_here
from kdnet.runs.view import View
from kdnet.training.checkpoint import read_metadata
from phantoms import generate_phantoms

QUIET = Console(quiet=True)
SMALL = [
    *("--backbone_arguments", '{"channels": [2, 4]}', "--grid", "8,8,8", "--threads", "1"),
    *("--precision", "32-true", "--memory_format", "contiguous", "--workers", "1"),
    *("--epochs", "1", "--folds", "2", "--jobs", "1", "--preset", "demo"),
]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> Path:
    return generate_phantoms(
        tmp_path_factory.mktemp("data") / "phantoms", subjects=6, seed=0, size=16, progress=False
    )


@pytest.fixture(scope="module")
def arguments(subjects) -> list[str]:
    return ["--data-root", str(subjects), "--rows", "baseline,kdnet", *SMALL]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    """A folder in which teacher, baseline and kdnet are trained on both folds."""
    out = tmp_path_factory.mktemp("runs") / "crossval"
    threads = torch.get_num_threads()
    assert crossval.main([*arguments, "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def plan_of(arguments, out) -> Plan:
    return open_plan(*parse_for(crossval.CROSSVAL, [*arguments, "--out", str(out)]), QUIET)


def failure(capsys, arguments, out):
    assert crossval.main([*arguments, "--out", str(out)]) == 2
    return capsys.readouterr().err


def test_every_row_is_scored_on_every_subject_once(finished, subjects):
    scores = read_scores(finished / "scores.csv")
    names = {path.name for path in subjects.iterdir() if path.is_dir()}
    for role in ("teacher", "baseline", "kdnet"):
        cases = [s.case for s in scores if (s.role, s.space, s.region) == (role, "grid", "ET")]
        assert sorted(cases) == sorted(names)
    assert {score.fold for score in scores} == {0, 1}


def test_no_network_has_seen_what_it_is_scored_on(finished):
    for place in ("fold0-seed0", "fold1-seed0"):
        held_out = set(json.loads((finished / place / "cases.json").read_text())["test"])
        for role in ("teacher", "baseline", "kdnet"):
            metadata = read_metadata(finished / place / role / "model.safetensors")
            assert metadata.role == role
            assert not held_out & set(metadata.seen_cases)


def test_tables_and_report_are_written_with_the_protocol(finished):
    text = (finished / "tables.md").read_text(encoding="utf-8")
    assert text.startswith("# phantom (phantoms, not patients), 6 cases, 2 folds, seed 0")
    for title in (
        "Table 1, comparison, training grid",
        "Gain over baseline, Dice in points of 100, native space",
        "Results, native space, small regions removed",
        "Cost",
    ):
        assert f"**{title}" in text
    assert "71.67 ± 1.22" in text
    assert "not run" in text
    assert (finished / "report.html").is_file()


def test_what_a_reviewer_asks_of_the_data_is_kept(finished):
    facts = json.loads((finished / "crossval.json").read_text())
    assert facts["grades"] == {"not stated": 6}
    digest = hashlib.sha256((finished / "folds.json").read_bytes()).hexdigest()
    assert facts["folds_sha256"] == digest
    assert digest in (finished / "report.html").read_text(encoding="utf-8")


@pytest.mark.skipif(importlib.util.find_spec("panoptica") is not None, reason="it is installed")
def test_lesions_without_panoptica_are_refused_before_anything_is_trained(
    arguments, tmp_path, capsys
):
    message = failure(capsys, [*arguments, "--lesions", "true"], tmp_path / "new")
    assert "pip install --no-deps 'panoptica" in message
    assert not (tmp_path / "new").exists()


def test_lesions_of_all_label_maps_are_written(finished, arguments, monkeypatch):
    seen = []

    def score(folder, subjects, description, *, role, **place):
        seen.append((role, len(list(subjects)), place["fold"]))
        assert len(list(folder.glob("*_seg.nii.gz"))) == 3
        return []

    monkeypatch.setattr("crossval.load_panoptica", lambda: None)
    monkeypatch.setattr("kdnet.runs.results.score_folder", score)
    assert crossval.main([*arguments, "--lesions", "true", "--out", str(finished)]) == 0
    assert sorted(seen) == [(r, 3, f) for r in ("baseline", "kdnet", "teacher") for f in (0, 1)]
    assert (finished / "lesions.csv").is_file()


def test_a_second_start_trains_nothing_again(finished, arguments, capsys, monkeypatch):
    monkeypatch.setattr("kdnet.runs.schedule.run_unit", None)
    assert crossval.main([*arguments, "--out", str(finished)]) == 0
    assert "6 units, 6 done" in capsys.readouterr().out


def test_a_row_that_is_added_is_all_that_is_trained(copy, arguments, monkeypatch):
    trained = []
    monkeypatch.setattr("kdnet.runs.schedule.run_unit", lambda _, u, __: trained.append(u.name))
    assert crossval.main([*arguments, "--rows", "gt_kl,baseline", "--out", str(copy)]) == 0
    assert trained == ["fold0-seed0/gt_kl", "fold1-seed0/gt_kl"]
    # The rows of the first start stay in the results.
    assert {score.role for score in read_scores(copy / "scores.csv")} >= {"kdnet", "teacher"}


def test_a_lost_score_file_costs_no_training(copy, arguments):
    unit = copy / "fold0-seed0" / "kdnet"
    before = load_file(unit / "model.safetensors")
    scores = (unit / "scores.csv").read_text()
    (unit / "scores.csv").unlink()
    assert crossval.main([*arguments, "--out", str(copy)]) == 0
    assert (unit / "scores.csv").read_text() == scores
    after = load_file(unit / "model.safetensors")
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_a_network_that_has_seen_the_test_fold_is_refused(copy, arguments, capsys):
    own, other = (copy / place / "teacher" for place in ("fold0-seed0", "fold1-seed0"))
    shutil.copy(other / "model.safetensors", own / "model.safetensors")
    shutil.rmtree(copy / "fold0-seed0" / "kdnet")
    assert crossval.main([*arguments, "--out", str(copy)]) == 1
    output = capsys.readouterr().out
    assert "fold0-seed0/kdnet failed" in output
    assert "subjects of the held-out fold" in output


@pytest.mark.parametrize("columns", [0, 4, 15])
def test_a_score_file_that_lacks_columns_or_cases_is_named(copy, arguments, capsys, columns):
    lost = copy / "fold0-seed0" / "baseline" / "scores.csv"
    header = lost.read_text().splitlines()[0].split(",")
    lost.write_text(",".join(header[:columns]) + "\n" * bool(columns))
    message = failure(capsys, arguments, copy)
    assert str(lost) in message
    assert ("lacks 3 of the held-out subjects" in message) == (columns == 15)


@pytest.mark.parametrize("name", ["folds.json", "crossval.json"])
def test_a_damaged_file_of_the_folder_is_named(copy, arguments, capsys, name):
    (copy / name).write_text("{")
    assert f"{name} is damaged" in failure(capsys, arguments, copy)


def test_a_lost_model_file_leaves_the_tables(copy, arguments):
    (copy / "fold0-seed0" / "kdnet" / "model.safetensors").write_bytes(b"cut")
    assert crossval.main([*arguments, "--out", str(copy)]) == 0
    text = (copy / "tables.md").read_text(encoding="utf-8")
    assert "kdnet: " in text
    assert "model.safetensors" in text


def test_the_protocol_says_what_decides_the_numbers(finished):
    protocol = json.loads((finished / "crossval.json").read_text())["protocol"]
    assert protocol == (
        "phantom (phantoms, not patients), 6 cases, 2 folds, seed 0, student sees t1ce, grid "
        "8x8x8, kdnet (softmax), lambda 0.75, T 5, alpha 10, 1 epoch, 32-true, contiguous"
    )


def test_a_built_in_row_that_was_redefined_is_named_in_the_protocol(arguments, tmp_path):
    rows = tmp_path / "rows.yaml"
    rows.write_text("rows: {baseline: {label: mine}}")
    out = tmp_path / "run"
    more = ["--rows_file", str(rows), "--rows", "baseline", "--show", "units"]
    assert crossval.main([*arguments, *more, "--out", str(out)]) == 0
    protocol = json.loads((out / "crossval.json").read_text())["protocol"]
    assert protocol.endswith("; rows that are not the built-in ones: baseline")


def test_a_new_student_of_a_known_teacher_is_tried_with_it(arguments, tmp_path):
    rows = tmp_path / "rows.yaml"
    rows.write_text(
        "rows:\n  coach: {role: teacher}\n  s1: {recipe: distilled, teacher: coach}\n"
        "  s2: {recipe: distilled, teacher: coach}\n"
    )
    more = [*arguments, "--rows_file", str(rows), "--show", "units", "--out", str(tmp_path / "o")]
    assert crossval.main([*more, "--rows", "s1"]) == 0
    assert crossval.main([*more, "--rows", "s1,s2"]) == 0


def test_a_given_teacher_that_has_seen_any_test_fold_is_refused(
    finished, arguments, tmp_path, capsys
):
    model = finished / "fold0-seed0" / "teacher" / "model.safetensors"
    message = failure(capsys, [*arguments, "--teacher_model", str(model)], tmp_path / "new")
    assert "test subjects of fold 1" in message
    assert not (tmp_path / "new" / "folds.json").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--epochs", "2"], "epochs: 1 there, 2 now"),
        (["--repeats", "2"], "the folds have changed"),
        (["--fold", "1"], "does not take --fold"),
        (["--devices", "2"], "does not take --devices"),
        (["--rows", "nobody"], "no row 'nobody'"),
        (["--repeats", "0"], "--repeats is 0; expected 1 or more"),
        (["--seeds", "1,1"], "--seeds names a seed twice"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--unit", "fold9-seed0/kdnet"], "there is no unit 'fold9-seed0/kdnet'"),
    ],
)
def test_what_does_not_fit_the_folder_is_named_and_nothing_is_touched(
    finished, arguments, capsys, changed, named
):
    before = {path: path.read_bytes() for path in finished.glob("*.*") if path.is_file()}
    assert named in failure(capsys, [*arguments, *changed], finished)
    assert before == {path: path.read_bytes() for path in finished.glob("*.*") if path.is_file()}


def test_another_row_under_a_known_name_is_refused(finished, arguments, tmp_path, capsys):
    rows = tmp_path / "rows.yaml"
    rows.write_text(
        "rows: {kdnet: {recipe: distilled, teacher: teacher, options: {temperature: 2}}}"
    )
    message = failure(capsys, [*arguments, "--rows_file", str(rows)], finished)
    assert "other rows under the names kdnet" in message


def test_a_row_that_cannot_be_built_is_named_before_anything_is_written(
    arguments, tmp_path, capsys
):
    rows = tmp_path / "rows.yaml"
    rows.write_text("rows: {odd: {options: {backbone: no.such.Network}}}")
    message = failure(
        capsys, [*arguments, "--rows_file", str(rows), "--rows", "odd"], tmp_path / "new"
    )
    assert "Row 'odd': Network 'no.such.Network' cannot be imported" in message
    assert not (tmp_path / "new").exists()


def test_a_network_that_never_sees_what_it_is_scored_with_is_refused_first(
    arguments, tmp_path, capsys
):
    flags = ["--rows", "hemis", "--teacher_modalities", "flair,t2"]
    message = failure(capsys, [*arguments, *flags], tmp_path / "new")
    assert "Row 'hemis': its network is trained with flair, t2 (--teacher_modalities)" in message
    assert "scored with t1ce (--student_modalities)" in message
    assert not (tmp_path / "new").exists()


def test_every_single_modality_may_be_what_a_synthesis_begins_with(arguments, tmp_path):
    plan = plan_of([*arguments, "--rows", "synthesised", "--sweep", "modalities"], tmp_path / "new")
    assert len(plan.rows) == 4


def test_a_failed_unit_stops_its_students_alone(copy, arguments, monkeypatch):
    plan = plan_of(arguments, copy)
    for row in ("teacher", "baseline", "kdnet"):
        (copy / "fold0-seed0" / row / "scores.csv").unlink()

    def fail(plan, unit, console):
        if unit.name == "fold0-seed0/teacher":
            raise UserError("its loss is not finite")
        done.append(unit.name)

    done: list[str] = []
    monkeypatch.setattr("kdnet.runs.schedule.run_unit", fail)
    failed = run_here(plan, plan.units(), QUIET)
    assert failed == {
        "fold0-seed0/teacher": "its loss is not finite",
        "fold0-seed0/kdnet": "its teacher fold0-seed0/teacher failed",
    }
    assert done == ["fold0-seed0/baseline"]


def test_seeds_share_folds_and_differ_in_weights(copy, arguments):
    more = [*arguments, "--seeds", "0,1", "--rows", "baseline"]
    assert crossval.main([*more, "--out", str(copy)]) == 0
    first, second = (
        load_file(copy / f"fold0-seed{seed}" / "baseline" / "model.safetensors") for seed in (0, 1)
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)
    cases = [(copy / f"fold0-seed{seed}" / "cases.json").read_text() for seed in (0, 1)]
    assert cases[0] == cases[1]


def test_units_are_listed_with_teachers_first(finished, arguments, capsys):
    assert crossval.main([*arguments, "--out", str(finished), "--show", "units"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6].split() == ["0", "fold0-seed0/teacher", "done"]
    assert lines[-1].split() == ["5", "fold1-seed0/kdnet", "done"]


def test_status_shows_the_dice_of_what_is_done_and_the_epochs_of_what_is_not(copy, arguments):
    plan = plan_of(arguments, copy)
    (copy / "fold0-seed0" / "kdnet" / "scores.csv").unlink()
    unit = plan.find("fold0-seed0/kdnet")
    assert View(plan, plan.units()).state(unit) == "1/1"
    shutil.rmtree(copy / "fold0-seed0" / "kdnet")
    assert View(plan, plan.units()).state(unit) == "\N{MIDDLE DOT}"
    assert View(plan, plan.units()).state(plan.find(0)).startswith("Dice 0.")


def test_one_unit_trains_its_teacher_and_nothing_else(arguments, tmp_path):
    out = tmp_path / "array"
    assert crossval.main([*arguments, "--out", str(out), "--unit", "5"]) == 0
    assert sorted(path.parent.name for path in out.glob("*/*/scores.csv")) == ["kdnet", "teacher"]


def test_phantoms_are_the_same_for_every_seed(tmp_path):
    generated = ["--phantoms", "6", "--phantom_size", "16", "--rows", "baseline", *SMALL]
    out = tmp_path / "phantoms"
    assert crossval.main([*generated, "--seeds", "3", "--out", str(out)]) == 0
    assert [path.name for path in (out / "cache").glob("phantoms*")] == ["phantoms-6-16-seed0"]


@pytest.mark.parametrize("wanted", [1, 3])
def test_jobs_are_as_many_as_asked_for(wanted):
    assert number_of_jobs(wanted, "cpu") == wanted


def test_no_jobs_at_all_are_refused():
    with pytest.raises(UserError, match="--jobs is 0"):
        number_of_jobs(0, "cpu")


def test_help_comes_with_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        crossval.main(["--help"])
    assert (
        "crossval.py --data-root BraTS2018 --preset paper --rows table1,table2"
        in capsys.readouterr().out
    )


@pytest.mark.slow
def test_a_unit_that_another_process_trains_is_waited_for(copy, arguments):
    unit = copy / "fold0-seed0" / "kdnet"
    (unit / "scores.csv").unlink()
    command = [sys.executable, crossval.__file__, *arguments, "--out", str(copy)]
    with FileLock(unit / ".lock"):
        process = subprocess.Popen(
            [*command, "--unit", "fold0-seed0/kdnet"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        line = next(line for line in process.stdout if "Waiting" in line)
        assert "fold0-seed0/kdnet is trained by another process" in line
        assert not (unit / "scores.csv").exists()
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert (unit / "scores.csv").is_file()


@pytest.mark.slow
def test_several_processes_reach_what_one_reaches(finished, arguments, tmp_path):
    out = tmp_path / "parallel"
    rows = ["--rows", "baseline", "--jobs", "2"]
    assert crossval.main([*arguments, *rows, "--out", str(out)]) == 0
    alone = [score for score in read_scores(finished / "scores.csv") if score.role == "baseline"]
    assert read_scores(out / "scores.csv") == alone


@pytest.mark.slow
def test_a_stopped_cross_validation_goes_on(arguments, tmp_path):
    out = tmp_path / "stopped"
    rows = ["--rows", "baseline", "--jobs", "2", "--epochs", "40"]
    command = [sys.executable, crossval.__file__, *arguments, *rows]
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, text=True)
    while not list(out.glob("*/*/history.csv")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Give the same command to go on" in message
    # No process is left behind that would still write.
    left = [path.stat().st_mtime for path in out.glob("*/*/history.csv")]
    time.sleep(1)
    assert left == [path.stat().st_mtime for path in out.glob("*/*/history.csv")]
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    assert (
        subprocess.run([*command, "--out", str(out)], env=environment, check=False).returncode == 0
    )
    assert len(list(out.glob("*/*/scores.csv"))) == 2
