"""train.py from its command line to the files that it leaves."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from quick import QUICK, TINY
from safetensors.torch import load_file
from versions import needs_fsdp

import train
from faulty_training import equal
from kdnet.evaluation.scoring import read_scores
from kdnet.recipes import recipe_of
from kdnet.results.stored import read_folder
from kdnet.results.tables import paper_table
from kdnet.runs import networks
from kdnet.runs.folder import Folder
from kdnet.training.checkpoint import load_model, read_metadata, save_model
from kdnet.training.history import read_history

SCRIPT = Path(train.__file__)
ROLES = ("teacher", "baseline", "student")
NAMES = [f"Phantom_{number:04d}" for number in range(1, 7)]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
#: Of every network's history, whatever its terms.
COLUMNS = {"epoch", "step", "learning_rate", "seconds", "train_loss", "validation_loss"}
# Weights are compared bit by bit, and a GPU adds in an order of its own.
SMALL = [*TINY, *QUICK, "--precision", "32-true", "--epochs", "2", "--folds", "3"]


@pytest.fixture(scope="module")
def arguments(phantoms, tmp_path_factory) -> list[str]:
    out = tmp_path_factory.mktemp("runs") / "run"
    return ["--data-root", str(phantoms), *SMALL, "--out", str(out)]


@pytest.fixture(scope="module")
def run(arguments) -> Path:
    assert train.main(arguments) == 0
    return Path(arguments[-1])


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


def unit(out, role, fold=0):
    return Folder(out).unit(f"{role}/fold{fold}-seed0")


def weights(out, role="student"):
    return load_file(unit(out, role).model)


def test_a_run_leaves_everything_in_its_folder(run):
    for role in ROLES:
        folder = unit(run, role)
        assert load_model(folder.model)[1].role == role
        rows = read_history(folder.history)
        assert len(rows) == 2
        assert rows[0].keys() >= COLUMNS
        assert len(list(folder.predictions.glob("*_seg.nii.gz"))) == 2
        record = json.loads(folder.record.read_text())
        assert {"data", "training", "evaluation"} <= record["seconds"].keys()
        assert record["peak_mib"]["process"] > 0
    scores = read_scores(run / "scores.csv")
    # Networks, cases, regions, in both spaces and in native space without small regions, too.
    assert len(scores) == 3 * 2 * 3 * 3
    assert {*scores["against"][scores["row"] == "student"]} == {"baseline"}
    assert (run / "report.html").is_file()


def test_teacher_baseline_and_student_of_a_run_stand_in_the_papers_tables(run):
    results = read_folder(run)
    shown = paper_table("Table 1", results).frame
    ours = shown["network"][shown["numbers"] == "ours, over folds"]
    assert [*ours] == ["baseline (GT)", "teacher, every modality (GT)", "KD-Net (GT + KL + KD)"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_comes_to_its_end_and_is_known_again(arguments, tmp_path):
    given = [*arguments, "--out", str(tmp_path / "run"), "--accelerator", "gpu"]
    assert train.main(given) == 0
    record = json.loads(unit(tmp_path / "run", "student").record.read_text())
    assert record["peak_mib"]["gpu"] > 0
    assert "teacher_cache" not in record, "--teacher-cache auto keeps nothing on a GPU"
    assert train.main(given) == 0


def test_the_student_alone_learns_from_the_teacher_and_sees_one_modality(run):
    metadata = {role: read_metadata(unit(run, role).model) for role in ROLES}
    assert metadata["teacher"].modalities == ("flair", "t1", "t1ce", "t2")
    assert metadata["baseline"].modalities == metadata["student"].modalities == ("t1ce",)
    assert metadata["student"].description.phantom
    columns = {role: set(read_history(unit(run, role).history)[0]) for role in ROLES}
    assert columns["teacher"] == columns["baseline"]
    assert columns["student"] - columns["baseline"] == {
        f"{part}_{term}"
        for part in ("train", "validation")
        for term in ("soft_target_dice_bce", "latent_kl")
    }


def test_another_loss_is_another_experiment_and_never_an_old_result(
    copy, arguments, refusal, monkeypatch
):
    def doubled(row, setting):
        recipe = recipe_of(row, setting)
        return replace(recipe, objective=2.0 * recipe.objective) if row.teacher else recipe

    monkeypatch.setattr(networks, "recipe_of", doubled)
    for _ in range(2):
        message = refusal(train, *arguments, "--out", copy)
        assert str(unit(copy, "student").root) in message
        assert "objective: " in message
    assert equal(weights(copy), weights(Path(arguments[-1])))


def test_a_student_of_an_earlier_teacher_is_no_result_beside_a_new_one(copy, arguments, refusal):
    network, metadata = load_model(unit(copy, "teacher").model)
    with torch.no_grad():
        next(network.parameters()).add_(1)
    shutil.rmtree(unit(copy, "teacher").root / "predictions")
    save_model(unit(copy, "teacher").model, network, metadata)
    message = refusal(train, *arguments, "--out", copy)
    assert f"{unit(copy, 'student').root} was taught by another network" in message


NETWORK = """
from kdnet.models import KDNet
from neighbour import FACTOR
class Tiny(KDNet):
    def forward(self, image):
        return super().forward(image) * FACTOR
"""


@pytest.mark.usefixtures("training_alone")
def test_edited_code_is_another_experiment_unless_a_comment_alone_is_new(
    arguments, tmp_path, refusal, monkeypatch
):
    monkeypatch.syspath_prepend(str(tmp_path))
    given = [*arguments, "--out", str(tmp_path / "run"), "--backbone", "ours.Tiny"]
    given += ["--predictions", "false", "--epochs", "1"]
    (tmp_path / "ours.py").write_text(NETWORK)
    (tmp_path / "neighbour.py").write_text("FACTOR = 1")
    assert train.main(given) == 0
    (tmp_path / "ours.py").write_text("# the same\n" + NETWORK)
    (tmp_path / "neighbour.py").write_text('"""The same."""\nFACTOR = 1')
    assert train.main(given) == 0
    (tmp_path / "neighbour.py").write_text("FACTOR = 2")
    assert "sources.neighbour: " in refusal(train, *given)
    for name in ("ours", "neighbour"):
        sys.modules.pop(name)


@pytest.mark.usefixtures("training_alone")
def test_a_finished_run_is_not_trained_again_though_what_changes_no_number_changed(run, arguments):
    before = [unit(run, role).model.stat().st_mtime_ns for role in ROLES]
    assert train.main([*arguments, "--teacher_cache", "off", "--workers", "2"]) == 0
    assert before == [unit(run, role).model.stat().st_mtime_ns for role in ROLES]


@pytest.mark.parametrize("file", ["folds.json", "description.json", "files.json"])
def test_other_subjects_labels_or_files_than_it_began_with_are_refused(
    copy, arguments, refusal, file
):
    content = json.loads((copy / file).read_text())
    if file == "folds.json":
        fold = content["folds"][0]
        fold["train"], fold["test"] = fold["test"], fold["train"]
    elif file == "description.json":
        content["regions"] = {"WT": [1]}
    else:
        changed = next(iter(content[NAMES[0]]))
        content[NAMES[0]][changed] = [1, 1]
    (copy / file).write_text(json.dumps(content))
    unit(copy, "student").scores.unlink()
    message = refusal(train, *arguments, "--out", copy)
    assert "changed since this run began" in message
    assert (changed if file == "files.json" else file.partition(".")[0]) in message
    assert not unit(copy, "student").scores.exists()


@pytest.mark.usefixtures("training_alone")
@pytest.mark.parametrize("place", ["off", "memory"])
def test_a_given_teacher_gives_the_same_student_with_and_without_a_cache(
    run, arguments, tmp_path, place
):
    given = [*arguments, "--out", str(tmp_path / "run"), "--cache_dir", str(run / "cache")]
    given += ["--teacher-model", str(unit(run, "teacher").model), "--predictions", "false"]
    given += ["--teacher-cache", place]
    # The second start finds everything done.
    for _ in range(2):
        assert train.main(given) == 0
        assert equal(weights(run), weights(tmp_path / "run"))
    record = json.loads(unit(tmp_path / "run", "student").record.read_text())
    assert ("teacher_cache" in record) == (place != "off")


def test_a_student_is_no_teacher(run, arguments, tmp_path, refusal):
    given = ["--out", str(tmp_path / "run"), "--teacher-model", str(unit(run, "student").model)]
    assert "differs in modalities" in refusal(train, *arguments, *given)


def test_a_teacher_that_saw_references_which_are_hidden_now_is_refused(
    run, arguments, tmp_path, refusal
):
    given = ["--teacher-model", unit(run, "teacher").model, "--labelled", "2"]
    message = refusal(train, *arguments, *given, "--out", tmp_path / "run")
    assert "subjects that shall have no reference" in message


def test_a_unit_tells_what_the_teacher_cache_saved(run):
    found = json.loads(unit(run, "student").record.read_text())["teacher_cache"]
    # Two epochs of three training subjects under random flips, and one validation subject: that
    # one is served in the second epoch.
    assert found["hits"] + found["misses"] == 2 * (3 + 1)
    assert found["hits"] >= 1
    assert found["bytes"] > found["misses"] * 4 * 8**3 * 4 / 2
    assert any((run / "cache" / "teacher").glob("*/*.pt"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--data-root", "/no/such/folder"], "/no/such/folder"),
        (["--student-modalities", "pet"], "no modality pet"),
        (["--description", "no.yaml"], "no.yaml"),
        (["--bottleneck-layer", "deep"], "deep"),
        (["--teacher-bottleneck-layer", "deep"], "deep"),
        (["--teacher-backbone-arguments", '{"channels": [4]}'], "Row 'teacher'"),
        (["--teacher-backbone", "timm_unet"], "--slices axial"),
        (["--grid", "1,1,1"], "(1, 1, 1)"),
        (["--teacher-model", "none.safetensors"], "none.safetensors"),
        (["--accelerator", "abacus"], "Lightning Fabric cannot start"),
        (["--split-file", "none.json"], "none.json"),
        (["--teacher-cache-gib", "0"], "teacher_cache_gib"),
        (["--precision", "bf16-mixed", "--grid", "4,4,4"], "depth 2"),
        (["--labelled", "9"], "9"),
        (["--phantom-size", "8"], "phantom_size"),
        (["--folds", "10", "--phantoms", "6"], "phantoms"),
        (["--backbone-arguments", '{"channels": [8, -16]}'], "cannot be built"),
    ],
)
def test_unusable_input_is_told_and_nothing_is_written(
    arguments, tmp_path, refusal, changed, message
):
    out = tmp_path / "run"
    # Without --data-root the run makes its own subjects.
    given = arguments[2:] if changed[0].startswith("--phantom") else arguments
    assert message in refusal(train, *given, "--out", out, *changed)
    assert not out.exists()


def test_a_folder_of_something_else_is_left_alone(arguments, tmp_path, refusal):
    (tmp_path / "letters.txt").write_text("dear")
    assert "not a run folder" in refusal(train, *arguments, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_a_teacher_of_another_fold_is_refused_before_phantoms_are_made(
    run, arguments, tmp_path, refusal
):
    out = tmp_path / "fold1"
    flags = ["--out", str(out), "--fold", "1", "--teacher-model", str(unit(run, "teacher").model)]
    # Without --data-root the same six phantoms would be made by the run itself.
    assert "of the held-out fold 1" in refusal(train, *arguments[2:], "--phantoms", "6", *flags)
    assert not out.exists()


def split_file(path, train, validation, test):
    path.write_text(json.dumps({"train": train, "validation": validation, "test": test}))
    return ["--split-file", str(path)]


@pytest.mark.usefixtures("training_alone")
def test_what_a_teacher_saw_its_student_has_seen_too(run, arguments, tmp_path, refusal):
    network, metadata = load_model(unit(run, "teacher").model)
    teacher, out = tmp_path / "teacher.safetensors", tmp_path / "elsewhere"
    # Whatever its file calls it, it is this run's teacher.
    save_model(teacher, network, replace(metadata, role="student", seen_cases=(NAMES[5],)))
    given = [*arguments, "--out", str(out), "--teacher-model", str(teacher)]
    given += split_file(tmp_path / "split.json", NAMES[:2], NAMES[2:3], NAMES[3:5])
    assert train.main(given) == 0
    seen = {role: read_metadata(unit(out, role).model) for role in ROLES}
    assert seen["teacher"].role == "teacher"
    assert {*seen["baseline"].seen_cases} == {*NAMES[:3]}
    assert {*seen["student"].seen_cases} == {*NAMES[:3], NAMES[5]}
    assert len(seen["student"].orientation) == 3
    chain = ["--teacher-model", str(unit(out, "student").model), "--teacher-modalities", "t1ce"]
    chain += split_file(tmp_path / "other.json", NAMES[:2], NAMES[2:3], NAMES[5:])
    message = refusal(train, *arguments, *chain, "--out", str(tmp_path / "run"))
    assert f"1 subjects of the held-out fold 0: {NAMES[5]}" in message


@pytest.mark.usefixtures("training_alone")
def test_unlabelled_subjects_teach_the_student_alone_and_all_take_equal_steps(arguments, tmp_path):
    out = tmp_path / "run"
    given = [*arguments, "--out", str(out), "--labelled", "2", "--epochs", "1"]
    assert train.main([*given, "--predictions", "false"]) == 0
    steps = {role: read_history(unit(out, role).history)[-1]["step"] for role in ROLES}
    assert len({*steps.values()}) == 1
    seen = {role: len(read_metadata(unit(out, role).model).seen_cases) for role in ROLES}
    assert seen == {"teacher": 3, "baseline": 3, "student": 4}


def test_a_benchmark_recommends_and_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kdnet.training.runtime._MEASURED_SECONDS", 0.01)
    out = tmp_path / "run"
    given = ["--out", str(out), *SMALL, "--benchmark", "true"]
    assert train.main(given) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "--precision" in last
    assert "--memory-format" in last
    assert not out.exists()


@pytest.mark.usefixtures("training_alone")
def test_compiled_networks_of_one_class_are_distilled_too(run, arguments, tmp_path, monkeypatch):
    """Code that was compiled for the baseline knows nothing of the student's taps."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    given = [*arguments, "--out", str(tmp_path / "run"), "--compile", "true", "--epochs", "1"]
    given += ["--teacher-model", str(unit(run, "teacher").model), "--teacher-cache", "off"]
    given += ["--validation-fraction", "0", "--selection", "last"]
    assert train.main([*given, "--predictions", "false"]) == 0


def start(arguments, out, *more):
    command = [sys.executable, str(SCRIPT), *arguments, "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stop_in_teacher(process, out):
    """Stop a run after the first epoch of its teacher."""
    while not (unit(out, "teacher").root / "state.safetensors").is_file():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Give the same command to go on" in said


@pytest.mark.slow
def test_a_stopped_process_continues_with_the_same_command(arguments, tmp_path):
    out = tmp_path / "run"
    stop_in_teacher(start(arguments, out, "--epochs", "40"), out)
    again = start(arguments, out, "--epochs", "40")
    assert "teacher: continues " in again.communicate(timeout=240)[0]
    assert again.returncode == 0
    assert (out / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=needs_fsdp)])
def test_what_two_processes_began_one_goes_on_with(arguments, tmp_path, strategy):
    out = tmp_path / "run"
    alone = [*arguments, "--batch-size", "1", "--epochs", "60", "--predictions", "false"]
    alone += ["--schedule", "onecycle"]
    stop_in_teacher(start(alone, out, "--devices", "2", "--strategy", strategy), out)
    began = len(read_history(unit(out, "teacher").history))
    # One process takes three steps in an epoch where two took two.
    assert train.main([*alone, "--out", str(out)]) == 0
    rows = read_history(unit(out, "teacher").history)
    assert len(rows) == 60
    steps = [row["step"] for row in rows]
    assert steps[began - 1] == 2 * began
    assert steps[-1] - steps[-2] == 3
    assert rows[-1]["learning_rate"] < rows[20]["learning_rate"]


@pytest.mark.slow
def test_two_processes_may_be_started_by_torchrun(arguments, tmp_path):
    out = tmp_path / "run"
    flags = ["--devices", "2", "--strategy", "ddp", "--batch-size", "1", "--out", str(out)]
    command = [sys.executable, *TORCHRUN, str(SCRIPT), *arguments, *flags]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    steps = -(-len(json.loads((out / "folds.json").read_text())["folds"][0]["train"]) // 2)
    assert [row["step"] for row in read_history(unit(out, "student").history)] == [steps, 2 * steps]


@needs_fsdp
@pytest.mark.slow
@pytest.mark.parametrize("part", [("--patch", "16,16,16", "--grid", "null"), ("--slices", "axial")])
def test_sharded_networks_are_validated_on_whole_volumes(arguments, tmp_path, part):
    out = tmp_path / "run"
    # Of the one validation subject the second process has none.
    flags = ["--devices", "2", "--strategy", "fsdp", "--batch-size", "2", "--out", str(out), *part]
    command = [sys.executable, *TORCHRUN, str(SCRIPT), *arguments, *flags, "--epochs", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    for role in ROLES:
        assert "validation_dice" in read_history(unit(out, role).history)[0]
