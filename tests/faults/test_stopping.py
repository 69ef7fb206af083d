"""A signal outside of a training ends a command with a sentence; units end with their pool."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from quick import QUICK, TINY

import report
import train
from kdnet.command import exit_status
from kdnet.errors import UserError
from kdnet.runs import pool
from kdnet.stopping import PARENT, StoppedError, deferring, leave_with_parent, stoppable
from kdnet.training.checkpoint import load_state
from kdnet.training.history import read_history
from phantoms import generate_phantoms

APPLICATION = Path(train.__file__).parent
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_sentence_and_a_status(capsys, number):
    before = signal.getsignal(number)
    cleared = []

    def action():
        try:
            send(number)
        finally:
            send(signal.SIGTERM)  # a second one does not disturb what is cleared away
            cleared.append(True)

    assert exit_status(action) == 128 + number
    assert f"Stopped by {number.name}" in capsys.readouterr().err
    assert cleared
    assert signal.getsignal(number) is before


def test_a_step_inside_is_finished_before_the_signal_is_looked_at():
    with stoppable():
        with deferring() as interruption:
            send(signal.SIGTERM)
            send(signal.SIGINT)
        assert interruption.received == signal.SIGTERM
        with pytest.raises(StoppedError):
            send(signal.SIGTERM)


def test_the_third_ctrl_c_leaves_at_once_whatever_else_arrives():
    with stoppable(), deferring() as interruption:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            send(number)
        assert interruption.received == signal.SIGINT
        with pytest.raises(StoppedError):
            send(signal.SIGINT)


def swallowing():
    try:
        send(signal.SIGTERM)
    except Exception as error:
        raise UserError("swallowed") from error


def test_no_handler_of_errors_takes_it_for_one():
    with stoppable(), pytest.raises(StoppedError):
        swallowing()


@pytest.mark.usefixtures("training_alone")
def test_train_stopped_before_its_first_step_leaves_a_folder_that_goes_on(
    tmp_path, monkeypatch, capsys
):
    data = generate_phantoms(tmp_path / "data", subjects=6, seed=0, size=16, progress=False)
    given = ["--data-root", str(data), *TINY, *QUICK, "--folds", "3", "--epochs", "1"]
    given += ["--out", str(tmp_path / "run")]
    # Each goes on with what the one before left.
    for place in ("preparation.check_files", "preparation.prepare_parts", "unit.teach"):
        with monkeypatch.context() as patch:
            patch.setattr(f"kdnet.runs.{place}", lambda *_, **__: send(signal.SIGTERM))
            assert train.main(given) == 128 + signal.SIGTERM, place
        assert "Stopped by SIGTERM" in capsys.readouterr().err
        assert not list(tmp_path.rglob("*.partial*"))
    assert train.main(given) == 0


def test_a_report_is_stopped_like_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "write_reports", lambda *_: send(signal.SIGUSR1))
    assert report.main([str(tmp_path)]) == 128 + signal.SIGUSR1
    assert "Stopped by SIGUSR1" in capsys.readouterr().err


CHILD = """
import sys, time
from pathlib import Path
from kdnet.stopping import StoppedError, leave_with_parent, stoppable
try:
    with stoppable():
        leave_with_parent()
        Path(sys.argv[1]).write_text("ready")
        time.sleep(60)
except StoppedError as stop:
    Path(sys.argv[1]).write_text(str(stop))
"""
POOL = """
import os, subprocess, sys, time
from kdnet.stopping import PARENT
environment = os.environ | ({PARENT: str(os.getpid())} if sys.argv[3] == "pool" else {})
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], env=environment,
                 start_new_session=True)
time.sleep(60)
"""


def wait_for(path, text, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not (path.is_file() and text in path.read_text()):
        time.sleep(0.05)
    return path.is_file() and text in path.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux")
@pytest.mark.parametrize("kind", ["pool", "shell"])
def test_a_unit_ends_with_its_pool_but_not_with_a_shell(tmp_path, kind):
    environment = os.environ | {"PYTHONPATH": str(APPLICATION)}
    command = [sys.executable, "-c", POOL, CHILD, str(tmp_path / "said"), kind]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as parent:
        assert wait_for(tmp_path / "said", "ready", 60)
        parent.kill()
    ended = wait_for(tmp_path / "said", "Stopped by SIGTERM", 20 if kind == "pool" else 1)
    assert ended == (kind == "pool")


def test_a_pool_that_is_gone_already_stops_the_unit_at_once(monkeypatch):
    monkeypatch.setenv(PARENT, "1" if os.getppid() != 1 else "2")
    with stoppable(), pytest.raises(StoppedError):
        leave_with_parent()
    assert PARENT not in os.environ


def start_pool(out, *more, log):
    command = [
        *(sys.executable, str(APPLICATION / "crossval.py"), *TINY, *QUICK, "--jobs", "2"),
        *("--phantoms", "6", "--phantom-size", "16", "--folds", "2"),
        *("--rows", "baseline", "--out", str(out), *more),
    ]
    return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def test_a_signal_while_a_unit_is_started_waits_until_it_is_noted(tmp_path, monkeypatch):
    class Process:
        ended = ()

        def __init__(self, *_, **__):
            send(signal.SIGTERM)

        def poll(self):
            return None

        def terminate(self):
            self.ended += ("terminated",)

        def wait(self):
            send(signal.SIGTERM)  # nor does a second one keep the pool from waiting
            self.ended += ("waited for",)

    units = [SimpleNamespace(name=name) for name in ("first", "second")]
    nothing = {"is_done": lambda _: False, "teachers_of": lambda _: []}
    plan = SimpleNamespace(root=tmp_path, **nothing)
    monkeypatch.setattr(pool.subprocess, "Popen", Process)
    monkeypatch.setattr(pool.Pool, "_say", lambda *_: None)
    monkeypatch.setattr(pool.Pool, "_log", lambda _, name: tmp_path / name)
    running = pool.Pool(plan, units, 1, [])
    with pytest.raises(StoppedError) as stop:
        running.run(pool.Console(quiet=True))
    assert stop.value.exit_status == 128 + signal.SIGTERM
    # One at a time: the other one was not started.
    ((process, _),) = running.running.values()
    assert process.ended == ("terminated", "waited for")


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux")
def test_the_units_of_a_killed_pool_keep_their_step_and_leave(tmp_path):
    out = tmp_path / "run"
    with (tmp_path / "log.txt").open("wb") as log:
        parent = start_pool(out, "--batch-size", "1", "--epochs", "5000", log=log)
    end = time.monotonic() + 400
    while len(list(out.rglob("history.csv"))) < 2 and time.monotonic() < end:
        assert parent.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.2)
    parent.kill()
    parent.wait()
    logs = list(out.rglob("log.txt"))
    assert len(logs) == 2
    for file in logs:
        assert wait_for(file, "Give the same command to go on", 120), file.read_text()
        # An epoch that was begun is kept beside the finished ones, which are all there.
        kept = load_state(file.parent / "state.safetensors")
        assert kept["epoch"] == len(read_history(file.parent / "history.csv")) >= 1
