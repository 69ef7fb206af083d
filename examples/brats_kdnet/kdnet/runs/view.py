"""How far every unit is, read from the run folders, so that it shows other processes' units too."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from kdnet.runs.plan import Plan, Unit
from kdnet.errors import UserError
from kdnet.evaluation.scoring import read_scores
from kdnet.training.history import read_history

_LINE_SECONDS = 30.0


class View:
    """A table of rows and folds: waiting, epochs done, or the Dice reached."""

    def __init__(self, plan: Plan, units: Sequence[Unit]) -> None:
        self.plan = plan
        self.units = units
        self._dice: dict[str, float] = {}
        self._live: Live | None = None
        self._console = Console(quiet=True)
        self._jobs = 1
        self._said: set[str] = set()
        self._last_line = 0.0

    @contextmanager
    def live(self, console: Console, jobs: int) -> Iterator["View"]:
        """Show the table while the block runs; lines where the output is no terminal."""
        self._console, self._jobs = console, jobs
        if not console.is_terminal:
            yield self
            return
        with Live(console=console, auto_refresh=False, transient=True) as self._live:
            yield self

    def update(self, *, running: AbstractSet[str], failed: Mapping[str, str]) -> None:
        """Show the present state."""
        if self._live is not None:
            self._live.update(self.table(running, failed), refresh=True)
            return
        news = [name for name in failed if name not in self._said]
        finished = [u.name for u in self.units if self.plan.is_done(u) and u.name not in self._said]
        self._said |= {*news, *finished}
        for name in news:
            self._console.print(f"{name} failed: {failed[name]}", highlight=False, soft_wrap=True)
        due = time.monotonic() - self._last_line > _LINE_SECONDS
        if finished or (due and running):
            self._last_line = time.monotonic()
            self._console.print(self._line(running), highlight=False, soft_wrap=True)

    def _line(self, running: AbstractSet[str]) -> str:
        done = sum(map(self.plan.is_done, self.units))
        now = ", ".join(
            f"{unit.name} {self.state(unit)}" for unit in self.units if unit.name in running
        )
        left = self.seconds_left(self._jobs)
        return f"{done} of {len(self.units)} units done{left}" + f": {now}" * bool(now)

    def table(
        self, running: AbstractSet[str] = frozenset(), failed: Mapping[str, str] | None = None
    ) -> Table:
        """Return the table."""
        done = sum(map(self.plan.is_done, self.units))
        title = f"{done} of {len(self.units)} units done{self.seconds_left(self._jobs)}"
        table = Table(title=title, title_justify="left")
        places = list(dict.fromkeys(unit.place for unit in self.units))
        table.add_column("row")
        for place in places:
            table.add_column(place, justify="right")
        units = {(unit.row.name, unit.place): unit for unit in self.units}
        for row in dict.fromkeys(unit.row.name for unit in self.units):
            cells = [
                self._cell(units[row, place], running, failed or {})
                if (row, place) in units
                else ""
                for place in places
            ]
            table.add_row(row, *cells)
        table.caption = "epochs done, or mean Dice on the held-out cases in native space"
        return table

    def _cell(self, unit: Unit, running: AbstractSet[str], failed: Mapping[str, str]) -> str:
        if unit.name in failed:
            return "failed"
        return self.state(unit) + " *" * (unit.name in running)

    def state(self, unit: Unit) -> str:
        """Say how far a unit is."""
        run = self.plan.folder(unit)
        if self.plan.is_done(unit):
            return f"Dice {self._mean_dice(unit):.3f}"
        history = run.role(unit.row.name) / "history.csv"
        if not history.is_file():
            return "\N{MIDDLE DOT}"
        try:
            epochs = len(read_history(history))
        except UserError:
            # The unit itself says what is wrong, and the others go on.
            return "damaged"
        wanted = unit.row.options.get("epochs", self.plan.config.training.epochs)
        return f"{epochs}/{wanted}"

    def _mean_dice(self, unit: Unit) -> float:
        if unit.name not in self._dice:
            scores = read_scores(self.plan.folder(unit).part_scores)
            native = [score.dice for score in scores if score.space == "native"]
            self._dice[unit.name] = statistics.fmean(native) if native else float("nan")
        return self._dice[unit.name]

    def seconds_left(self, jobs: int) -> str:
        """Estimate the time left from the units that are done; empty before the first one."""
        spent = [
            self.plan.folder(unit).read_summary().get("total_seconds", 0.0)
            for unit in self.units
            if self.plan.is_done(unit)
        ]
        missing = len(self.units) - len(spent)
        if not spent or not missing:
            return ""
        minutes = statistics.fmean(spent) * missing / jobs / 60
        return f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"
