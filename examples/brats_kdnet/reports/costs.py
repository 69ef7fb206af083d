"""What every network of a cross-validation costs."""

from __future__ import annotations

from data.splits import Split
from evaluation.cost import Cost, cost, cost_table
from evaluation.text_table import TextTable
from reports.crossval_folder import CrossvalFolder
from training.checkpoint import load_model


def costs(folder: CrossvalFolder) -> TextTable:
    """Parameters, operations and seconds of every row, on the first fold that trained it.

    Args:
        folder: Knows rows and run folders.

    Returns:
        One line per row that is trained; seconds are those of the machine that trained it, with
        whatever else ran on it.
    """
    found = [_cost(folder, row) for row in folder.rows]
    return cost_table([cost for cost in found if cost is not None])


def _cost(folder: CrossvalFolder, row: str) -> Cost | None:
    runs = [run for run in folder.runs if (run / row / "model.safetensors").is_file()]
    if not runs:
        return None
    run = runs[0]
    network, metadata = load_model(run / row / "model.safetensors")
    shape = (1, metadata.in_channels, *metadata.input_size)
    cases = len(Split.read(run / "cases.json").train)
    return cost(row, network, shape, run / row / "history.csv", cases)
