"""The table of a training: one row per epoch, as CSV and as TensorBoard scalars."""

import csv
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.utils.tensorboard import SummaryWriter

from kdnet.errors import UserError
from kdnet.reading import UnreadableError, read_rows
from kdnet.writing import WriteError, atomic

_WHOLE_NUMBERS = ("epoch", "step")


class History:
    """Rows of finished epochs; adding one rewrites the file, so that it is never half a row."""

    def __init__(self, path: Path, scalars: Path, *, epoch: int) -> None:
        self.path = path
        self.rows = [row for row in read_history(path) if row["epoch"] <= epoch]
        self.scalars = scalars
        self.epoch = epoch
        self._writer: SummaryWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as failure:
            # What stopped the training matters more than what its curves lost by it.
            if error is None:
                raise _unwritten(self.scalars, failure) from failure

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
        self._log(row)

    def _log(self, row: dict[str, float]) -> None:
        if self._writer is None:
            # Their steps are epochs; what an interrupted training logged after its last finished
            # epoch is hidden.
            self._writer = SummaryWriter(str(self.scalars), purge_step=self.epoch + 1)
        for name, value in row.items():
            part, _, rest = name.partition("_")
            tag = f"{part}/{rest}" if part in {"train", "validation"} else f"training/{name}"
            try:
                self._writer.add_scalar(tag, value, int(row["epoch"]))
            except OSError as error:
                raise _unwritten(self.scalars, error) from error


def _unwritten(scalars: Path, error: OSError) -> WriteError:
    return WriteError(
        f"{scalars}: the curves for TensorBoard cannot be written ({error.strerror or error}). "
        "Make room or restore the folder, then give the same command to go on."
    )


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
