"""The folder of a run: where everything lies, and what the run was made with."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from kdnet.configuration.config import Config
from kdnet.data.description import Description
from kdnet.data.files import States, changed_files
from kdnet.errors import UserError
from kdnet.files import UnreadableError, is_number, read_json, read_yaml
from kdnet.files import WriteError, write_text

ROLES = ("teacher", "baseline", "student")

PACKAGES = (
    "privdistill",
    "torch",
    "monai",
    "lightning-fabric",
    "nibabel",
    "numpy",
    "safetensors",
    "scipy",
)

# Keys that may change between a run and its continuation, as they do not change its numbers.
_FREE_KEYS = frozenset(
    {
        "out",
        "preset",
        "cache_dir",
        "workers",
        "predictions",
        "teacher_cache",
        "teacher_cache_gib",
        "trust_backbone",
    }
)


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run.

    Args:
        root: The folder given by --out.
        part: The network that this process trains, where several processes share the folder.
    """

    root: Path
    part: str = ""

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, hardware, revision, seed, resolved precision and memory format."""
        return self.root / "environment.json"

    @property
    def cases(self) -> Path:
        """Names of the training, validation and test subjects."""
        return self.root / "cases.json"

    @property
    def files(self) -> Path:
        """Size and time of change of every file that the run began with."""
        return self.root / "files.json"

    @property
    def skipped(self) -> Path:
        """Subjects that were left out because of their files, and why."""
        return self.root / "skipped.json"

    @property
    def scores(self) -> Path:
        """Scores of every held-out case."""
        return self.root / "scores.csv"

    @property
    def part_scores(self) -> Path:
        """Scores of every held-out case by the network of this part."""
        return self.root / self.part / "scores.csv"

    @property
    def subsets(self) -> Path:
        """The same for every subset of the modalities, if the network takes any."""
        return self.root / self.part / "subsets.csv"

    @property
    def summary(self) -> Path:
        """Time of each phase, peak memory; of a part beside its network."""
        return self.root / self.part / "summary.json"

    def role(self, role: str) -> Path:
        """Folder of one network's files."""
        return self.root / role

    def model(self, role: str) -> Path:
        """The selected weights of one network, with all that predict.py needs."""
        return self.role(role) / "model.safetensors"

    def tensorboard(self, role: str) -> Path:
        """Folder of the scalars of one network."""
        return self.root / "tensorboard" / role

    def predictions(self, role: str) -> Path:
        """Folder of the label maps predicted for the held-out cases."""
        return self.root / "predictions" / role

    def holds(self, config: Config) -> bool:
        """Say whether this folder holds the run already, without touching it."""
        if self.config.is_file():
            self._check_same(config)
            return True
        # Hidden files are locks of a run that is about to begin.
        if self.root.exists() and (not self.root.is_dir() or any(self.root.glob("[!.]*"))):
            raise UserError(
                f"--out: {self.root} exists and is not a run folder (it has no config.yaml). "
                "Choose a new or an empty folder."
            )
        return False

    def begin(self, config: Config) -> None:
        """Create the folder with its configuration."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            write_text(self.config, yaml.safe_dump(config.to_dict(), sort_keys=False))
        except (OSError, WriteError) as error:
            raise UserError(f"--out: {self.root} cannot be written: {error}") from error

    def _check_same(self, config: Config) -> None:
        # Options that came after the run began had their present default then.
        before = Config().to_dict() | _read(self.config)
        now = config.to_dict()
        differing = [
            f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if key not in _FREE_KEYS and before.get(key) != now.get(key)
        ]
        if differing:
            raise UserError(
                f"--out: {self.root} holds a run with another configuration:\n"
                + "\n".join(differing)
                + "\nChoose another --out, or give the same configuration to continue that run."
            )

    def resolved(self) -> dict[str, Any]:
        """Return what was chosen when the run began, such as its precision; empty if it is new."""
        if not self.environment.is_file():
            return {}
        resolved = _read(self.environment).get("resolved", {})
        if not isinstance(resolved, dict):
            raise UserError(f"{self.environment} is damaged: 'resolved' must hold keys and values.")
        return resolved

    def write_environment(self, *, seed: int, resolved: dict[str, Any]) -> None:
        """Record what the run is made with."""
        content = environment() | {"seed": seed, "resolved": resolved}
        write_text(self.environment, json.dumps(content, indent=2) + "\n")

    def write_description(self, description: Description) -> None:
        """Record the data set as it is described when the run begins."""
        write_text(self.root / "description.json", json.dumps(description.to_dict(), indent=2))

    def has_description(self, description: Description) -> bool:
        """Say whether the run began with a data set of this description."""
        now = json.loads(json.dumps(description.to_dict()))
        return bool(_read(self.root / "description.json") == now)

    def write_skipped(self, names: Sequence[str], problems: Sequence[Mapping[str, str]]) -> None:
        """Record the subjects that the run does without."""
        content = {"subjects": list(names), "problems": list(problems)}
        write_text(self.skipped, json.dumps(content, indent=2) + "\n")

    def write_files(self, states: States) -> None:
        """Record the files that the run begins with."""
        write_text(self.files, json.dumps(states, indent=1) + "\n")

    def check_files(self, states: States) -> None:
        """Refuse to go on with other files than the run began with."""
        changed = changed_files(_read(self.files), states) if self.files.is_file() else []
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise UserError(
                f"{self.root}: {len(changed)} files of the data set have changed since this run "
                f"began: {', '.join(changed[:5])}{more}. What is trained already has seen the old "
                "ones. Restore them with their times (cp -p, rsync -t), or choose another --out. "
                f"If nothing but times has changed, remove {self.files} to go on without this "
                "check."
            )

    def read_skipped(self) -> tuple[str, ...] | None:
        """Return the names of the subjects that the run does without; None if it has not begun."""
        if not self.skipped.is_file():
            return None
        try:
            return tuple(map(str, read_json(self.skipped)["subjects"]))
        except (UnreadableError, LookupError, TypeError) as error:
            raise UserError(f"{self.skipped} is damaged and cannot be read: {error}.") from error

    def read_summary(self) -> dict[str, Any]:
        """Return the summary of an earlier part of this run; empty if there is none."""
        content = _read(self.summary) if self.summary.is_file() else {}
        for name in ("seconds", "peak_mib", "teacher_cache"):
            values = content.get(name, {})
            if not isinstance(values, dict) or not all(map(is_number, values.values())):
                raise UserError(
                    f"{self.summary} is damaged: '{name}' must hold numbers by name. Remove the "
                    "file; the times of the run so far are lost with it, and nothing else."
                )
        if not is_number(content.get("total_seconds", 0.0)):
            raise UserError(f"{self.summary} is damaged: 'total_seconds' must be a number.")
        return content

    def write_summary(self, content: dict[str, Any]) -> None:
        """Write the summary."""
        write_text(self.summary, json.dumps(content, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Return the installed version of every package that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment() -> dict[str, Any]:
    """Return versions, revision of the code and hardware, JSON-safe."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions(),
        "git_revision": git_revision(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def git_revision() -> str | None:
    """Return the revision of the code, "-dirty" if files were changed; None outside git."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [
        git,
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return result.stdout.strip() or None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except UnreadableError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: expected keys and values.")
    return content
