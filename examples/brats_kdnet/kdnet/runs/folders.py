"""Where a run keeps its files, and how many processes read for it."""

import os
from pathlib import Path

from kdnet.config import Config
from kdnet.config import DataConfig


def out_folder(config: Config) -> Path:
    """Return the run folder of a resolved configuration."""
    return config.run.out or Path("runs") / config.run.preset


def cache_folder(config: Config) -> Path:
    """Return where preprocessed subjects and phantoms are kept."""
    return config.data.cache_dir or out_folder(config) / "cache"


def workers(data: DataConfig) -> int:
    """Return how many processes read and preprocess."""
    return data.workers or os.cpu_count() or 1
