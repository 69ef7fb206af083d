"""What a training shows and leaves to be looked at: history.csv, curves, and a progress bar."""

import csv
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lightning_fabric.loggers.csv_logs import CSVLogger
from lightning_fabric.loggers.logger import Logger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kdnet.errors import UserError
from kdnet.files import UnreadableError, WriteError, atomic, read_rows

_WHOLE_NUMBERS = ("epoch", "step")
_LINE_SECONDS = 10.0


class History:
    """Rows of finished epochs; adding one rewrites the file, so that it is never half a row."""

    def __init__(self, path: Path, logger: Logger | None = None, *, epoch: int) -> None:
        self.path = path
        self.rows = [row for row in read_history(path) if row["epoch"] <= epoch]
        self.logger = logger

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self.logger is not None:
                self.logger.finalize("success" if error is None else "failed")
        except (OSError, ValueError) as failure:
            # What stopped the training matters more than what its curves lost by it.
            if error is None:
                raise _unwritten(failure) from failure

    def add(self, row: dict[str, float]) -> None:
        """Append an epoch."""
        self.rows.append(row)
        with (
            atomic(self.path) as partial,
            partial.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        if self.logger is not None:
            try:
                # Their steps are epochs.
                self.logger.log_metrics(tagged(row), int(row["epoch"]))
            except (OSError, ValueError) as failure:
                raise _unwritten(failure) from failure


def read_history(path: Path) -> list[dict[str, float]]:
    """Read history.csv."""
    if not path.is_file():
        return []
    try:
        return [
            {
                name: int(value) if name in _WHOLE_NUMBERS else float(value)
                for name, value in row.items()
            }
            for row in read_rows(path, ("epoch",))
        ]
    except (UnreadableError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}). Restore it from a copy, or remove it; the curves of "
            "the epochs so far are lost with it, and nothing else."
        ) from error


def tagged(row: dict[str, float]) -> dict[str, float]:
    """Return a row under the names that curves have: train/loss, validation/dice, training/..."""
    parts = {name: name.partition("_") for name in row}
    return {
        f"{part}/{rest}" if part in {"train", "validation"} else f"training/{name}": row[name]
        for name, (part, _, rest) in parts.items()
    }


def build_logger(name: str, folder: Path, *, epoch: int) -> Logger:
    """Open the curves of a training that has finished some epochs."""
    if name == "tensorboard":
        # What an interrupted training logged after its last finished epoch is hidden.
        return TensorBoardLogger(folder, name="", version="", purge_step=epoch + 1)
    if name == "csv":
        # Every start writes a version of its own; history.csv holds all of them.
        return CSVLogger(folder, name="csv", flush_logs_every_n_steps=1)
    try:
        loggers: Any = importlib.import_module("lightning.pytorch.loggers")
        title = folder.name
        if name == "wandb":
            logger: Logger = loggers.WandbLogger(name=title, save_dir=folder)
        else:
            logger = loggers.MLFlowLogger(run_name=title, save_dir=str(folder))
    except ImportError as error:
        raise UserError(
            f"--logger {name} needs packages that are not installed ({error}). Install them (pip "
            f"install lightning {name}), or choose --logger tensorboard or csv."
        ) from error
    return logger


def _unwritten(error: Exception) -> WriteError:
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return WriteError(
        f"The curves cannot be written ({cause}). Make room or restore the folder, then give the "
        "same command to go on."
    )


class TrainingProgress:
    """Show epoch, loss and time left: a bar in a terminal, a line now and then anywhere else."""

    def __init__(self, console: Console, title: str, *, epochs: int, steps: int, done: int) -> None:
        self.console = console
        self.title = title
        self.epochs = epochs
        self.first = done
        self._started = time.monotonic()
        self._last_line = 0.0
        self._bar = _bar(
            console, MofNCompleteColumn(), TextColumn("epochs  loss {task.fields[loss]}")
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

    def step(self, loss: float) -> None:
        """Note that a step is done."""
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
    columns = MofNCompleteColumn(), TextColumn("{task.fields[case]}")
    with _bar(console, *columns, transient=True) as bar:
        task = bar.add_task(title, total=total, case="")
        yield lambda case: bar.update(task, advance=1, case=case)


def _bar(console: Console, *columns: Any, transient: bool = False) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=transient,
    )
