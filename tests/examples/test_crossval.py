"""crossval.py from its command line to the files that it leaves."""

import hashlib
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
from quick import QUICK, TINY
from rich.console import Console
from safetensors.torch import load_file

import crossval
from kdnet.config import parse_for
from kdnet.errors import UserError
from kdnet.evaluation.scoring import read_scores
from kdnet.runs import pool
from kdnet.runs.folder import Folder
from kdnet.runs.pool import state, train_here
from kdnet.training.checkpoint import read_metadata
from phantoms import generate_phantoms

QUIET = Console(quiet=True)
SMALL = [*TINY, *QUICK, "--precision", "32-true", "--epochs", "1", "--folds", "2", "--jobs", "1"]
ROWS = ("teacher", "baseline", "kdnet")


@pytest.fixture(scope="module")
def arguments(phantoms) -> list[str]:
    return ["--data-root", str(phantoms), "--rows", "baseline,kdnet", *SMALL]


@pytest.fixture(scope="module")
def finished(train_alone, arguments, tmp_path_factory) -> Path:
    """A folder in which teacher, baseline and kdnet are trained on both folds."""
    out = tmp_path_factory.mktemp("runs") / "crossval"
    assert train_alone(crossval, [*arguments, "--out", str(out)]) == 0
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def plan_of(arguments, out):
    return crossval.plan_rows(*parse_for(crossval.CROSSVAL, [*arguments, "--out", str(out)]), QUIET)


def unit(out, row, fold=0, seed=0):
    return Folder(out).unit(f"{row}/fold{fold}-seed{seed}")


def held_out(out, fold=0):
    return json.loads((out / "folds.json").read_text())["folds"][fold]["test"]


def test_rows_that_see_no_unlabelled_subject_take_as_many_steps_as_those_that_do(tmp_path):
    rows = ["--rows", "baseline,kdnet", "--phantoms", "6", "--workers", "1", "--epochs", "1"]
    plan = plan_of([*rows, "--labelled", "2"], tmp_path / "run")
    counts = {config.training.samples_per_epoch for config in plan.configs.values()}
    # Of six phantoms three train in each of the demo's two folds.
    assert counts == {3}
    whole = plan_of([*rows, "--labelled", "null"], tmp_path / "run")
    assert whole.config.training.samples_per_epoch == 0


def test_every_row_is_scored_on_every_subject_once(finished, phantoms):
    scores = read_scores(finished / "scores.csv")
    names = {path.name for path in phantoms.iterdir() if path.is_dir()}
    once = scores[(scores["space"] == "grid") & (scores["region"] == "ET")]
    assert sorted(once["row"].unique()) == sorted(ROWS)
    for _, own in once.groupby("row"):
        assert sorted(own["case"]) == sorted(names)
    assert {*scores["fold"]} == {0, 1}


def test_no_network_has_seen_what_it_is_scored_on(finished):
    for fold in (0, 1):
        for row in ROWS:
            metadata = read_metadata(unit(finished, row, fold).model)
            assert metadata.role == row
            assert not {*held_out(finished, fold)} & set(metadata.seen_cases)


def test_the_plan_says_what_the_results_are_of(finished):
    plan = json.loads((finished / "plan.json").read_text())
    assert (plan["kind"], plan["folds"], plan["seeds"]) == ("crossval", [0, 1], [0])
    assert sorted(row["name"] for row in plan["rows"]) == sorted(ROWS)
    assert plan["rows"][2]["teacher"] == "teacher"
    assert plan["grades"] == {"not stated": 6}
    digest = hashlib.sha256((finished / "folds.json").read_bytes()).hexdigest()
    assert plan["folds_sha256"] == digest
    assert plan["protocol"] == (
        "phantom (phantoms, not patients), 6 cases, 2 folds, seed 0, student sees t1ce, grid "
        "8x8x8, kdnet (softmax, channels 2-4), lambda 0.75, T 5, alpha 10, 1 epoch, 32-true, "
        "contiguous"
    )


def test_redefined_rows_and_arguments_of_networks_are_named_in_the_protocol(arguments, tmp_path):
    (tmp_path / "rows.yaml").write_text("rows: {baseline: {label: mine}}")
    more = ["--rows-file", str(tmp_path / "rows.yaml"), "--rows", "baseline", "--show", "units"]
    more += ["--teacher-backbone-arguments", '{"channels": [4, 8], "prior": 0.1}']
    assert crossval.main([*arguments, *more, "--out", str(tmp_path / "run")]) == 0
    protocol = json.loads((tmp_path / "run" / "plan.json").read_text())["protocol"]
    assert protocol.endswith("not the built-in ones: baseline")
    assert "(softmax, channels 2-4), teacher kdnet (softmax, channels 4-8, prior 0.1)" in protocol


def test_students_that_start_from_the_teacher_meet_a_baseline_of_as_many_epochs(tmp_path):
    given = ["--rows", "baseline,kdnet,shared", "--phantoms", "6", "--phantom-size", "16", *SMALL]
    plain = plan_of([*given, "--epochs", "3", "--start", "scratch"], tmp_path)
    assert {row.against for row in plain.rows} == {None, "baseline"}
    plan = plan_of([*given, "--epochs", "3", "--start", "teacher"], tmp_path)
    assert {row.name: row.against for row in plan.rows} == {
        "teacher": None,
        "baseline": None,
        "kdnet": "baseline_6_epochs",
        "shared": "baseline_6_epochs",
        "baseline_6_epochs": None,
    }
    assert plan.rows[-1].options == {"epochs": 6}


def test_a_control_that_says_its_epochs_is_left_alone(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "rows: {long: {against: null, options: {epochs: 9}},"
        " mine: {recipe: distilled, teacher: teacher, against: long, options: {start: teacher}},"
        " other: {recipe: distilled, teacher: teacher, options: {start: teacher, epochs: 4}}}"
    )
    given = ["--rows-file", str(tmp_path / "mine.yaml"), "--rows", "baseline,long,mine,other"]
    given += [*SMALL, "--phantoms", "6", "--phantom-size", "16", "--epochs", "3"]
    plan = plan_of(given, tmp_path)
    against = {row.name: row.against for row in plan.rows}
    assert (against["mine"], against["other"]) == ("long", "baseline_7_epochs")


def test_of_two_that_start_from_a_teacher_none_is_trained_longer(tmp_path):
    file = tmp_path / "rows.yaml"
    row = "{recipe: distilled, teacher: teacher, against: kdnet, options: {temperature: 1.0}}"
    file.write_text(f"rows:\n  mild: {row}\n")
    given = ["--preset", "demo", "--labelled", "null", "--start", "teacher"]
    given += ["--rows-file", str(file), "--rows", "baseline,kdnet,mild"]
    config, options = parse_for(crossval.CROSSVAL, given)
    rows = crossval.plan_rows(config, options, QUIET).rows
    assert {row.name: row.against for row in rows}["mild"] == "kdnet"


@pytest.mark.usefixtures("training_alone")
def test_a_second_start_trains_nothing_again(finished, arguments, capsys, monkeypatch):
    monkeypatch.setattr(pool, "run_unit", None)
    assert crossval.main([*arguments, "--out", str(finished)]) == 0
    assert "6 units, 6 done" in capsys.readouterr().out


@pytest.mark.usefixtures("training_alone")
def test_a_row_that_is_added_is_all_that_is_trained(copy, arguments, monkeypatch):
    trained = []
    monkeypatch.setattr(pool, "run_unit", lambda _, unit, __: trained.append(unit.name))
    assert crossval.main([*arguments, "--rows", "gt_kl,baseline", "--out", str(copy)]) == 0
    assert trained == ["gt_kl/fold0-seed0", "gt_kl/fold1-seed0"]
    # The rows of the first start stay in the results.
    assert {*read_scores(copy / "scores.csv")["row"]} >= {"kdnet", "teacher"}


@pytest.mark.usefixtures("training_alone")
def test_a_lost_score_file_costs_no_training(copy, arguments):
    folder = unit(copy, "kdnet")
    before, scores = folder.model.stat().st_mtime_ns, folder.scores.read_text()
    folder.scores.unlink()
    assert crossval.main([*arguments, "--out", str(copy)]) == 0
    assert folder.scores.read_text() == scores
    assert folder.model.stat().st_mtime_ns == before


@pytest.mark.usefixtures("training_alone")
def test_a_network_that_has_seen_the_test_fold_is_refused(copy, arguments, capsys):
    shutil.copy(unit(copy, "teacher", 1).model, unit(copy, "teacher", 0).model)
    shutil.rmtree(unit(copy, "kdnet").root)
    assert crossval.main([*arguments, "--out", str(copy)]) == 1
    output = capsys.readouterr().out
    assert "kdnet/fold0-seed0 failed" in output
    assert "subjects of the held-out fold 0" in output


def test_a_score_file_that_lacks_cases_is_named(copy, arguments, refusal):
    lost = unit(copy, "baseline").scores
    header, first, *_ = lost.read_text().splitlines(keepends=True)
    lost.write_text(header + first)
    message = refusal(crossval, *arguments, "--out", copy)
    assert str(lost) in message
    assert "lacks 2 of the held-out subjects" in message


@pytest.mark.parametrize("name", ["folds.json", "plan.json"])
def test_a_damaged_file_of_the_folder_is_named(copy, arguments, refusal, name):
    (copy / name).write_text("{")
    assert f"{name} is damaged" in refusal(crossval, *arguments, "--out", copy)


def test_a_new_student_of_a_known_teacher_is_tried_with_it(arguments, tmp_path):
    rows = tmp_path / "rows.yaml"
    rows.write_text(
        "rows:\n  coach: {role: teacher}\n  s1: {recipe: distilled, teacher: coach}\n"
        "  s2: {recipe: distilled, teacher: coach}\n"
    )
    more = [*arguments, "--rows-file", str(rows), "--rows"]
    out = tmp_path / "run"
    assert crossval.main([*more, "s1", "--out", str(out), "--show", "units"]) == 0
    plan = plan_of([*more, "s1,s2"], out)
    assert {*pool.rehearse_rows(plan, plan.units(), QUIET).experiments} == {"coach", "s1", "s2"}


def test_an_objective_that_counts_classes_and_reads_features_trains(arguments, copy):
    row = {"recipe": "distilled", "teacher": "teacher", "options": {"objective": "passion"}}
    (copy / "rows.yaml").write_text(json.dumps({"rows": {"passion": row}}))
    more = ["--rows-file", str(copy / "rows.yaml"), "--rows", "passion"]
    given = [*arguments, *more, "--unit", "passion/fold0-seed0", "--out", str(copy)]
    assert crossval.main(given) == 0
    assert unit(copy, "passion").scores.is_file()


@pytest.mark.parametrize("more", [[], ["--show", "units"]])
def test_a_teacher_that_has_seen_a_test_fold_is_refused(
    finished, arguments, tmp_path, refusal, more
):
    given = ["--teacher-model", unit(finished, "teacher").model, *more, "--out", tmp_path / "new"]
    assert "of the held-out fold 1" in refusal(crossval, *arguments, *given)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--epochs", "2"], "epochs: 1 there, 2 now"),
        (["--repeats", "2"], "the folds, or the cases"),
        (["--fold", "1"], "--fold"),
        (["--devices", "2"], "--devices"),
        (["--rows", "nobody"], "'nobody'"),
        (["--repeats", "0"], "repeats is 0"),
        (["--seeds", "1,1"], "names a seed twice: 1, 1"),
        (["--jobs", "0"], "jobs is 0"),
        (["--unit", "kdnet/fold9-seed0"], "no unit 'kdnet/fold9-seed0'"),
    ],
)
def test_what_does_not_fit_the_folder_touches_nothing(finished, arguments, refusal, changed, named):
    before = {path: path.read_bytes() for path in finished.glob("*.*") if path.is_file()}
    assert named in refusal(crossval, *arguments, *changed, "--out", finished)
    assert before == {path: path.read_bytes() for path in finished.glob("*.*") if path.is_file()}


def test_another_row_under_a_known_name_is_refused(finished, arguments, tmp_path, refusal):
    rows = tmp_path / "rows.yaml"
    rows.write_text(
        "rows: {kdnet: {recipe: distilled, teacher: teacher, options: {temperature: 2}}}"
    )
    message = refusal(crossval, *arguments, "--rows-file", str(rows), "--out", finished)
    assert "kdnet/fold0-seed0 holds another experiment" in message
    assert "temperature: 5.0 there, 2.0 now" in message


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--rows", "odd"], "Row 'odd': Network 'no.such.Network'"),
        (["--rows", "hemis", "--teacher-modalities", "flair,t2"], "Row 'hemis': .*t1ce"),
    ],
)
def test_a_row_that_cannot_be_trained_is_named_at_once(arguments, tmp_path, refusal, more, named):
    (tmp_path / "rows.yaml").write_text("rows: {odd: {options: {backbone: no.such.Network}}}")
    given = [*arguments, "--rows-file", str(tmp_path / "rows.yaml"), *more]
    message = refusal(crossval, *given, "--out", tmp_path / "new")
    assert all(part in message for part in named.split(".*"))
    assert not (tmp_path / "new").exists()


def test_a_failed_unit_stops_its_students_alone(copy, arguments, monkeypatch):
    plan = plan_of(arguments, copy)
    for row in ROWS:
        unit(copy, row).scores.unlink()

    def fail(plan, unit, console):
        if unit.name == "teacher/fold0-seed0":
            raise UserError("its loss is not finite")
        done.append(unit.name)

    done: list[str] = []
    monkeypatch.setattr(pool, "run_unit", fail)
    assert train_here(plan, plan.units(), QUIET) == {
        "teacher/fold0-seed0": "its loss is not finite",
        "kdnet/fold0-seed0": "its teacher teacher/fold0-seed0 failed",
    }
    assert done == ["baseline/fold0-seed0"]


@pytest.mark.usefixtures("training_alone")
def test_seeds_share_folds_and_differ_in_weights(copy, arguments):
    more = [*arguments, "--seeds", "0,1", "--rows", "baseline"]
    assert crossval.main([*more, "--out", str(copy)]) == 0
    first, second = (load_file(unit(copy, "baseline", seed=seed).model) for seed in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    seen = [read_metadata(unit(copy, "baseline", seed=s).model).seen_cases for s in (0, 1)]
    assert seen[0] == seen[1]


def test_units_are_listed_with_teachers_first(finished, arguments, capsys):
    assert crossval.main([*arguments, "--out", str(finished), "--show", "units"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6].split() == ["0", "teacher/fold0-seed0", "done"]
    assert lines[-1].split() == ["5", "kdnet/fold1-seed0", "done"]


def test_what_is_shown_of_a_folder_is_not_tried_again(copy, arguments, refusal, monkeypatch):
    monkeypatch.setattr(pool, "rehearse_rows", None)
    before = (copy / "plan.json").stat().st_mtime_ns
    given = ["--rows", "baseline,kdnet,gt_kd", "--out", str(copy), "--show", "status"]
    assert crossval.main([*arguments, *given]) == 0
    assert (copy / "plan.json").stat().st_mtime_ns == before
    message = refusal(crossval, *arguments, *given, "--epochs", "2", "--out", copy)
    assert "another configuration" in message


def test_status_shows_dice_of_what_is_done_and_epochs_of_what_is_not(copy, arguments, capsys):
    plan, folder = plan_of(arguments, copy), unit(copy, "kdnet")
    one = plan.find("kdnet/fold0-seed0")
    assert state(plan, one).startswith("Dice 0.")
    folder.scores.unlink()
    assert state(plan, one) == "1/1"
    folder.history.write_text("nothing")
    assert state(plan, one) == "damaged"
    assert crossval.main([*arguments, "--out", str(copy), "--show", "status"]) == 0
    assert "5 of 6 units done" in capsys.readouterr().out


@pytest.mark.usefixtures("training_alone")
def test_one_unit_trains_its_teacher_and_nothing_else(arguments, tmp_path):
    out = tmp_path / "array"
    assert crossval.main([*arguments, "--out", str(out), "--unit", "5"]) == 0
    trained = sorted(str(p.parent.relative_to(out / "units")) for p in out.glob("*/*/*/scores.csv"))
    assert trained == ["kdnet/fold1-seed0", "teacher/fold1-seed0"]


def test_phantoms_are_the_same_for_every_seed(tmp_path):
    generated = ["--phantoms", "6", "--phantom-size", "16", "--rows", "baseline", *SMALL]
    out = tmp_path / "phantoms"
    assert crossval.main([*generated, "--seeds", "3", "--out", str(out), "--show", "units"]) == 0
    assert [path.name for path in (out / "cache").glob("phantoms*")] == ["phantoms-6-16-seed0"]


def start(arguments, out, *more, **pipes):
    command = [sys.executable, crossval.__file__, *arguments, "--out", str(out), *more]
    return subprocess.Popen(command, text=True, **pipes)


def test_a_protocol_sets_what_is_not_given_and_refuses_what_contradicts_it(refusal, tmp_path):
    given = ["--protocol", "brats2018-public", "--data-root", "x"]
    config, options = parse_for(crossval.CROSSVAL, crossval.with_protocol(given))
    assert (config.run.preset, config.training.selection) == ("native", "last")
    more = crossval.with_protocol([*given, "--preset", "paper"])
    config, options = parse_for(crossval.CROSSVAL, more)
    assert (config.run.preset, config.training.selection) == ("paper", "last")
    crossval.refuse(config, options)
    message = refusal(crossval, *given, "--selection", "best", "--out", tmp_path / "new")
    assert "brats2018-public has selection last; found best" in message


@pytest.mark.parametrize("content", ["{", "[]", '{"options": 3}', '{"options": {"epoch": 3}}'])
def test_a_protocol_that_cannot_be_used_is_an_error(refusal, tmp_path, content):
    (tmp_path / "mine.json").write_text(content)
    given = ["--protocol", str(tmp_path / "mine.json")]
    named = "--epoch 3" if "epoch" in content else "mine.json"
    assert named in refusal(crossval, *given, "--out", tmp_path / "new")


@pytest.fixture
def public(tmp_path):
    """The public protocol, reduced to a few names; phantoms that carry them, and one more."""
    content = json.loads(crossval.protocol_file("brats2018-public").read_text(encoding="utf-8"))
    folds = content["folds"]
    # The first of every part of every split; most of them train in one split and test in another.
    kept = {fold[part][0] for fold in folds for part in ("train", "validation", "test")}
    for fold in folds:
        for part in ("train", "validation", "test"):
            fold[part] = [name for name in fold[part] if name in kept]
    (tmp_path / "brats2018-public.json").write_text(json.dumps(content), encoding="utf-8")
    root = generate_phantoms(
        tmp_path / "data", subjects=len(kept) + 1, seed=0, size=16, progress=False
    )
    for name, phantom in zip(sorted(kept), sorted(root.glob("Phantom_*")), strict=False):
        for file in phantom.iterdir():
            file.rename(file.with_name(file.name.replace(phantom.name, name)))
        phantom.rename(root / name)
    return tmp_path / "brats2018-public.json", root, kept, folds


def test_a_public_protocol_stands_beside_what_others_published(public, tmp_path, capsys):
    file, root, kept, folds = public
    out = tmp_path / "run"
    options = ["--data-root", str(root), "--protocol", str(file), "--rows", "baseline", *SMALL]
    assert crossval.main([*options, "--predictions", "false", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"not used: Phantom_{len(kept) + 1:04d}\n" in said
    dealt = json.loads((out / "folds.json").read_text())["folds"]
    assert [fold["test"] for fold in dealt] == [fold["test"] for fold in folds]
    tested = {name for fold in folds for name in fold["test"]}
    scores = read_scores(out / "scores.csv").query("space == 'native'")
    assert {*scores["case"]} == tested <= kept
    assert {*scores["postprocessing"]} == {"off", "on"}
    table = said.partition("PHANTOM: brats2018-public, native space")[2].partition("PHANTOM: ")[0]
    assert "DeMoSeg" in table
    for treatment in ("no post-processing", "small regions removed"):
        assert f"baseline (GT), {treatment}" in table
    assert f"{len(kept)} cases, 3 folds in 3 repeats, brats2018-public" in table


@pytest.mark.slow
def test_a_unit_that_another_process_trains_is_waited_for(copy, arguments):
    folder = unit(copy, "kdnet")
    folder.scores.unlink()
    with FileLock(folder.root / ".lock"):
        process = start(arguments, copy, "--unit", "kdnet/fold0-seed0", stdout=subprocess.PIPE)
        line = next(line for line in process.stdout if "Waiting" in line)
        assert "kdnet/fold0-seed0 is trained by another process" in line
        assert not folder.scores.exists()
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert folder.scores.is_file()


@pytest.mark.slow
def test_several_processes_reach_what_one_reaches(finished, arguments, tmp_path):
    out = tmp_path / "parallel"
    assert crossval.main([*arguments, "--rows", "baseline", "--jobs", "2", "--out", str(out)]) == 0
    alone, found = (
        read_scores(path / "scores.csv").query("row == 'baseline'").drop(columns=["hd95", "nsd"])
        for path in (finished, out)
    )
    assert found.to_csv(index=False) == alone.to_csv(index=False)


@pytest.mark.slow
def test_a_stopped_cross_validation_goes_on(arguments, tmp_path):
    out = tmp_path / "stopped"
    rows = ["--rows", "baseline", "--jobs", "2", "--epochs", "40"]
    process = start(arguments, out, *rows, stderr=subprocess.PIPE)
    while not list(out.rglob("history.csv")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Give the same command to go on" in message
    # No process is left behind that would still write.
    left = [path.stat().st_mtime for path in out.rglob("history.csv")]
    time.sleep(1)
    assert left == [path.stat().st_mtime for path in out.rglob("history.csv")]
    again = start(arguments, out, *rows, env=os.environ | {"PYTHONWARNINGS": "default"})
    assert again.wait(timeout=300) == 0
    assert len(list(out.glob("units/*/*/scores.csv"))) == 2
