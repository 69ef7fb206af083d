"""Devices and processes."""

import logging
import os
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

from kdnet.configuration.config import Config
from kdnet.errors import UserError
from kdnet.training.runtime import shard


def launch(config: Config, precision: str) -> Fabric:
    """Start Fabric, and its processes if there are several."""
    training = config.training
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)
    # It would announce the precision once more.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    unfit = training.compile is True or training.precision == "16-mixed"
    if training.strategy == "fsdp" and unfit:
        raise UserError(
            "--strategy fsdp spreads weights over processes, for which neither --compile true nor "
            "--precision 16-mixed is built here. Use --compile false, and bf16-mixed or 32-true; "
            "or --strategy ddp."
        )
    # The others wait while the first process reads and preprocesses: hours for 100,000 subjects.
    patience = timedelta(days=1)
    strategies: dict[str, Any] = {
        "ddp": DDPStrategy(timeout=patience),
        "fsdp": ModelParallelStrategy(shard, timeout=patience),
    }
    try:
        fabric = Fabric(
            accelerator=training.accelerator,
            devices=training.devices,
            num_nodes=training.num_nodes,
            strategy=strategies.get(training.strategy, training.strategy),
            precision=precision,  # type: ignore[arg-type]
        )
        fabric.launch()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"Lightning Fabric cannot start: {error}") from error
    return fabric
