"""What a training shows and leaves to be looked at: history.csv, curves, and a progress bar."""

import csv
import importlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from lightning_fabric.loggers.csv_logs import CSVLogger
from lightning_fabric.loggers.logger import Logger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kdnet.errors import UserError
from kdnet.files import UnreadableError, atomic, read_rows, said, written
from kdnet.training.checkpoint import Task

_WHOLE_NUMBERS = ("epoch", "step")
_LINE_SECONDS = 10.0
# What makes a service keep its runs in files here.
_OFFLINE = {"wandb": "WANDB_MODE=offline", "mlflow": "unset MLFLOW_TRACKING_URI"}
# Read once: MLflow sets the variable itself as soon as a run is opened.
_TRACKING_URI = os.environ.get("MLFLOW_TRACKING_URI")


class Journal:
    """Rows of finished epochs, their curves, and a bar in a terminal or a line now and then.

    Processes other than the first write and show nothing.
    """

    def __init__(self, task: Task, *, epoch: int, steps: int, rank: int = 0) -> None:
        self.task, self.first, self.writes = task, epoch, rank == 0
        self.logger: Logger | None = None
        self.rows: list[dict[str, float]] = []
        if self.writes:
            task.folder.root.mkdir(parents=True, exist_ok=True)
            # What comes after the state that goes on was written by a start that was killed.
            self.rows = [row for row in read_history(task.folder.history) if row["epoch"] <= epoch]
            self.logger = build_logger(task.settings.logger, task.folder.curves, epoch=epoch)
        self._started, self._last_line = time.monotonic(), 0.0
        self._bar = Progress(
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
            *(TextColumn("epochs  loss {task.fields[loss]}"), TimeRemainingColumn()),
            console=task.console,
            disable=not (self.writes and task.console.is_terminal),
        )
        self._share = 1 / steps
        self._task = self._bar.add_task(
            task.metadata.role, total=task.settings.epochs, completed=epoch, loss="-"
        )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Show the bar in the block, and finish the curves after it."""
        try:
            with self._bar:
                self._log_options()
                yield
        except BaseException:
            # What stopped the training matters more than what its curves lose by it.
            with suppress(OSError, ValueError):
                self._finalize("failed")
            raise
        with written(self.task.folder.curves):
            self._finalize("success")

    def _log_options(self) -> None:
        """Show the options of the run where curves are compared; CSV has no place for them."""
        name, options = self.task.settings.logger, dict(self.task.options)
        if self.logger is None or not options:
            return
        if name == "tensorboard":
            # Its hyper-parameters come with a curve of their own, which would say nothing.
            text = "\n".join(f"    {key}: {value}" for key, value in options.items())
            cast("Any", self.logger).experiment.add_text("options", text)
        elif name != "csv":
            self.logger.log_hyperparams(options)

    def _finalize(self, status: str) -> None:
        if self.logger is not None:
            self.logger.finalize(status)
        if self.writes and self.task.settings.logger == "wandb":
            # Lightning leaves the run open, and the next unit's curves would be written into it.
            cast("Any", self.logger).experiment.finish(int(status != "success"))

    def step(self, loss: float) -> None:
        """Note that a step is done."""
        self._bar.update(self._task, advance=self._share, loss=f"{loss:.3f}")

    def epoch(self, row: dict[str, float]) -> None:
        """Note that an epoch is done."""
        epoch = int(row["epoch"])
        if self.logger is not None:
            self.rows.append(row)
            write_history(self.task.folder.history, self.rows)
            with written(self.task.folder.curves):
                # Their steps are epochs.
                self.logger.log_metrics(tagged(row), epoch)
        self._bar.update(self._task, completed=epoch, loss=f"{row['train_loss']:.3f}")
        if self.writes and not self.task.console.is_terminal:
            self._say(epoch, row)

    def _say(self, epoch: int, row: dict[str, float]) -> None:
        epochs, now = self.task.settings.epochs, time.monotonic()
        if epoch < epochs and now - self._last_line < _LINE_SECONDS:
            return
        self._last_line = now
        left = (now - self._started) / (epoch - self.first) * (epochs - epoch)
        line = f"{self.task.metadata.role}: epoch {epoch}/{epochs}  loss {row['train_loss']:.3f}  "
        if "validation_loss" in row:
            line += f"validation loss {row['validation_loss']:.3f}  "
            line += f"Dice {row['validation_dice']:.3f}  "
        self.task.console.print(f"{line}{left:.0f} s left", soft_wrap=True)


def write_history(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write history.csv anew, so that it never ends in half a row."""
    with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


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
        return CSVLogger(folder, name="", flush_logs_every_n_steps=1)
    # Lightning has these two, and is needed for nothing else.
    kind = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger"}[name]
    unit, local = "/".join(folder.parts[-3:-1]), f"sqlite:///{folder / 'mlflow.db'}"
    options: dict[str, dict[str, Any]] = {
        "wandb": {"name": unit, "save_dir": folder},
        "mlflow": {"run_name": unit, "tracking_uri": _TRACKING_URI or local},
    }
    folder.mkdir(parents=True, exist_ok=True)
    try:
        loggers = importlib.import_module("lightning.pytorch.loggers")
        logger: Any = getattr(loggers, kind)(**options[name])
        # Opened now, so that an account or a server that is missing is found before the first step.
        _ = logger.experiment
    except Exception as error:
        raise UserError(
            f"--logger {name} cannot be opened ({said(error)}). It needs packages (pip install "
            f"lightning {name}), and an account or a server unless you say {_OFFLINE[name]}. Or "
            "choose --logger tensorboard or csv."
        ) from error
    return cast("Logger", logger)
