"""The data set that a configuration names, and its subjects."""

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from kdnet.config import Config
from kdnet.config import DataConfig
from kdnet.data.description import Description, load_description
from kdnet.data.subjects import Subject, find_subjects
from kdnet.data.splits import Split
from kdnet.data.volumes import read_geometry
from kdnet.runs.folders import cache_folder
from kdnet.runs.views import check_view
from phantoms import generate_phantoms
from kdnet.runs.run_folder import RunFolder


def own_description(data: DataConfig) -> Description | None:
    """Return the description that the user names, None if the layout is to be recognised."""
    return None if data.description is None else load_description(Path(data.description))


def find_description(config: Config) -> Description:
    """Describe the data set without reading or writing any image."""
    data = config.data
    if data.data_root is None:
        description = load_description(Path("phantom"))
    else:
        description, _ = find_subjects(data.data_root, own_description(data))
    for role in ("teacher", "student"):
        check_view(role, data, description)
    return description


def read_subjects(
    config: Config, run: RunFolder, console: Console
) -> tuple[Description, list[Subject]]:
    """Find the subjects, or generate phantoms."""
    data = config.data
    if data.data_root is None:
        if not run.config.is_file():
            run.begin(config)
        size, seed = data.phantom_size, config.training.seed
        root = cache_folder(config) / f"phantoms-{data.phantoms}-{size}-seed{seed}"
        generate_phantoms(
            root, subjects=data.phantoms, seed=seed, size=size, progress=console.is_terminal
        )
        description, subjects = find_subjects(root)
    else:
        description, subjects = find_subjects(data.data_root, own_description(data))
    return description, subjects


def orientation_of(subjects: Iterable[Subject], split: Split) -> str:
    """Return the axis codes of the first training subject, such as "LPS"."""
    first = next(subject for subject in subjects if subject.name == split.train[0])
    return read_geometry(next(iter(first.images.values()))).orientation


def used(subjects: Iterable[Subject], split: Split) -> list[Subject]:
    """Return the subjects that any part of a split names."""
    names = {*split.train, *split.validation, *split.test, *split.unlabelled}
    return [subject for subject in subjects if subject.name in names]
