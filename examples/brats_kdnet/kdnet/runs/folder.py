"""The folder of a run: where everything lies, what it began with, and who works in it."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout
from rich.console import Console

from kdnet.config import Config, parsed
from kdnet.data.description import Description
from kdnet.data.subjects import States, changed_files
from kdnet.environment import environment
from kdnet.errors import UserError
from kdnet.files import (
    WriteError,
    read_mapping,
    write_json,
    write_text,
)
from kdnet.rows import Row
from kdnet.training.checkpoint import TrainingFolder, network_digest

#: Options that may change between a run and its continuation: they choose where it runs and where
#: its files go, and no experiment.
FREE_OPTIONS = {
    *("out", "preset", "cache_dir", "workers", "predictions", "trust_backbone", "teacher_cache"),
    *("teacher_cache_gib", "logger", "accelerator", "devices", "num_nodes", "strategy"),
}


#: Differences that are told.
_MOST = 20
#: Options that name a file or folder, however it is written.
_PATHS = {"data_root", "unlabelled_root", "split_file", "teacher_model"}


@dataclass(frozen=True)
class Facts:
    """What plan.json says of all starts of a run, for whoever reads the results.

    Attributes:
        kind: Which program it was.
        title: Of its page.
        rows: In the order of the tables.
        folds: Their numbers.
        seeds: Of weights and order.
        dataset: Name of the data set.
        phantom: Whether its subjects are synthetic.
        protocol: In one line what decides the numbers of all rows.
        grades: How many subjects have each grade.
        folds_sha256: Digest of the case lists.
        case_lists: Name of the public protocol that they are of.
        labels: How tables call the kinds of a study.
        chosen: Rows that a study is about.
        commands: What trained the rows of a study.
    """

    kind: Literal["train", "crossval", "study"]
    title: str
    rows: tuple[Row, ...]
    folds: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    dataset: str = "unknown data set"
    phantom: bool = False
    protocol: str = ""
    grades: dict[str, int] = field(default_factory=dict)
    folds_sha256: str = ""
    case_lists: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    chosen: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


class UnitFolder(TrainingFolder):
    """Files of one unit: those of its training, and more.

    Attributes:
        scores: Scores of every held-out case; the last file to be written.
        subsets: The same for every subset of the modalities, if the network takes any.
        record: What was trained, and what it took.
        predictions: Label maps of the held-out cases.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.scores = root / "scores.csv"
        self.subsets = root / "subsets.csv"
        self.record = root / "unit.json"
        self.predictions = root / "predictions"

    def read_record(self) -> dict[str, Any]:
        """Return what an earlier start has recorded; empty if there was none."""
        content = read_mapping(self.record) if self.record.exists() else {}
        for name in ("experiment", "teachers", "seconds", "peak_mib"):
            values = content.get(name, {})
            numbers = name not in {"experiment", "teachers"}
            if not isinstance(values, dict) or (
                numbers and not all(map(_is_amount, values.values()))
            ):
                raise UserError(
                    f"{self.record} is damaged: '{name}' must hold values by name. Restore it, or "
                    f"remove {self.root} to train this unit again."
                )
        return content

    def write_record(self, content: Mapping[str, Any]) -> None:
        """Write unit.json."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.record, content)

    def check_experiment(self, now: Mapping[str, Any]) -> None:
        """Refuse to take what another experiment left for a result of this one."""
        # A unit that never began, or whose record was removed on purpose, is what is asked for.
        before = self.read_record().get("experiment", now)
        differing = _differences(_flat(before), _flat(now))
        if differing:
            raise UserError(
                f"{self.root} holds another experiment than this command asks for:\n{differing}\n"
                "Choose another --out to keep both, or remove that folder (and those of the "
                "students that it taught) to train it again. If it makes no difference to this "
                f"unit, remove {self.record.name} there to go on without this check."
            )

    def check_teachers(self, models: Mapping[str, Path]) -> None:
        """Refuse a result that another teacher has taught than the one that is there now."""
        known = self.read_record().get("teachers", {})
        for name, path in models.items():
            # One that is not there any more is trained again, and comes to the same weights.
            if name in known and path.is_file() and network_digest(path) != known[name]:
                raise UserError(
                    f"{self.root} was taught by another network than {path}, which has been "
                    "trained again since. Remove that folder to train it with this teacher, or "
                    "choose another --out."
                )


class Folder:
    """Files of a run.

    Attributes:
        root: The folder given by --out.
        config: The resolved configuration that all rows share; says that the run has begun.
        folds: Case lists of all folds; written last, since it says that all else is prepared.
        plan: Rows, folds and seeds of all starts, for whoever reads the results.
        description: The data set as it was described when the run began.
        states: Size and time of change of every file that the run began with.
        skipped: Subjects that were left out because of their files, and why.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.folds = root / "folds.json"
        self.plan = root / "plan.json"
        self.description = root / "description.json"
        self.states = root / "files.json"
        self.skipped = root / "skipped.json"

    def unit(self, name: str) -> UnitFolder:
        """Return the folder of a unit."""
        return UnitFolder(self.root / "units" / name)

    def check_config(self, config: Config) -> None:
        """Refuse a folder of something else, or a run with another configuration."""
        if not self.config.is_file():
            # Hidden files are locks of a run that is about to begin.
            if self.root.exists() and (not self.root.is_dir() or any(self.root.glob("[!.]*"))):
                raise UserError(
                    f"--out: {self.root} exists and is not a run folder (it has no config.yaml). "
                    "Choose a new or an empty folder."
                )
            return
        differing = _differences(
            plain_options(read_mapping(self.config)), plain_options(config.to_dict())
        )
        if differing:
            raise UserError(
                f"--out: {self.root} holds a run with another configuration:\n{differing}\n"
                "Choose another --out, or give the same configuration to continue that run."
            )

    def begin(self, config: Config, description: Description) -> None:
        """Create the folder, and record what the run is made with."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # First, since it makes the folder one of ours: a start that dies now goes on.
            write_text(self.config, yaml.safe_dump(config.to_dict(), sort_keys=False))
        except (OSError, WriteError) as error:
            raise UserError(f"--out: {self.root} cannot be written: {error}") from error
        write_json(self.root / "environment.json", environment() | {"seed": config.training.seed})
        write_json(self.description, description.to_dict())

    def check_unchanged(self, description: Description, folds: Any, states: States) -> None:
        """Refuse to go on with other subjects, labels or files than the run began with."""
        other = "Restore the data set and its options, or choose another --out."
        # The folder keeps copies, as the files of a data set are out of its reach.
        if read_mapping(self.description) != _as_stored(description.to_dict()):
            raise UserError(
                f"{self.root}: the description of the data set has changed since this run began. "
                + other
            )
        if read_mapping(self.folds) != _as_stored(folds):
            raise UserError(
                f"{self.folds}: the folds, or the cases in them, have changed since this run "
                f"began. {other}"
            )
        changed = changed_files(read_mapping(self.states), states) if self.states.exists() else []
        if changed:
            raise UserError(
                f"{self.root}: {len(changed)} files of the data set have changed since this run "
                f"began: {', '.join(changed[:5])}{', ...' * (len(changed) > 5)}. What is trained "
                "already has seen the old ones. Restore them with their times (cp -p, rsync -t), "
                "or choose another --out. If nothing but times has changed, remove "
                f"{self.states} to go on without this check."
            )

    def read_plan(self) -> Facts | None:
        """Return what plan.json says of earlier starts; None if there was none."""
        if not self.plan.is_file():
            return None
        return parsed(Facts, read_mapping(self.plan), str(self.plan))

    def read_skipped(self) -> list[str] | None:
        """Return the names of the subjects that the run does without; None if it has not begun."""
        if not self.skipped.is_file():
            return None
        names = read_mapping(self.skipped).get("subjects")
        if not isinstance(names, list):
            raise UserError(f"{self.skipped} is damaged: 'subjects' must be a list of names.")
        return names


@contextmanager
def locked(path: Path, reason: str, console: Console) -> Iterator[None]:
    """Hold a lock, and say so if another process has it; the system frees that of a dead one."""
    lock, new = FileLock(path), not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"Waiting: {reason} by another process ({path}).")
        lock.acquire()
    except OSError as error:
        raise UserError(f"--out: {path.parent} cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()
        # A folder that was made for nothing goes; filelock notices that its file is gone.
        if new and [*path.parent.iterdir()] == [path]:
            path.unlink()
            path.parent.rmdir()


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that decide what is trained."""
    return {name: value for name, value in options.items() if name not in FREE_OPTIONS}


def _is_amount(value: Any) -> bool:
    return type(value) in {int, float} and math.isfinite(value) and value >= 0


def _flat(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an experiment as unit.json holds them, each under a name of its own."""
    flat: dict[str, Any] = {}
    for part, entries in _as_stored(experiment).items():
        named = entries if isinstance(entries, dict) else {"": entries}
        flat |= {f"{part}.{name}".rstrip("."): value for name, value in named.items()}
    return flat


def _as_stored(content: Any) -> Any:
    """What reading gives back: lists for tuples, and texts as names."""
    return json.loads(json.dumps(content))


def _same(name: str, before: Any, now: Any) -> bool:
    """Whether two values are equal, or paths of one place."""
    if name.rpartition(".")[2] in _PATHS and isinstance(before, str) and isinstance(now, str):
        return Path(before).resolve() == Path(now).resolve()
    return bool(before == now)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, a line each; empty if nothing does."""
    lines = [
        f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if not _same(key, before.get(key), now.get(key))
    ]
    # Another version of the library differs in a hundred files.
    return "\n".join(lines[:_MOST] + [f"  and {len(lines) - _MOST} more"] * (len(lines) > _MOST))
