"""What a network costs: parameters, operations of one forward pass, seconds."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdnet.errors import UserError
from kdnet.results.stored import Results
from kdnet.results.tables import Table, number
from kdnet.runs.folder import UnitFolder
from kdnet.training.checkpoint import load_model
from kdnet.training.history import read_history


def cost_table(results: Results, trusted: Collection[str] = ()) -> Table:
    """Costs of every row on the first unit that trained it."""
    lines, unread = [], []
    for row in results.rows:
        units = [unit for unit in results.units(row) if (unit / "model.safetensors").is_file()]
        try:
            lines += [{"network": results.label(row)} | _cost(unit, trusted) for unit in units[:1]]
        except UserError as error:
            unread.append(f"{row}: {error}")
    note = (
        "Operations of convolutions and matrix products in one forward pass of one sample: of a "
        "case, or of a patch or slice of one. Times: training steps, without validation."
    )
    return Table.of("Of the first fold and seed", lines, note, *unread)


def parameters(network: nn.Module) -> int:
    """Count the trainable numbers of a network."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def flops(network: nn.Module, shape: Sequence[int]) -> int:
    """Count the floating-point operations of one forward pass, as PyTorch's counter does."""
    shadow = copy.deepcopy(network).eval()
    try:
        # Shapes alone decide, so that a volume of any size costs neither time nor memory.
        return _counted(shadow.to("meta"), torch.empty(*shape, device="meta"))
    except (NotImplementedError, RuntimeError):
        # Some networks look at the values.
        return _counted(copy.deepcopy(network).eval().cpu(), torch.zeros(*shape))


def _counted(network: nn.Module, image: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return int(counter.get_total_flops())


def _cost(unit: Path, trusted: Collection[str]) -> dict[str, str]:
    network, metadata = load_model(unit / "model.safetensors", trusted=trusted)
    epochs = read_history(unit / "history.csv")
    seconds = sum(epoch.get("seconds", math.nan) for epoch in epochs) if epochs else math.nan
    peaks = UnitFolder(unit).read_record().get("peak_mib", {})
    shape = (1, metadata.in_channels, *metadata.input_size)
    return {
        "parameters (10⁶)": number(parameters(network) / 1e6, 2),
        "GFLOP per pass": number(flops(network, shape) / 1e9, 1),
        "epochs": str(len(epochs)),
        "training (min)": number(seconds / 60, 1),
        "seconds per epoch": number(seconds / max(len(epochs), 1), 1),
        "peak memory (MiB)": number(max(peaks.values(), default=math.nan), 0),
    }
