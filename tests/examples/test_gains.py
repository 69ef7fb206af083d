"""What lets a student gain: augmentation, inherited weights, a fitted temperature, a diagnosis."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from quick import TINY
from rich.console import Console
from safetensors.torch import load_file

import train
from kdnet.config import parse_config, parse_for, recipe_text, with_fitting_start
from kdnet.data.augmentation import BRIGHTNESS, CONTRAST, augment
from kdnet.data.description import load_description
from kdnet.data.loading import build_loader, start_epoch
from kdnet.runs.folder import Folder
from kdnet.runs.unit import options_for
from kdnet.studies.design import read_design
from kdnet.training.diagnosis import chosen
from study import STUDY

SMALL = [
    *(*TINY, "--folds", "3", "--preset", "demo", "--seed", "0"),
    *("--recipe", "options", "--augment", "true", "--start", "teacher", "--temperature", "fit"),
    *("--validation-fraction", "0", "--labelled", "2", "--batch-size", "2"),
]


def subject(axes: int, seed: int = 0) -> dict:
    """Two modalities that differ by a factor, in a brain with background around it."""
    torch.manual_seed(seed)
    image = torch.zeros(2, *[16] * axes)
    inside = (slice(4, 12),) * axes
    image[0][inside] = 1 + torch.rand([8] * axes)
    image[1] = 2 * image[0]
    return {"image": image, "label": (image[:1] > 1.5).to(torch.uint8), "name": "a"}


@pytest.mark.parametrize("axes", [2, 3])
def test_augmentation_moves_all_modalities_and_the_reference_alike(axes):
    before = subject(axes)
    after = augment(before, 5)
    first, second = after["image"]
    brain = first != 0
    assert torch.equal(brain, second != 0)
    # Up to contrast and brightness of their own, they still differ by a factor.
    points = torch.stack([first[brain], second[brain]])
    assert torch.corrcoef(points)[0, 1] > 0.9999
    assert not torch.equal(brain, before["image"][0] != 0)
    assert after["label"].dtype == torch.uint8
    assert {*after["label"].unique().tolist()} == {0, 1}
    assert not after["label"][0][~brain].any()


def test_rotations_are_of_voxels_whatever_the_shape_of_the_volume(monkeypatch):
    monkeypatch.setattr("kdnet.data.augmentation.SCALE", 0.0)
    monkeypatch.setattr("kdnet.data.augmentation.CONTRAST", 0.0)
    monkeypatch.setattr("kdnet.data.augmentation.BRIGHTNESS", 0.0)
    ball = torch.stack(torch.meshgrid(*map(torch.arange, (24, 24, 12)), indexing="ij")).float()
    centre = torch.tensor([11.5, 11.5, 5.5]).reshape(3, 1, 1, 1)
    image = torch.exp(-((ball - centre) ** 2).sum(0, keepdim=True) / 8)
    moved = augment({"image": image, "name": "ball"}, 4)["image"]
    # A ball in the middle stays what it is; sheared axes would make an ellipsoid of it.
    assert torch.allclose(moved, image, atol=0.08)


def test_augmentation_follows_from_its_number_alone():
    once, again, other = (augment(subject(3), draw)["image"] for draw in (7, 7, 8))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_intensities_stay_within_their_limits_and_background_stays_zero():
    flat = subject(3) | {"image": torch.ones(1, 16, 16, 16)}
    for draw in range(20):
        values = augment(flat, draw)["image"][:, 6:10, 6:10, 6:10]
        assert ((values - 1).abs() <= CONTRAST + BRIGHTNESS + 1e-6).all()
    empty = subject(3) | {"image": torch.zeros(1, 16, 16, 16)}
    assert not augment(empty, 3)["image"].any()


def test_a_subject_without_reference_is_augmented_too():
    sample = subject(3)
    del sample["label"]
    assert "label" not in augment(sample, 1)


def test_an_epoch_of_augmented_samples_comes_again_and_the_next_is_another():
    chosen = {"workers": 0, "seed": 0, "shuffle": True, "flips": True, "augmented": True}
    loader = build_loader([subject(3, seed) for seed in range(4)], 2, **chosen)

    def images(epoch):
        start_epoch(loader, epoch)
        return torch.cat([batch["image"] for batch in loader])

    assert torch.equal(images(0), images(0))
    assert not torch.equal(images(0), images(1))
    # No key names them, so that no cache takes one for another.
    assert all("key" not in batch for batch in loader)


@pytest.mark.parametrize(("value", "read"), [("fit", "fit"), ("2.5", 2.5)])
def test_a_temperature_is_a_number_or_fitted(value, read):
    assert parse_config(["--temperature", value]).objective.temperature == read


def test_the_recipe_of_a_situation_is_told():
    few = parse_config(["--recipe", "auto", "--labelled", "3"])
    every = parse_config(["--recipe", "auto", "--labelled", "null"])
    assert few.network.start == "teacher"
    assert "few" in recipe_text(few)
    assert "all" in recipe_text(every)
    assert recipe_text(few) != recipe_text(every)


def test_a_recipe_lets_a_student_of_another_kind_than_its_teacher_start_from_scratch():
    few = ["--recipe", "auto", "--labelled", "3"]
    assert with_fitting_start(parse_config(few)).network.start == "teacher"
    for other in (["--teacher-backbone", "multiresunet"], ["--teacher-backbone-arguments", "{}"]):
        assert with_fitting_start(parse_config([*few, *other])).network.start == "scratch"


def test_a_recipe_lets_a_student_whose_modality_its_teacher_does_not_see_start_from_scratch():
    few = ["--recipe", "auto", "--labelled", "3", "--student-modalities", "t1ce"]
    assert parse_config([*few, "--teacher-modalities", "t1,t1ce"]).network.start == "teacher"
    assert parse_config([*few, "--teacher-modalities", "t1,t2"]).network.start == "scratch"


@pytest.mark.parametrize("labelled", ["3", "null"])
def test_a_start_that_is_asked_for_is_no_recipes_to_change(labelled, tmp_path, refusal):
    asked = ["--recipe", "auto", "--labelled", labelled, "--start", "teacher"]
    other = ["--teacher-modalities", "t1,t2"]
    assert parse_config([*asked, *other]).network.start == "teacher"
    small = ["--phantoms", "6", "--phantom-size", "16", "--preset", "demo", *TINY]
    said = refusal(train, *small, *asked, *other, "--out", tmp_path / "run")
    assert "--start scratch" in said
    own = tmp_path / "own.yaml"
    own.write_text("start: teacher")
    assert parse_config([*asked[:4], *other, "--config", str(own)]).network.start == "teacher"


@pytest.mark.parametrize(
    ("lists", "start"),
    [
        ({"train": ["a"]}, "scratch"),
        ({"train": ["a"], "unlabelled": []}, "scratch"),
        ({"train": ["a"], "unlabelled": ["b"]}, "teacher"),
        ({"folds": [{"train": ["a"], "unlabelled": ["b"]}]}, "teacher"),
        ({"folds": 3}, "scratch"),
    ],
)
def test_a_split_file_says_whether_all_are_labelled(lists, start, tmp_path):
    file = tmp_path / "split.json"
    file.write_text(json.dumps(lists))
    config = parse_config(["--recipe", "auto", "--labelled", "null", "--split-file", str(file)])
    assert config.network.start == start
    assert ("few" in recipe_text(config)) == (start == "teacher")


def test_a_recipe_tells_nothing_that_another_objective_does_not_read():
    told = recipe_text(parse_config(["--recipe", "auto", "--labelled", "3", "--objective", "xie"]))
    assert "start teacher" in told
    assert "xie" in told
    assert "temperature" not in told


def test_weights_that_do_not_fit_are_refused_before_anything_is_trained(tmp_path, refusal):
    other = ["--teacher-backbone", "multiresunet", "--teacher-backbone-arguments"]
    out = ["--out", tmp_path / "run", "--phantoms", "6", "--phantom-size", "16"]
    assert "--start scratch" in refusal(train, *SMALL, *other, '{"filters": [4, 8]}', *out)
    assert not (tmp_path / "run" / "units").exists()


@pytest.mark.parametrize("name", ["lgg", "brats2021", "phantoms"])
def test_studies_whose_rows_are_stored_stay_what_they_were_whatever_their_preset_becomes(name):
    config = parse_for(STUDY, read_design(name).arguments())[0]
    told = (config.data.augment, config.objective.temperature, config.training.memory_format)
    assert told == (False, 5.0, "contiguous")
    assert (config.training.seed, config.network.start) == (0, "scratch")


@pytest.mark.usefixtures("training_alone")
def test_subjects_without_reference_teach_by_patches_at_new_positions_too(tmp_path):
    out = ["--out", str(tmp_path / "run"), "--phantoms", "6", "--phantom-size", "16"]
    flags = [*SMALL, "--epochs", "1", "--predictions", "false", *out]
    assert train.main([*flags, "--grid", "null", "--patch", "8,8,8"]) == 0


class Silent(torch.nn.Module):
    """A teacher that predicts nothing."""

    def forward(self, image):
        return image[:, :2] * 0 - 1


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--objective", "hinton"], "fit"),
        (["--imitation", "0"], "fit"),
        (["--imitation", "0", "--imitation-start", "0.5"], 1.0),
        ([], 1.0),
    ],
)
def test_a_temperature_is_found_where_one_is_read_and_none_for_a_silent_teacher(options, found):
    config = parse_config([*SMALL, "--activation", "sigmoid", *options])
    description, recorded = load_description(Path("phantom")), []
    experiment = SimpleNamespace(
        config=config,
        temperature=None,
        modalities=tuple(description.modalities),
        data=SimpleNamespace(description=description),
        unit=SimpleNamespace(name="student"),
        fabric=Fabric(accelerator="cpu", devices=1),
        console=Console(quiet=True),
        loader=lambda *_, **__: [{"image": torch.zeros(1, 4, 4, 4, 4)}],
        record=lambda: recorded.append(experiment.temperature),
    )
    assert options_for(experiment, [Silent()]).temperature == found
    # At once: a kill before the first epoch must not cost it.
    assert recorded == ([] if found == "fit" else [found])


@pytest.fixture(scope="module")
def run(train_alone, phantoms, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gains") / "run"
    # Weights that stay where they start show where that was.
    flags = ["--data-root", str(phantoms), "--out", str(out), "--epochs", "1", *SMALL]
    assert train_alone(train, [*flags, "--learning_rate", "1e-30"]) == 0
    return out


def test_the_student_starts_from_its_teacher_and_the_baseline_does_not(run):
    teacher, baseline, student = (
        load_file(Folder(run).unit(f"{row}/fold0-seed0").model)
        for row in ("teacher", "baseline", "student")
    )
    cut = [name for name in student if student[name].shape != teacher[name].shape]
    alike = [name for name in student if name not in cut]
    assert all(torch.allclose(student[name], teacher[name], atol=1e-6) for name in alike)
    assert not all(torch.allclose(baseline[name], teacher[name], atol=1e-6) for name in alike)
    # T1ce is the third of the four modalities.
    (first,) = cut
    assert torch.allclose(student[first], teacher[first][:, 2:3], atol=1e-6)


def test_a_baseline_has_as_many_steps_as_teacher_and_student_together(run):
    steps = {
        row: len(Folder(run).unit(f"{row}/fold0-seed0").history.read_text().splitlines()) - 1
        for row in ("teacher", "baseline", "student")
    }
    assert steps == {"teacher": 1, "baseline": 2, "student": 1}


def test_what_decides_the_numbers_is_said_in_the_protocol(run):
    protocol = json.loads((run / "plan.json").read_text())["protocol"]
    labels = "2 of those in training labelled"
    for part in (labels, "starts from the teacher", "augmented", "T fit", "baseline 2"):
        assert part in protocol


def test_the_temperature_and_the_diagnosis_are_kept_and_shown(run):
    folder = Folder(run).unit("student/fold0-seed0").root
    record = json.loads((folder / "unit.json").read_text())
    assert 1 <= record["temperature"] <= 5
    assert f"SoftTargetDiceBCE(temperature={record['temperature']}" in record["objective"]
    found = json.loads((folder / "diagnosis.json").read_text())
    assert {row["name"] for row in found["terms"]} >= {"ground_truth"}
    text = (folder / "diagnosis.md").read_text()
    assert "fitted temperature" in text
    # What was taken of the teacher: its first layer was cut.
    assert "cut     encoder.0" in text
    others = Folder(run).unit("baseline/fold0-seed0").root
    assert not (others / "diagnosis.md").exists()
    assert "temperature" not in json.loads((others / "unit.json").read_text())


@pytest.mark.parametrize(
    ("labelled", "taken"),
    [({6}, [0, 1, 2, 6]), ({1, 6}, [0, 1, 2, 3]), ({}, [0, 1, 2, 3]), ({0, 6}, [0, 1, 2, 3])],
)
def test_a_diagnosis_sees_a_reference_where_there_is_one(labelled, taken):
    batches = [{"name": [i], "labelled": torch.tensor([False, i in labelled])} for i in range(8)]
    assert [batch["name"][0] for batch in chosen(batches)] == taken
    assert len(chosen([{"name": [0]}] * 8)) == 4


@pytest.mark.slow
def test_a_stopped_student_goes_on_with_its_temperature_and_its_augmentation(phantoms, tmp_path):
    program = [sys.executable, train.__file__, *SMALL]
    program += ["--data-root", str(phantoms), "--epochs", "40"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    subprocess.run([*program, "--out", str(whole)], check=True, capture_output=True)
    history = stopped / "units/student/fold0-seed0/history.csv"
    with subprocess.Popen([*program, "--out", str(stopped)], stdout=subprocess.DEVNULL) as process:
        while not (history.is_file() and len(history.read_text().splitlines()) > 3):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    subprocess.run([*program, "--out", str(stopped)], check=True, capture_output=True)
    for row in ("teacher", "student"):
        models = [load_file(Folder(f).unit(f"{row}/fold0-seed0").model) for f in (whole, stopped)]
        assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
