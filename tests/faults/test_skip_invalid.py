"""--skip-invalid: sound subjects are used, the others named, and they stay the same ones."""

import json
import shutil
from pathlib import Path

import pytest
from quick import QUICK, TINY
from rich.console import Console
from written import write_subject, write_volume

import crossval
import train
from faults.corpus import FAULTS, image, label_map, volume_of
from kdnet.config import parse_config
from kdnet.files import write_json
from kdnet.runs.folder import Folder
from kdnet.runs.plan import fold_of
from kdnet.runs.subjects import find_data

BROKEN = ("truncated", "label_seven", "all_nan")
SMALL = [
    *(*TINY, *QUICK, "--crop", "null", "--epochs", "1", "--folds", "3"),
    *("--description", "brats2021"),
]


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "data"
    for number in range(6):
        write_subject(root / f"good{number}")
    for name in BROKEN:
        FAULTS[name][0](write_subject(root / name))
    return root


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return ["--data-root", str(data), "--out", str(out), *SMALL, *more]


def test_without_the_flag_all_problems_are_told_and_nothing_is_trained(data, tmp_path, refusal):
    message = refusal(train, *arguments(data, tmp_path / "run"))
    assert message.lstrip().startswith("Problems: 3, in 3 of the subjects")
    assert all(name in message for name in (*BROKEN, "unknown label 7"))
    # With nothing left to train on, the flag does not help.
    for folder in data.glob("good*"):
        shutil.rmtree(folder)
    message = refusal(train, *arguments(data, tmp_path / "run", "--skip_invalid", "true"))
    assert "Problems: 3, in 3 of the subjects" in message
    assert not (tmp_path / "run").exists()


def found(data, tmp_path):
    config = parse_config(arguments(data, tmp_path / "run", "--skip-invalid", "true"))
    return config, find_data(config, Console(quiet=True))


def test_the_sound_ones_are_dealt_as_if_the_others_were_not_there(data, tmp_path):
    config, kept = found(data, tmp_path)
    assert [*kept.subjects] == [f"good{number}" for number in range(6)]
    assert {problem.subject for problem in kept.skipped} == {*BROKEN}
    for name in BROKEN:
        shutil.rmtree(data / name)
    _, alone = found(data, tmp_path)
    assert fold_of(kept.foldable, config) == fold_of(alone.foldable, config)


def test_a_run_that_goes_on_leaves_out_the_same_ones_though_they_were_repaired(data, tmp_path):
    config, kept = found(data, tmp_path)
    folder = Folder(tmp_path / "run")
    folder.begin(config, kept.description)
    write_json(folder.skipped, {"subjects": BROKEN})
    label_map(data / "label_seven").write_bytes(label_map(data / "good0").read_bytes())
    image(data / "good0").write_bytes(b"")  # found where it is read; the folds stay
    _, again = found(data, tmp_path)
    assert again.subjects == kept.subjects
    assert again.skipped is None


def test_what_only_looks_wrong_is_told_and_left_in(data, tmp_path, capsys):
    volume = volume_of(image(data / "good0")).astype("float32")
    volume[:6] = 1e-5
    write_volume(image(data / "good0"), volume)
    config = parse_config(arguments(data, tmp_path / "run", "--skip-invalid", "true"))
    kept = find_data(config, Console())
    assert "good0" in kept.subjects
    assert {problem.subject for problem in kept.skipped} == {*BROKEN}
    assert "1 images look unusual" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_run_trains_on_the_others_says_so_and_goes_on(data, tmp_path, capsys):
    out = tmp_path / "run"
    command = arguments(data, out, "--skip-invalid", "true")
    assert train.main(command) == 0
    said = capsys.readouterr().out
    assert "Left out: 3 of 9 subjects: all_nan, label_seven, truncated" in said
    skipped = json.loads((out / "skipped.json").read_text())
    assert sorted(skipped["subjects"]) == sorted(BROKEN)
    assert any("unknown label 7" in problem["reason"] for problem in skipped["problems"])
    assert "3 subjects were left out" in (out / "report.html").read_text()
    folds = (out / "folds.json").read_text()
    (fold,) = json.loads(folds)["folds"]
    used = {name for part in ("train", "validation", "test") for name in fold[part]}
    assert used == {f"good{n}" for n in range(6)}
    next(out.glob("units/student/*/scores.csv")).unlink()
    assert train.main(command) == 0
    assert (out / "folds.json").read_text() == folds
    assert train.main(arguments(data, out)) == 2
    assert "skip_invalid: True there, False now" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cross_validation_does_without_the_same_ones_in_every_fold(data, tmp_path, capsys):
    out = tmp_path / "crossval"
    command = arguments(data, out, "--skip-invalid", "true", "--rows", "baseline", "--jobs", "1")
    assert crossval.main(command) == 0
    folds = json.loads((out / "folds.json").read_text())["folds"]
    assert {name for fold in folds for name in fold["test"]} == {f"good{n}" for n in range(6)}
    assert sorted(json.loads((out / "skipped.json").read_text())["subjects"]) == sorted(BROKEN)
    assert "3 subjects were left out" in (out / "report.html").read_text()
    assert crossval.main(command) == 0
    assert "3 units, 3 done" in capsys.readouterr().out
