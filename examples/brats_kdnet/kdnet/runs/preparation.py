"""Subjects as networks read them."""

from dataclasses import replace
from typing import Any

from rich.console import Console

from kdnet.config import Config
from kdnet.data.description import Description
from kdnet.data.subjects import Subject
from kdnet.data.loading import prepare
from kdnet.data.splits import Split
from kdnet.runs.folders import cache_folder, workers
from kdnet.runs.networks import describe_network
from kdnet.runs.views import stacked


def prepare_parts(
    config: Config,
    description: Description,
    subjects: list[Subject],
    split: Split,
    console: Console,
) -> dict[str, Any]:
    """Preprocess the subjects that train or validate into the cache."""
    data = config.data
    preprocessing = replace(
        describe_network("teacher", config, description), modalities=stacked(data, description)
    ).preprocessing()
    parts = {name: getattr(split, name) for name in ("train", "validation", "unlabelled")}
    return {
        part: prepare(
            [subject for subject in subjects if subject.name in names],
            preprocessing,
            cache_folder(config),
            workers(data),
            progress=console.is_terminal,
        )
        for part, names in parts.items()
    }
