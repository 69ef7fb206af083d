"""What a network costs: parameters, operations of one forward pass, seconds."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdnet.errors import UserError
from kdnet.files import UnreadableError, read_json
from kdnet.results.tables import format_number
from kdnet.results.text_table import TextTable
from kdnet.training.history import read_history


@dataclass(frozen=True)
class Cost:
    """What one row of a table costs.

    Attributes:
        row: Name of the row.
        parameters: Trainable numbers.
        gflops: Floating-point operations of one forward pass of one sample, 10⁹: of a case, or of a
            patch or slice of one.
        epochs: Epochs it was trained for; 0 without a history.
        training_seconds: Steps of all of them together, without validation; NaN without a history.
        training_seconds_per_case: Of one epoch and one training case; NaN without a history.
    """

    row: str
    parameters: int
    gflops: float
    epochs: int
    training_seconds: float
    training_seconds_per_case: float


def cost(
    row: str, network: nn.Module, shape: Sequence[int], history: Path, training_cases: int
) -> Cost:
    """Measure one network and read what its training took."""
    if training_cases < 1:
        raise ValueError(
            f"The cost of '{row}' needs 1 training case or more, got {training_cases}."
        )
    seconds = [epoch["seconds"] for epoch in read_history(history)]
    total = math.fsum(seconds) if seconds else math.nan
    return Cost(
        row=row,
        parameters=parameters(network),
        gflops=flops(network, shape) / 1e9,
        epochs=len(seconds),
        training_seconds=total,
        training_seconds_per_case=total / (max(len(seconds), 1) * training_cases),
    )


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


def scoring_seconds(summary: Path, networks: int, cases: int) -> float:
    """Seconds per case and network of a run's evaluation: reading, prediction and scores."""
    if networks < 1 or cases < 1:
        raise ValueError(f"Expected 1 or more of each, got {networks} networks, {cases} cases.")
    if not summary.is_file():
        return math.nan
    try:
        content: dict[str, Any] = read_json(summary)
        return float(content["seconds"].get("evaluation", math.nan)) / (networks * cases)
    except (UnreadableError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{summary}: expected a summary with seconds; {error!r}.") from error


def cost_table(costs: Sequence[Cost]) -> TextTable:
    """The costs as a table."""
    return TextTable(
        title="Cost",
        columns=[
            "network",
            "parameters (10⁶)",
            "GFLOP per pass",
            "epochs",
            "training (h)",
            "seconds per case and epoch",
        ],
        rows=[
            [
                cost.row,
                format_number(cost.parameters / 1e6, 2),
                format_number(cost.gflops, 1),
                str(cost.epochs),
                format_number(cost.training_seconds / 3600, 2),
                format_number(cost.training_seconds_per_case, 3),
            ]
            for cost in costs
        ],
        notes=["Operations of convolutions and matrix products in one forward pass."],
    )
