"""What every network of a cross-validation costs."""

from __future__ import annotations

from dataclasses import replace

from kdnet.errors import UserError
from kdnet.results.cost import Cost, cost, cost_table
from kdnet.results.crossval_folder import CrossvalFolder
from kdnet.results.page import read_mapping
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
    units = [unit for unit in folder.units(row) if (unit / "model.safetensors").is_file()]
    if not units:
        return None
    unit = units[0]
    network, metadata = load_model(unit / "model.safetensors", trusted=folder.trusted)
    shape = (1, metadata.in_channels, *metadata.input_size)
    folds = read_mapping(folder.root / "folds.json")["folds"]
    cases = next(len(f["train"]) for f in folds if unit.name.startswith(f"fold{f['number']}-"))
    return cost(row, network, shape, unit / "history.csv", cases)
