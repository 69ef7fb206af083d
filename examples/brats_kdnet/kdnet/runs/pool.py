"""Train all units of a plan: one after the other here, or several at a time in processes."""

import os
import signal
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kdnet.environment import processors
from kdnet.errors import UserError, explained
from kdnet.evaluation.scoring import read_scores
from kdnet.runs.plan import Plan, Unit
from kdnet.runs.preparation import prepare, rehearse_rows
from kdnet.runs.unit import run_unit
from kdnet.stopping import PARENT, StoppedError, deferring
from kdnet.training.history import read_history
from kdnet.training.runtime import device_type
from privdistill import PrivDistillError

_PATIENCE = 0.5  # seconds between two looks at the processes
_LINE_SECONDS = 30.0
_LARGEST_ON_CPU = 4


def number_of_jobs(wanted: int | str, accelerator: str) -> int:
    """Say how many units to train at a time."""
    if isinstance(wanted, int):
        return wanted
    if device_type(accelerator) == "cuda":
        return torch.cuda.device_count()
    return min(_LARGEST_ON_CPU, processors())


def carry_out(
    plan: Plan, units: Sequence[Unit], options: Any, command: Sequence[str], console: Console
) -> tuple[Plan, dict[str, str] | None]:
    """Show or train units, as the options say; return why some failed, None if not all were due."""
    # A task of an array prepares what it needs and no more.
    chosen = units if options.unit is None else plan.with_teachers([plan.find(options.unit)])
    if options.show is None or not plan.files.plan.is_file():
        plan = prepare(rehearse_rows(plan, chosen, console), chosen, console)
    # What has been prepared is only looked at.
    plan.files.check_config(plan.config)
    if options.show == "status":
        console.print(status_table(plan, units))
    elif options.show == "units":
        for number, unit in enumerate(units):
            done = "  done" * plan.is_done(unit)
            console.print(f"{number:4d}  {unit.name}{done}")
    elif options.unit is not None:
        run_unit(plan, chosen[-1], console)
    else:
        failed = train_units(plan, units, options.jobs, command, console)
        for name, reason in failed.items():
            console.print(f"{name} failed: {reason}", soft_wrap=True)
        return plan, failed
    return plan, None


def train_units(
    plan: Plan, units: Sequence[Unit], jobs: int | str, command: Sequence[str], console: Console
) -> dict[str, str]:
    """Train every unit that is not done; return why some have failed, by name."""
    missing = sum(not plan.is_done(unit) for unit in units)
    number = min(number_of_jobs(jobs, plan.config.training.accelerator), missing)
    at_a_time = f"; {number} at a time" * bool(missing)
    console.print(f"{len(units)} units, {len(units) - missing} done{at_a_time}")
    if number <= 1:
        return train_here(plan, units, console)
    return Pool(plan, units, number, command).run(console)


def train_here(plan: Plan, units: Sequence[Unit], console: Console) -> dict[str, str]:
    """Train units one after the other, the progress of each training shown."""
    failed: dict[str, str] = {}
    for number, unit in enumerate(units, start=1):
        if plan.is_done(unit):
            continue
        try:
            if reason := blocked(plan, unit, failed):
                raise UserError(reason)
            left = seconds_left(plan, units, jobs=1)
            console.print(f"Unit {number} of {len(units)}: {unit.name}{left}")
            with explained(unit.name):
                run_unit(plan, unit, console)
        except (UserError, PrivDistillError) as error:
            failed[unit.name] = str(error)
            console.print(f"{unit.name} failed: {error}")
    return failed


def blocked(plan: Plan, unit: Unit, failed: Mapping[str, str]) -> str | None:
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
    _ended: int = 0
    _last_line: float = 0.0

    def run(self, console: Console) -> dict[str, str]:
        """Train all units, show how far they are, and wait for the last one."""
        # No signal between the start of a process and its note, which would leave it behind.
        with deferring() as asked:
            try:
                while asked.received is None:
                    self._collect()
                    waiting = self._start_ready()
                    self._say(console)
                    if not self.running and not waiting:
                        return self.failed
                    time.sleep(_PATIENCE)
            finally:
                self._end()
        raise StoppedError(
            asked.received or signal.SIGTERM,
            f"Stopped; {self.plan.root} keeps what is done. Give the same command to go on.",
        )

    def _collect(self) -> None:
        for name, (process, _) in list(self.running.items()):
            status = process.poll()
            if status is not None:
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
            # Another start may train the teacher; its files tell.
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
        # What earlier starts said stays.
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

    def _say(self, console: Console) -> None:
        """Say that a unit has ended, and now and then what is going on."""
        ended = len(self.failed) + sum(map(self.plan.is_done, self.units))
        if ended == self._ended and time.monotonic() - self._last_line < _LINE_SECONDS:
            return
        self._ended, self._last_line = ended, time.monotonic()
        going = [f"{u.name} {state(self.plan, u)}" for u in self.units if u.name in self.running]
        line = summary(self.plan, self.units, self.jobs)
        now = ", ".join(going) or "none under way"
        console.print(f"{line}: {now}", soft_wrap=True)

    def _end(self) -> None:
        """Ask all processes to leave, and wait until they have kept what they have."""
        for process, _ in self.running.values():
            process.terminate()
        for process, _ in self.running.values():
            process.wait()

    def _share(self, slot: int) -> dict[str, str]:
        """Environment that gives a process its part of the machine."""
        if torch.cuda.is_available():
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            gpus = seen if seen != [""] else [str(i) for i in range(torch.cuda.device_count())]
            return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
        # More threads than processors would wait for each other.
        threads = str(max(1, processors() // self.jobs))
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        return {name: os.environ.get(name, threads) for name in names}

    def _log(self, name: str) -> Path:
        return self.plan.files.unit(name).root / "log.txt"


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


def status_table(plan: Plan, units: Sequence[Unit]) -> Table:
    """Show every unit of every row: waiting, epochs done, or the Dice reached."""
    places = list(dict.fromkeys(unit.place for unit in units))
    table = Table("row", *places, title=summary(plan, units, jobs=1), title_justify="left")
    states = {(unit.row.name, unit.place): state(plan, unit) for unit in units}
    for row in dict.fromkeys(unit.row.name for unit in units):
        table.add_row(row, *(states.get((row, place), "") for place in places))
    table.caption = "epochs done, or mean Dice on the held-out cases in native space"
    return table


def summary(plan: Plan, units: Sequence[Unit], jobs: int) -> str:
    """Say how many units are done, and how long the others may take."""
    done = sum(map(plan.is_done, units))
    return f"{done} of {len(units)} units done{seconds_left(plan, units, jobs)}"


def state(plan: Plan, unit: Unit) -> str:
    """Say how far a unit is."""
    folder = plan.folder(unit)
    if plan.is_done(unit):
        scores = read_scores(folder.scores)
        return f"Dice {scores['dice'][scores['space'] == 'native'].mean():.3f}"
    try:
        epochs = len(read_history(folder.history))
    except UserError:
        # The unit itself says what is wrong, and the others go on.
        return "damaged"
    return f"{epochs}/{plan.configure(unit).training.epochs}" if epochs else "\N{MIDDLE DOT}"


def seconds_left(plan: Plan, units: Sequence[Unit], jobs: int) -> str:
    """Estimate the time left from the units that are done; empty before the first one."""
    done = [unit for unit in units if plan.is_done(unit)]
    spent = [sum(plan.folder(unit).read_record().get("seconds", {}).values()) for unit in done]
    missing = len(units) - len(spent)
    if not spent or not missing:
        return ""
    minutes = statistics.fmean(spent) * missing / jobs / 60
    return f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"
