"""A run that is killed again and again ends as one that never was.

Phantoms, tiny networks, one thread: three networks, teacher cache, scores and report; a study with
its search likewise.
"""

import json
import random

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from killing import is_wanted, start
from quick import PLAIN, TINY
from safetensors.torch import load_file

import study
import train
from kdnet.training.checkpoint import read_metadata
from kdnet.training.history import read_history

KILLS = 20
SEED = 8
SMALL = [
    *(*TINY, *PLAIN, "--phantoms", "6", "--phantom-size", "16"),
    *("--epochs", "3", "--folds", "3", "--batch-size", "2"),
]
STUDY = {
    "title": "Killed",
    "options": {"validation_fraction": 0, "selection": "last", "schedule": "onecycle"},
    "recipes": {"soft": {"label": "soft targets", "options": {"binarisation": "soft"}}},
    "chosen": "soft",
    "blocks": [{"recipes": ["baseline", "soft"], "labelled": [2]}],
    "searches": {"few": {"labelled": 1, "space": {"imitation": [0.5, 0.9]}}},
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Programs with their arguments, but for the folder."""
    file = tmp_path_factory.mktemp("file") / "killed.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    few = ["--study", str(file), *SMALL, "--phantoms", "8", "--epochs", "1", "--folds", "2"]
    return {
        "train": (train, SMALL),
        "study": (study, [*few, "--jobs", "1"]),
        "search": (study, [*few, "--search", "few", "--trials", "2"]),
    }


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    """An uninterrupted run of a program and its moments, made when it is first asked for."""
    made = {}

    def make(name):
        if name not in made:
            folder, (program, arguments) = tmp_path_factory.mktemp(name), commands[name]
            given = [*arguments, "--out", str(folder / "whole")]
            status, moments, printed = start(given, folder / "log.txt", program=program)
            assert status == 0, printed
            made[name] = folder / "whole", moments
        return made[name]

    return make


def assert_same(one, other):
    units, others = (
        sorted(str(path.parent.relative_to(run)) for path in run.rglob("state.safetensors"))
        for run in (one, other)
    )
    assert units == others
    for unit in units:
        for name in ("model.safetensors", "last.safetensors"):
            first, second = (load_file(run / unit / name) for run in (one, other))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first), (unit, name)
            metadata = [read_metadata(run / unit / name) for run in (one, other)]
            assert metadata[0] == metadata[1]
        histories = [read_history(run / unit / "history.csv") for run in (one, other)]
        rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in h] for h in histories]
        assert rows[0] == rows[1]
        maps = [sorted((run / unit / "predictions").glob("[!.]*")) for run in (one, other)]
        assert [path.name for path in maps[0]] == [path.name for path in maps[1]]
        for first, second in zip(*maps, strict=True):
            assert np.array_equal(*(np.asanyarray(nib.load(p).dataobj) for p in (first, second)))
    tables = sorted(str(path.relative_to(one)) for path in one.rglob("*.csv"))
    tables += [str(path.relative_to(one)) for path in one.rglob("trials.json")]
    for name in (name for name in tables if not name.endswith("history.csv")):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def assert_same_page(one, other):
    assert (one / "slices.json").read_bytes() == (other / "slices.json").read_bytes()
    assert (other / "report.html").read_text().rstrip().endswith("</html>")
    for record in other.glob("units/*/*/unit.json"):
        assert json.loads(record.read_text())["seconds"].keys() >= {"data", "training"}


def kill_and_resume(command, folder, log, choose):
    """Start until the run is at its end; return in which moments it died."""
    died = []
    program, arguments = command
    given = [*arguments, "--out", str(folder)]
    while True:
        status, moments, printed = start(given, log, program=program, **choose(len(died)))
        if status == 0:
            return died
        assert status == -9, printed
        assert "Traceback" not in printed
        died.append(moments[-1] if moments else "before anything was written")
        assert len(died) < 200


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "kills"), [("train", KILLS), ("study", 8), ("search", 8)])
def test_a_run_killed_again_and_again_is_the_uninterrupted_run(
    commands, whole, tmp_path, name, kills
):
    run, moments = whole(name)
    generator = random.Random(SEED)
    print(f"seed {SEED}, {len(moments)} moments in an uninterrupted run")

    # Short ways first, so that a fast machine is not at the end before it was killed often enough;
    # longer ones later, as some parts of a run begin anew.
    def choose(number):
        if number % 4 == 3:
            return {"after": generator.uniform(0.05, 0.4)}
        return {"at": generator.randint(1, len(moments) // 16 + 2 * number)}

    died = kill_and_resume(commands[name], tmp_path / "run", tmp_path / "log.txt", choose)
    print(f"killed {len(died)} times:", *died, sep="\n  ")
    assert len(died) >= kills
    assert_same(run, tmp_path / "run")
    if name == "train":
        assert_same_page(run, tmp_path / "run")


TARGETS = {
    "a checkpoint's state": "half save_file .*state[.]safetensors$",
    "an entry of the teacher cache": "half torch[.]save",
    "weights": "half save_file .*(model|last)[.]safetensors$",
    "a history": "half writerows",
    "weights renamed, state not": "after replace model.safetensors",
    "a state before its folder is flushed": "after replace state.safetensors",
    "a subject in the cache": "before replace Phantom",
    "the configuration": "after replace config.yaml",
    "the case lists": "before replace folds.json$",
    "what a unit trains": "before replace unit.json$",
    "a subject half made": "before replace Phantom_0003$",
    "a label map": "half nib[.]save",
    "the scores": "before replace scores.csv",
    "slices": "before replace slices.json",
    "the report": "before replace report.html",
    "a step": "before take_step",
}


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", TARGETS)
def test_a_kill_in_this_very_moment_changes_nothing(commands, whole, tmp_path, what):
    run, moments = whole("train")
    wanted = TARGETS[what]
    number = sum(is_wanted(wanted, moment) for moment in moments)
    assert number, f"{wanted!r} never happens"
    at = random.Random(f"{SEED} {what}").randint(1, number)
    print(f"{wanted}: {at} of {number}")
    places = (commands["train"], tmp_path / "run", tmp_path / "log.txt")
    died = kill_and_resume(*places, lambda n: {} if n else {"at": at, "wanted": wanted})
    assert len(died) == 1
    assert is_wanted(wanted, died[0])
    assert_same(run, tmp_path / "run")
    assert_same_page(run, tmp_path / "run")
