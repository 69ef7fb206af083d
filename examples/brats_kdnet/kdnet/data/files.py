"""Whether the files of a data set are still those that a run began with."""

from collections.abc import Iterable, Mapping
from typing import Any

from kdnet.data.layouts import Subject

#: Size in bytes and time of change in ns of every file, by subject and path.
States = dict[str, dict[str, list[int]]]


def file_states(subjects: Iterable[Subject]) -> States:
    """Return the present state of the subjects' files.

    Args:
        subjects: Those whose files are looked at. What is not there or closed has the state
            [-1, -1]; the checks of the data set report it with all other problems.
    """
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
    """Return the paths of files that are others than before, or new, or gone.

    Args:
        before: What `file_states` gave when the run began, as it was read from a file.
        now: What it gives now; subjects that were not known then are left alone.
    """
    found = []
    for subject, files in now.items():
        known = before.get(subject, files)
        known = known if isinstance(known, dict) else {}
        paths = {**files, **known}
        found += [str(path) for path in paths if files.get(path) != known.get(path)]
    return found
