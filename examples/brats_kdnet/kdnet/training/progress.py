"""Progress of a training: a bar in a terminal, a line now and then anywhere else."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0


class TrainingProgress:
    """Show epoch, loss and time left."""

    def __init__(self, console: Console, title: str, *, epochs: int, steps: int, done: int) -> None:
        self.console = console
        self.title = title
        self.epochs = epochs
        self.first = done
        self._started = time.monotonic()
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs  loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._share = 1 / steps
        self._task = self._bar.add_task(title, total=epochs, completed=done, loss="-")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self, loss: float | None) -> None:
        """Note that a step is done."""
        if loss is None:
            self._bar.advance(self._task, self._share)
        else:
            self._bar.update(self._task, advance=self._share, loss=f"{loss:.3f}")

    def epoch(self, epoch: int, row: dict[str, float]) -> None:
        """Note that an epoch is done."""
        self._bar.update(self._task, completed=epoch, loss=f"{row['train_loss']:.3f}")
        now = time.monotonic()
        if self.console.is_terminal or (
            epoch < self.epochs and now - self._last_line < _LINE_SECONDS
        ):
            return
        self._last_line = now
        left = (now - self._started) / (epoch - self.first) * (self.epochs - epoch)
        validated = (
            f"validation loss {row['validation_loss']:.3f}  Dice {row['validation_dice']:.3f}  "
            if "validation_loss" in row
            else ""
        )
        self.console.print(
            f"{self.title}: epoch {epoch}/{self.epochs}  loss {row['train_loss']:.3f}  "
            f"{validated}{left:.0f} s left",
            highlight=False,
            soft_wrap=True,
        )


@contextmanager
def counting(console: Console, title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show how many cases are done; quiet where the output is no terminal."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[case]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=total, case="")
        yield lambda case: bar.update(task, advance=1, case=case)
