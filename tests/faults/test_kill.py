"""A run that is killed again and again ends as one that never was.

Phantoms, tiny networks, one thread: three networks, teacher cache, scores and report.
"""

import json
import random

import nibabel as nib
import numpy as np
import pytest
import torch
from killing import is_wanted, start
from safetensors.torch import load_file

from kdnet.runs.run_folder import ROLES, RunFolder
from kdnet.training.checkpoint import read_metadata
from kdnet.training.history import read_history

KILLS = 20
SEED = 8
SMALL = [
    *("--preset", "demo", "--phantoms", "6", "--phantom_size", "16", "--grid", "8,8,8"),
    *("--backbone_arguments", '{"channels": [2, 4]}', "--threads", "1", "--workers", "1"),
    *("--performance", "plain", "--epochs", "3", "--folds", "3", "--batch_size", "2"),
]


def arguments(folder):
    return [*SMALL, "--out", str(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, and its moments."""
    folder = tmp_path_factory.mktemp("kill")
    status, moments, printed = start(arguments(folder / "whole"), folder / "log.txt")
    assert status == 0, printed
    return RunFolder(folder / "whole"), moments


def assert_same(one, other):
    for role in ROLES:
        for name in ("model.safetensors", "last.safetensors"):
            first, second = (load_file(run.role(role) / name) for run in (one, other))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first), (role, name)
            metadata = [read_metadata(run.role(role) / name) for run in (one, other)]
            assert metadata[0] == metadata[1]
        histories = [read_history(run.role(role) / "history.csv") for run in (one, other)]
        rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in h] for h in histories]
        assert rows[0] == rows[1]
        maps = [sorted(run.predictions(role).glob("[!.]*")) for run in (one, other)]
        assert [path.name for path in maps[0]] == [path.name for path in maps[1]]
        for first, second in zip(*maps, strict=True):
            assert np.array_equal(*(np.asanyarray(nib.load(p).dataobj) for p in (first, second)))
    for name in ("scores.csv", "cases.json", "description.json"):
        assert (one.root / name).read_bytes() == (other.root / name).read_bytes(), name
    slices = [np.load(run.root / "slices.npz") for run in (one, other)]
    assert set(slices[0]) == set(slices[1])
    assert all(np.array_equal(slices[0][name], slices[1][name]) for name in slices[0])
    assert (other.root / "report.html").read_text().rstrip().endswith("</html>")
    assert json.loads(other.summary.read_text())["seconds"].keys() >= {"data", "report"}


def kill_and_resume(folder, log, choose):
    """Start until the run is at its end; return in which moments it died."""
    died = []
    while True:
        status, moments, printed = start(arguments(folder), log, **choose(len(died)))
        if status == 0:
            return died
        assert status == -9, printed
        assert "Traceback" not in printed
        died.append(moments[-1] if moments else "before anything was written")
        assert len(died) < 200


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_run_killed_twenty_times_is_the_uninterrupted_run(whole, tmp_path):
    run, moments = whole
    generator = random.Random(SEED)
    print(f"seed {SEED}, {len(moments)} moments in an uninterrupted run")

    # Short ways first, so that a fast machine is not at the end before it was killed often enough;
    # longer ones later, as some parts of a run begin anew.
    def choose(number):
        if number % 4 == 3:
            return {"after": generator.uniform(0.05, 0.4)}
        return {"at": generator.randint(1, len(moments) // 16 + 2 * number)}

    died = kill_and_resume(tmp_path / "run", tmp_path / "log.txt", choose)
    print(f"killed {len(died)} times:", *died, sep="\n  ")
    assert len(died) >= KILLS
    assert_same(run, RunFolder(tmp_path / "run"))


TARGETS = {
    "a checkpoint's state": "half save_file .*state[.]safetensors$",
    "an entry of the teacher cache": "half torch[.]save .*[.]partial$",
    "weights": "half save_file .*(model|last)[.]safetensors$",
    "a history": "half writerows",
    "weights renamed, state not": "after replace model.safetensors",
    "a state before its folder is flushed": "after replace state.safetensors",
    "a subject in the cache": "before replace Phantom",
    "the configuration": "after replace config.yaml",
    "the case lists": "before replace cases.json$",
    "a subject half made": "before rename Phantom_0003$",
    "a label map": "half nib[.]save",
    "the scores": "before replace scores.csv",
    "slices": "half savez_compressed",
    "the report": "before replace report.html",
    "a step": "before take_step",
}


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", TARGETS)
def test_a_kill_in_this_very_moment_changes_nothing(whole, tmp_path, what):
    run, moments = whole
    wanted = TARGETS[what]
    number = sum(is_wanted(wanted, moment) for moment in moments)
    assert number, f"{wanted!r} never happens"
    at = random.Random(f"{SEED} {what}").randint(1, number)
    print(f"{wanted}: {at} of {number}")
    died = kill_and_resume(
        tmp_path / "run",
        tmp_path / "log.txt",
        lambda n: {"at": at, "wanted": wanted} if not n else {},
    )
    assert len(died) == 1
    assert is_wanted(wanted, died[0])
    assert_same(run, RunFolder(tmp_path / "run"))
