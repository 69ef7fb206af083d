"""The array scripts with SLURM's commands replaced by ones that note how they are called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import train
from crossval import CROSSVAL
from kdnet.config import parse_config, parse_for

FOLDER = Path(train.__file__).parent / "slurm"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def submit(tmp_path):
    """Runs one task; gives its exit status, the calls of srun and scontrol, and its messages."""
    calls = tmp_path / "calls"
    for name in ("srun", "scontrol"):
        command = tmp_path / name
        command.write_text(
            f'#!/bin/bash\nprintf "%s\\n" {name} "$@" >> "{calls}"\nexit ${{STATUS:-0}}\n'
        )
        command.chmod(0o755)

    def run(unit, script="array.sbatch", **variables):
        calls.write_text("")
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_ARRAY_TASK_ID": str(unit),
            "SLURM_JOB_ID": "77",
            "DATA": "brats data",
        }
        found = subprocess.run(
            ["bash", str(FOLDER / script)],
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        return found.returncode, calls.read_text().splitlines(), found.stderr

    return run


def configuration(calls):
    assert calls[:3] == ["srun", ".venv/bin/python", "examples/brats_kdnet/train.py"]
    return parse_config(calls[3:])


def test_units_are_every_fold_of_every_network_each_in_its_own_folder(submit):
    found = [configuration(submit(unit)[1]) for unit in range(6)]
    units = [(config.network.backbone, config.data.fold) for config in found]
    assert units == [(name, fold) for name in ("kdnet", "multiresunet") for fold in range(3)]
    assert len({config.run.out for config in found}) == 6
    assert {config.data.cache_dir for config in found} == {Path("runs/array/cache")}
    assert found[0].data.data_root == Path("brats data")
    assert found[0].run.preset == "paper"


@pytest.mark.parametrize(
    ("unit", "variables", "said"),
    [(6, {}, "use --array=0-5"), (0, {"DATA": ""}, "set DATA")],
)
def test_what_cannot_be_trained_is_refused(submit, unit, variables, said):
    status, calls, message = submit(unit, **variables)
    assert status != 0
    assert calls == []
    assert said in message


def test_variables_reach_the_training(submit):
    network, several = "monai.networks.nets.SegResNet", {"SLURM_NTASKS_PER_NODE": "4"}
    given = {"FOLDS": "5", "NETWORKS": network, "PRESET": "cpu", "RUNS": "elsewhere"}
    more = {"EXTRA": "--epochs 7 --seed 3", "SLURM_JOB_NUM_NODES": "2"}
    status, calls, _ = submit(4, **given, **several, **more)
    config = configuration(calls)
    assert status == 0
    assert (config.data.folds, config.data.fold) == (5, 4)
    assert config.run.out == Path("elsewhere/SegResNet-fold4")
    training = config.training
    assert (training.epochs, training.seed) == (7, 3)
    assert (training.devices, training.num_nodes, training.strategy) == (4, 2, "ddp")


@pytest.mark.parametrize("script", ["array.sbatch", "crossval.sbatch"])
@pytest.mark.parametrize(
    ("status", "requeued"), [(138, True), (143, False), (2, False), (0, False)]
)
def test_only_a_unit_that_ran_out_of_time_is_queued_again(submit, script, status, requeued):
    found, calls, _ = submit(0, script, STATUS=str(status))
    assert found == status
    assert (calls[-3:] == ["scontrol", "requeue", "77"]) is requeued


def test_a_task_of_a_cross_validation_is_one_of_its_units(submit):
    _, calls, _ = submit(4, "crossval.sbatch", ROWS="table1", EXTRA="--folds 5", RUNS="there")
    assert calls[:3] == ["srun", ".venv/bin/python", "examples/brats_kdnet/crossval.py"]
    config, options = parse_for(CROSSVAL, calls[3:])
    assert (config.data.folds, config.run.out, config.run.preset) == (5, Path("there"), "paper")
    assert (options.rows, options.unit) == (("table1",), "4")
