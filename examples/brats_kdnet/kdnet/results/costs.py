"""What every network of a cross-validation costs."""

from __future__ import annotations

from dataclasses import replace

from kdnet.data.splits import Split
from kdnet.errors import UserError
from kdnet.results.cost import Cost, cost, cost_table
from kdnet.results.crossval_folder import CrossvalFolder
from kdnet.results.text_table import TextTable
from kdnet.training.checkpoint import load_model


def costs(folder: CrossvalFolder) -> TextTable:
    """Parameters, operations and seconds of every row, on the first fold that trained it."""
    found: list[Cost] = []
    unread: list[str] = []
    for row in folder.rows:
        try:
            one = _cost(folder, row)
        except UserError as error:
            unread.append(f"{row}: {error}")
        else:
            found += [] if one is None else [one]
    table = cost_table(found)
    return replace(table, notes=[*table.notes, *unread])


def _cost(folder: CrossvalFolder, row: str) -> Cost | None:
    runs = [run for run in folder.runs if (run / row / "model.safetensors").is_file()]
    if not runs:
        return None
    run = runs[0]
    network, metadata = load_model(run / row / "model.safetensors", trusted=folder.trusted)
    shape = (1, metadata.in_channels, *metadata.input_size)
    cases = len(Split.read(run / "cases.json").train)
    return cost(row, network, shape, run / row / "history.csv", cases)
