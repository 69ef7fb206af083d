import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import train
from kdnet.configuration.objective import ObjectiveConfig
from kdnet.evaluation.scoring import read_scores
from kdnet.models import KDNet
from kdnet.recipes import distillation
from kdnet.runs.run_folder import ROLES, RunFolder
from kdnet.training.checkpoint import load_model, read_metadata, save_model
from kdnet.training.history import read_history
from phantoms import generate_phantoms

SCRIPT = Path(train.__file__)
NAMES = [f"Phantom_{number:04d}" for number in range(1, 7)]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SMALL = [
    *("--backbone_arguments", '{"channels": [2, 4]}', "--grid", "8,8,8", "--threads", "1"),
    *("--precision", "32-true", "--memory_format", "contiguous", "--workers", "1"),
    # Weights are compared bit by bit, and a GPU adds in an order of its own.
    *("--epochs", "2", "--folds", "3", "--accelerator", "cpu"),
]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> Path:
    return generate_phantoms(
        tmp_path_factory.mktemp("data") / "phantoms", subjects=6, seed=0, size=32, progress=False
    )


@pytest.fixture(scope="module")
def arguments(subjects, tmp_path_factory) -> list[str]:
    out = tmp_path_factory.mktemp("runs") / "run"
    return ["--data-root", str(subjects), "--preset", "demo", "--out", str(out), *SMALL]


@pytest.fixture(scope="module")
def run(arguments) -> RunFolder:
    threads = torch.get_num_threads()
    assert train.main(arguments) == 0
    torch.set_num_threads(threads)
    return RunFolder(Path(arguments[arguments.index("--out") + 1]))


def status_and_message(capsys, arguments):
    status = train.main(arguments)
    return status, capsys.readouterr().err


@pytest.mark.parametrize("share", ["0.25", "0"])
def test_recipe_auto_says_what_the_teachers_lead_promises(subjects, tmp_path, capsys, share):
    threads = torch.get_num_threads()
    given = ["--data-root", str(subjects), "--preset", "demo", "--out", str(tmp_path), *SMALL]
    given += ["--recipe", "auto", "--epochs", "1", "--validation_fraction", share]
    if share == "0":
        given += ["--selection", "last", "--schedule", "onecycle"]
    assert train.main(given) == 0
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    leads = [line.startswith("The teacher leads the baseline by") for line in lines]
    assert sum(leads) == (share != "0"), "once; never where nothing is validated"


def test_a_run_leaves_everything_in_its_folder(run):
    for role in ROLES:
        assert load_model(run.model(role))[1].role == role
        assert len(read_history(run.role(role) / "history.csv")) == 2
        assert len(list(run.predictions(role).glob("*_seg.nii.gz"))) == 2
    scores = read_scores(run.scores)
    assert len(scores) == 3 * 2 * 2 * 3  # networks, cases, spaces, regions
    summary = json.loads(run.summary.read_text())
    assert {"data", *ROLES, "evaluation"} <= summary["seconds"].keys()
    assert summary["peak_mib"]["process"] > 0
    assert (run.root / "report.html").is_file()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_comes_to_its_end_and_is_known_again(arguments, tmp_path, capsys):
    given = [*arguments, "--out", str(tmp_path / "run"), "--accelerator", "gpu"]
    assert train.main(given) == 0
    found = RunFolder(tmp_path / "run")
    summary = json.loads(found.summary.read_text())
    assert summary["peak_mib"]["gpu"] > 0
    assert "teacher_cache" not in summary, "--teacher_cache auto keeps nothing on a GPU"
    capsys.readouterr()
    assert train.main(given) == 0
    said = capsys.readouterr().out
    assert all(f"{role}: finished" in said for role in ROLES)


def test_views_are_those_of_the_paper(run):
    assert read_metadata(run.model("teacher")).modalities == ("flair", "t1", "t1ce", "t2")
    assert read_metadata(run.model("baseline")).modalities == ("t1ce",)
    assert read_metadata(run.model("student")).modalities == ("t1ce",)
    assert read_metadata(run.model("student")).phantom


def test_only_the_student_learns_from_the_teacher(run):
    columns = {role: set(read_history(run.role(role) / "history.csv")[0]) for role in ROLES}
    assert columns["teacher"] == columns["baseline"]
    assert columns["student"] - columns["baseline"] == {
        "train_soft_target_dice_bce",
        "train_latent_kl",
        "validation_soft_target_dice_bce",
        "validation_latent_kl",
    }


def test_a_finished_run_is_not_trained_again(run, arguments, capsys):
    before = load_file(run.model("student"))
    assert train.main(arguments) == 0
    output = capsys.readouterr().out
    assert "it goes on" in output
    assert all(f"{role}: finished" in output for role in ROLES)
    assert "phantom" in output
    assert all(torch.equal(before[k], v) for k, v in load_file(run.model("student")).items())


def test_another_configuration_is_refused_in_the_same_folder(run, arguments, capsys):
    status, message = status_and_message(capsys, [*arguments, "--epochs", "3"])
    assert status == 2
    assert "epochs: 2 there, 3 now" in message


def test_a_trained_teacher_can_be_given(run, arguments, tmp_path, capsys):
    given = [*arguments, "--out", str(tmp_path / "run"), "--cache_dir", str(run.root / "cache")]
    given += ["--teacher_model", str(run.model("teacher")), "--predictions", "false"]
    assert train.main(given) == 0
    first, second = (load_file(r.model("student")) for r in (run, RunFolder(tmp_path / "run")))
    assert all(torch.equal(first[name], second[name]) for name in first)
    given[given.index("--teacher_model") + 1] = str(run.model("student"))
    status, message = status_and_message(capsys, [*given, "--out", str(tmp_path / "other")])
    assert status == 2
    assert "differs in modalities" in message


def weights(run):
    return load_file(run.model("student"))


@pytest.mark.parametrize("place", ["off", "memory"])
def test_the_student_is_the_same_without_the_teacher_cache(run, arguments, tmp_path, place):
    out = RunFolder(tmp_path / "run")
    more = ["--out", str(out.root), "--teacher_cache", place, "--predictions", "false"]
    given = ["--teacher_model", str(run.model("teacher")), "--cache_dir", str(run.root / "cache")]
    assert train.main([*arguments, *more, *given]) == 0
    assert all(torch.equal(weights(run)[name], value) for name, value in weights(out).items())
    assert ("teacher_cache" in json.loads(out.summary.read_text())) == (place != "off")


def test_the_summary_tells_what_the_teacher_cache_saved(run):
    found = json.loads(run.summary.read_text())["teacher_cache"]
    # Two epochs of three training subjects under random flips, and one validation subject: that
    # one is served in the second epoch.
    assert found["hits"] + found["misses"] == 2 * (3 + 1)
    assert found["hits"] >= 1
    assert found["bytes"] > found["misses"] * 4 * 8**3 * 4 / 2
    assert any((run.root / "cache" / "teacher").glob("*/*.pt"))


def test_a_stopped_run_may_go_on_without_the_teacher_cache(run, arguments):
    assert train.main([*arguments, "--teacher_cache", "off"]) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--data-root", "/no/such/folder"], "/no/such/folder"),
        (["--preset", "huge"], "Unknown preset 'huge'"),
        (["--backbone", "resnet"], "Unknown network 'resnet'"),
        (["--student_modalities", "pet"], "has no modality pet"),
        (["--description", "no.yaml"], "no.yaml"),
        (["--bottleneck_layer", "deep"], "deep"),
        (["--grid", "1,1,1"], "KDNet: an input of (1, 1, 1) voxels"),
        (["--teacher_model", "none.safetensors"], "there is no such model file"),
        (["--accelerator", "abacus"], "Lightning Fabric cannot start"),
        (["--split_file", "none.json"], "none.json"),
        (["--teacher_cache_gib", "0"], "teacher_cache_gib is 0.0; expected above 0"),
    ],
)
def test_unusable_input_is_one_message_and_status_two(
    arguments, tmp_path, capsys, changed, message
):
    out = tmp_path / "run"
    status, text = status_and_message(capsys, [*arguments, "--out", str(out), *changed])
    assert status == 2
    assert not out.exists()
    assert message in text
    assert "Traceback" not in text


def test_damaged_subject_is_found_before_training(subjects, arguments, tmp_path, capsys):
    shutil.copytree(subjects, tmp_path / "data")
    victim = next((tmp_path / "data").glob("*_0003/*_t1ce.nii.gz"))
    victim.write_bytes(victim.read_bytes()[:200])
    changed = ["--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    status, message = status_and_message(capsys, [*arguments, *changed])
    assert status == 2
    assert victim.name in message
    assert not (tmp_path / "run").exists()


def test_objective_is_equation_five():
    terms = distillation.student_objective(ObjectiveConfig()).named_terms
    weights = {name: weight.factor for name, (weight, _) in terms.items()}
    assert weights == {"soft_target_dice_bce": 0.75, "ground_truth": 0.25, "latent_kl": 10.0}


def test_terms_of_weight_zero_cost_nothing():
    terms = distillation.student_objective(
        ObjectiveConfig(imitation=0, latent_weight=0)
    ).named_terms
    assert list(terms) == ["ground_truth"]


@pytest.mark.parametrize(
    ("layer", "network", "tap"),
    [
        ("auto", KDNet(1, 2, channels=(2, 4)), "bottleneck"),
        ("encoder.0", KDNet(1, 2, channels=(2, 4)), "encoder.0"),
        ("auto", nn.Sequential(nn.Conv3d(1, 1, 1)), None),
    ],
)
def test_bottleneck_is_named_where_the_network_names_it(layer, network, tap):
    options = ObjectiveConfig(bottleneck_layer=layer)
    taps = distillation.bottleneck(options, network, distillation.student_objective(options))
    assert (taps["bottleneck"].student if taps else None) == tap
    assert distillation.bottleneck(options, network, distillation.ground_truth(options)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stopped_process_continues_with_the_same_command(run, arguments, tmp_path, number):
    out = tmp_path / "run"
    command = [sys.executable, str(SCRIPT), *arguments, "--out", str(out), "--epochs", "120"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (out / "teacher" / "state.safetensors").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"Give the same command to go on" in message
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "teacher: continues " in again.stdout + again.stderr
    assert (out / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "strategy"),
    [([], "ddp"), (TORCHRUN, "ddp"), (TORCHRUN, "fsdp")],
    ids=["fabric", "torchrun", "sharded"],
)
def test_two_processes_train_together_however_started(run, arguments, tmp_path, launcher, strategy):
    out = tmp_path / "run"
    flags = ["--accelerator", "cpu", "--devices", "2", "--strategy", strategy, "--batch_size", "1"]
    # The second of two precisions to be told from the first process.
    flags += ["--precision", "auto", "--out", str(out)]
    command = [sys.executable, *launcher, str(SCRIPT), *arguments, *flags]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert len(read_history(out / "student" / "history.csv")) == 2
    steps = -(-len(json.loads((out / "cases.json").read_text())["train"]) // 2)
    assert read_history(out / "student" / "history.csv")[0]["step"] == steps


@pytest.mark.slow
@pytest.mark.parametrize("part", [("--patch", "16,16,16", "--grid", "null"), ("--slices", "axial")])
def test_sharded_networks_are_validated_on_whole_volumes(subjects, tmp_path, part):
    out = tmp_path / "run"
    # Of the one validation subject the second process has none.
    flags = ["--accelerator", "cpu", "--devices", "2", "--strategy", "fsdp", "--batch_size", "2"]
    flags += ["--data-root", str(subjects), "--preset", "demo", "--out", str(out), *SMALL, *part]
    command = [sys.executable, *TORCHRUN, str(SCRIPT), *flags, "--epochs", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    assert len(json.loads((out / "cases.json").read_text())["validation"]) == 1
    for role in ROLES:
        assert "validation_dice" in read_history(out / role / "history.csv")[0]


def test_a_run_is_not_scored_on_other_subjects_than_it_began_with(run, arguments, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run.root, copy)
    (copy / "scores.csv").unlink()
    cases = json.loads((copy / "cases.json").read_text())
    cases["train"], cases["test"] = cases["test"], cases["train"]
    (copy / "cases.json").write_text(json.dumps(cases))
    again = [*arguments, "--out", str(copy)]
    status, message = status_and_message(capsys, again)
    assert status == 2
    assert "the train subjects of this run are not those found now" in message
    assert not (copy / "scores.csv").exists()


def test_a_run_does_not_go_on_with_other_labels(run, arguments, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run.root, copy)
    description = json.loads((copy / "description.json").read_text())
    description["regions"] = {"WT": [1]}
    (copy / "description.json").write_text(json.dumps(description))
    status, message = status_and_message(capsys, [*arguments, "--out", str(copy)])
    assert status == 2
    assert "the description of the data set has changed" in message


@pytest.mark.parametrize("made", ["found", "not made yet"])
def test_a_teacher_of_another_fold_is_refused_before_anything_is_written(
    run, arguments, tmp_path, capsys, made
):
    out, teacher = tmp_path / "fold1", str(run.model("teacher"))
    flags = ["--out", str(out), "--fold", "1", "--teacher_model", teacher]
    # Without --data-root the same six phantoms would be made by the run itself.
    given = arguments if made == "found" else [*arguments[2:], "--phantoms", "6"]
    status, message = status_and_message(capsys, [*given, *flags])
    assert status == 2
    assert "of the held-out fold" in message
    assert not out.exists()


def split_file(path, train, validation, test):
    path.write_text(json.dumps({"train": train, "validation": validation, "test": test}))
    return ["--split_file", str(path)]


@pytest.fixture(scope="module")
def elsewhere(run, arguments, tmp_path_factory) -> RunFolder:
    """A run whose teacher was trained on a subject that is no part of the run's split."""
    folder = tmp_path_factory.mktemp("elsewhere")
    network, metadata = load_model(run.model("teacher"))
    teacher = folder / "teacher.safetensors"
    save_model(teacher, network, replace(metadata, role="student", seen_cases=(NAMES[5],)))
    flags = ["--out", str(folder / "run"), "--teacher_model", str(teacher)]
    flags += split_file(folder / "split.json", NAMES[:2], NAMES[2:3], NAMES[3:5])
    assert train.main([*arguments, *flags]) == 0
    return RunFolder(folder / "run")


def test_what_a_teacher_saw_its_student_has_seen_too(elsewhere, arguments, tmp_path, capsys):
    seen = {role: set(read_metadata(elsewhere.model(role)).seen_cases) for role in ROLES}
    assert seen["baseline"] == set(NAMES[:3])
    assert seen["student"] == {*NAMES[:3], NAMES[5]}
    given = ["--teacher_model", str(elsewhere.model("student")), "--teacher_modalities", "t1ce"]
    given += split_file(tmp_path / "split.json", NAMES[:2], NAMES[2:3], NAMES[5:])
    status, message = status_and_message(
        capsys, [*arguments, *given, "--out", str(tmp_path / "run")]
    )
    assert status == 2
    assert f"1 subjects of the held-out fold: {NAMES[5]}" in message


def test_a_given_teacher_is_called_teacher_whatever_its_file_says(elsewhere):
    assert read_metadata(elsewhere.model("teacher")).role == "teacher"
    assert {score.role for score in read_scores(elsewhere.scores)} == set(ROLES)
    assert len(list(elsewhere.predictions("teacher").glob("*_seg.nii.gz"))) == 2


def test_a_model_knows_what_it_has_seen(run):
    metadata = read_metadata(run.model("student"))
    cases = json.loads(run.cases.read_text())
    assert set(metadata.seen_cases) == {*cases["train"], *cases["validation"]}
    assert len(metadata.orientation) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--phantom_size", "8"], "phantom_size is 8"),
        (["--folds", "10", "--phantoms", "6"], "phantoms is 6"),
        (["--weight_decay", "-1"], "weight_decay is -1"),
        (["--plateau_factor", "2"], "plateau_factor is 2"),
        (["--seed", "-1"], "seed is -1"),
        (["--backbone_arguments", '{"in_channels": 2}'], "in_channels follow from"),
        (["--backbone_arguments", '{"name": "x"}'], "cannot be built"),
        (["--backbone_arguments", '{"channels": [8, -16]}'], "cannot be built"),
        (["--imitation", "1", "--validation_loss", "ground_truth"], "leaves no such term"),
    ],
)
def test_mistakes_on_phantoms_leave_nothing_behind(flags, message, tmp_path, capsys):
    out = tmp_path / "run"
    status, found = status_and_message(capsys, ["--out", str(out), *flags])
    assert status == 2
    assert message in found
    assert not out.exists()
