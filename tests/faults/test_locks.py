"""Two runs never work in one folder at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from kdnet.errors import UserError
from kdnet.files import FolderLock
from kdnet.runs.opening import lock_for_all
from phantoms import generate_phantoms

HOLD = """
import sys
from pathlib import Path
from kdnet.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


class Processes:
    """Stands for Fabric in one of several processes."""

    def __init__(self, rank, told=None):
        self.is_global_zero, self.told = rank == 0, told

    def broadcast(self, value):
        return value if self.told is None else self.told


def test_a_second_run_is_refused_until_the_first_one_is_gone(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        for _ in range(2):  # that the second one asks must not take the folder from the first
            with pytest.raises(UserError, match=rf"process {process.pid} on .* since"):
                FolderLock(tmp_path / "run")
        process.kill()
        process.wait()
        FolderLock(tmp_path / "run").release()


def test_a_folder_that_was_made_for_nothing_is_removed_and_others_stay(tmp_path):
    FolderLock(tmp_path / "new").release()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    FolderLock(tmp_path / "old").release()
    lock = FolderLock(tmp_path / "used")
    (tmp_path / "used" / "config.yaml").write_text("")
    lock.release()
    lock.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "used"]


def test_the_first_process_of_a_run_holds_the_folder_and_all_are_refused_together(tmp_path):
    lock = lock_for_all(tmp_path, Processes(0))
    assert lock_for_all(tmp_path, Processes(1)) is None
    for process in (Processes(0), Processes(1, told="in use")):
        with pytest.raises(UserError, match="in use"):
            lock_for_all(tmp_path, process)
    lock.release()


def test_train_refuses_a_folder_in_use_and_leaves_its_files_alone(tmp_path, capsys):
    data = generate_phantoms(tmp_path / "data", subjects=6, seed=0, size=16, progress=False)
    lock = FolderLock(tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    status = train.main(["--data-root", str(data), "--preset", "demo", "--out", f"{tmp_path}/run"])
    assert status == 2
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    lock.release()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .* cannot be written"):
        FolderLock(tmp_path / "file" / "run")
