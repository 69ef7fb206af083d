"""Whether the files of a data set are still those that a run began with."""

from collections.abc import Iterable, Mapping
from typing import Any

from kdnet.data.layouts import Subject

#: Size in bytes and time of change in ns of every file, by subject and path.
States = dict[str, dict[str, list[int]]]


def file_states(subjects: Iterable[Subject]) -> States:
    """Return the present state of the subjects' files."""
    states: States = {}
    for subject in subjects:
        files = [*subject.images.values(), subject.segmentation]
        own = states.setdefault(subject.name, {})
        for path in (file.path for file in files if file is not None):
            try:
                status = path.stat()
            except OSError:
                own[str(path)] = [-1, -1]
            else:
                own[str(path)] = [status.st_size, status.st_mtime_ns]
    return states


def changed_files(before: Mapping[str, Any], now: States) -> list[str]:
    """Return the paths of files that are others than before, or new, or gone."""
    found = []
    for subject, files in now.items():
        known = before.get(subject, files)
        known = known if isinstance(known, dict) else {}
        paths = {**files, **known}
        found += [str(path) for path in paths if files.get(path) != known.get(path)]
    return found
