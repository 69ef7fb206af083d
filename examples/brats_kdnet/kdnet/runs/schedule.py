"""Train all units: one after the other in this process, or several at a time in processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from kdnet.runs.jobs import number_of_jobs, processors
from kdnet.runs.plan import Plan, Unit
from kdnet.runs.unit import run_unit
from kdnet.runs.view import View
from kdnet.errors import UserError
from kdnet.errors import explained
from privdistill import PrivDistillError
from kdnet.runs.stopping import PARENT
from kdnet.training.runtime import TrainingStoppedError

_PATIENCE = 0.5  # seconds between two looks at the processes


def train_units(
    plan: Plan,
    units: Sequence[Unit],
    jobs: int | str,
    command: Sequence[str],
    console: Console,
) -> dict[str, str]:
    """Train every unit that is not done, in this process or in several."""
    number = number_of_jobs(jobs, plan.config.training.accelerator)
    missing = [unit for unit in units if not plan.is_done(unit)]
    done, together = len(units) - len(missing), min(number, len(missing))
    at_a_time = f"; {together} at a time" if missing else ""
    console.print(f"{len(units)} units, {done} done{at_a_time}", highlight=False)
    if number == 1 or len(missing) <= 1:
        return run_here(plan, units, console)
    return Pool(plan, units, number, command).run(console)


def run_here(plan: Plan, units: Sequence[Unit], console: Console) -> dict[str, str]:
    """Train units one after the other, the progress of each training shown."""
    failed: dict[str, str] = {}
    view = View(plan, units)
    for number, unit in enumerate(units):
        if plan.is_done(unit):
            continue
        reason = blocked(plan, unit, failed)
        if reason is None:
            left = view.seconds_left(jobs=1)
            console.print(f"Unit {number + 1} of {len(units)}: {unit.name}{left}", highlight=False)
            try:
                with explained(unit.name):
                    run_unit(plan, unit, console)
            except (UserError, PrivDistillError) as error:
                reason = str(error)
        if reason is not None:
            failed[unit.name] = reason
            console.print(f"{unit.name} failed: {reason}", highlight=False)
    return failed


def blocked(plan: Plan, unit: Unit, failed: dict[str, str]) -> str | None:
    """Return why a unit cannot be trained: its teacher failed. None if it can."""
    lost = [teacher.name for teacher in plan.teachers_of(unit) if teacher.name in failed]
    return f"its teacher {lost[0]} failed" if lost else None


@dataclass
class Pool:
    """Units in processes of their own.

    Attributes:
        plan: Knows what is done.
        units: What is to be trained.
        jobs: Processes at a time.
        command: Starts this program with its options; `--unit NAME` is added.
        running: Processes by unit, with the slot that each holds.
        failed: Units that failed, with the reason.
    """

    plan: Plan
    units: Sequence[Unit]
    jobs: int
    command: Sequence[str]
    running: dict[str, tuple[subprocess.Popen[bytes], int]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    _asked: int = 0
    _starting: bool = False
    _leaving: bool = False

    def run(self, console: Console) -> dict[str, str]:
        """Train all units, show how far they are, and wait for the last one."""
        with View(self.plan, self.units).live(console, self.jobs) as view, self._stopping():
            while True:
                self._collect()
                waiting = self._start_ready()
                view.update(running=set(self.running), failed=self.failed)
                if not self.running and not waiting:
                    return self.failed
                time.sleep(_PATIENCE)

    def _collect(self) -> None:
        for name, (process, _) in list(self.running.items()):
            status = process.poll()
            if status is None:
                continue
            del self.running[name]
            if status != 0:
                self.failed[name] = _last_words(self._log(name), status)

    def _start_ready(self) -> list[Unit]:
        """Start what can be started; return what has to wait."""
        waiting = []
        for unit in self.units:
            if self.plan.is_done(unit) or unit.name in {*self.running, *self.failed}:
                continue
            reason = blocked(self.plan, unit, self.failed)
            if reason is not None:
                self.failed[unit.name] = reason
                continue
            ready = all(map(self.plan.is_done, self.plan.teachers_of(unit)))
            if ready and len(self.running) < self.jobs:
                self._start(unit)
            else:
                waiting.append(unit)
        return waiting

    def _start(self, unit: Unit) -> None:
        taken = {slot for _, slot in self.running.values()}
        slot = next(number for number in range(self.jobs) if number not in taken)
        log = self._log(unit.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._starting = True
        with log.open("ab") as stream:
            process = subprocess.Popen(  # noqa: S603
                [*self.command, "--unit", unit.name],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | self._share(slot) | {PARENT: str(os.getpid())},
                # Signals of the terminal are passed on by this process alone, once.
                start_new_session=True,
            )
        self.running[unit.name] = process, slot
        self._starting = False
        self._leave_if_asked()

    def _leave_if_asked(self) -> None:
        # Not between the start of a process and its note, which would leave it behind.
        if self._asked and not self._starting and not self._leaving:
            self._leaving = True
            raise TrainingStoppedError(
                self._asked,
                f"Stopped; {self.plan.root} keeps what is done. Give the same command to go on.",
            )

    def _share(self, slot: int) -> dict[str, str]:
        """Environment that gives a process its part of the machine."""
        if torch.cuda.is_available():
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            gpus = seen if seen != [""] else [str(i) for i in range(torch.cuda.device_count())]
            return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
        threads = str(max(1, processors() // self.jobs))
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        return {name: os.environ.get(name, threads) for name in names}

    def _log(self, name: str) -> Path:
        return self.plan.root / name / "log.txt"

    @contextmanager
    def _stopping(self) -> Any:
        """Pass a signal on to all processes and wait until they have kept what they have."""

        def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            self._asked = self._asked or number
            self._leave_if_asked()

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        previous = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            # Further signals change nothing while the processes keep what they have.
            self._leaving = True
            for process, _ in self.running.values():
                process.terminate()
            for process, _ in self.running.values():
                process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)


def _last_words(log: Path, status: int) -> str:
    """The end of what a failed process wrote."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    end = " ".join(line.strip() for line in lines[-3:])
    cause = f"killed by signal {-status}" if status < 0 else f"status {status}"
    if status == -signal.SIGKILL:
        # Nobody else sends this one, and the process had no chance to say anything.
        cause += (
            ", as the kernel does when memory runs out; lower --jobs or --workers, and give the "
            "same command to go on"
        )
    return f"{end[-400:]} ({cause}; {log})"


def command_of(program: Path, arguments: Sequence[str]) -> list[str]:
    """Return the command that starts this program again."""
    return [sys.executable, str(program), *arguments]
