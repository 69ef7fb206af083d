"""What a data set is: its files, labels, regions and grid, as one YAML file can say it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from kdnet.errors import UserError
from kdnet.files import UnreadableError, is_name, read_yaml

Size = tuple[int, int, int]

_WILDCARDS = re.compile(r"\*+|\?|\[[^\]]+\]|\{[^}]*\}")
_CLASSES = re.compile(r"\[[^\]]+\]")
_MOST_WILDCARDS = 8
#: What a label map can be written with (int32), unsigned or not.
_LABELS = range(-(2**31), 2**31)
#: Class indices are kept in a byte each.
_MOST_CLASSES = 256

DATASETS_FOLDER = Path(__file__).resolve().parents[2] / "datasets"


@dataclass(frozen=True)
class Description:
    """A data set, in words that travel inside YAML files and model files.

    Attributes:
        name: Name of the data set, as it appears in reports.
        modalities: Modality name to file pattern, in the order in which channels are stacked.
        segmentation: File pattern of the label map.
        labels: Value in the files to class index; 0 is background; other values are errors.
        classes: Names of the classes in index order, background first.
        regions: Region name to the class indices it joins, in the order of the reports.
        grid: Training grid after resampling, voxels.
        spacing: "header" if voxel sizes in the headers (mm) are true; "nominal" if they are not,
            so that distances are given in voxels.
        crop: Central crop (or padding) before resampling, voxels; None takes the whole volume.
        channels: Modality name to its index along the fourth axis, for 4-D files.
        phantom: Whether the images are synthetic.
        citation: Whom to cite where results are shown.
        patient: Pattern of the names of subjects, such as "{patient}_*", that tells whose visits
            they are; those of one patient stay in one part of every split. Empty: known forms.
    """

    name: str
    modalities: dict[str, str]
    segmentation: str
    labels: dict[int, int]
    classes: tuple[str, ...]
    regions: dict[str, tuple[int, ...]]
    grid: Size
    spacing: Literal["header", "nominal"]
    crop: Size | None = None
    channels: dict[str, int] = field(default_factory=dict)
    phantom: bool = False
    citation: str = ""
    patient: str = ""

    def __post_init__(self) -> None:
        for problem in _contradictions(self):
            raise UserError(f"Description of data set {self.name!r}: {problem}")

    @property
    def visits(self) -> str:
        """Pattern of the names that tell a patient's visits apart; empty for the known forms."""
        sessions = any("{session" in pattern for pattern in self.modalities.values())
        return self.patient or ("{patient}_{session}" if sessions else "")

    @property
    def export_labels(self) -> dict[int, int]:
        """Class index to the value written into files; the first of several values wins."""
        return {index: value for value, index in reversed(self.labels.items())}

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers, safe for YAML and JSON."""
        values = asdict(self)
        values["classes"] = list(self.classes)
        values["regions"] = {name: list(indices) for name, indices in self.regions.items()}
        values["grid"] = list(self.grid)
        values["crop"] = None if self.crop is None else list(self.crop)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Description:
        """Build a description from what `to_dict` gave, or from a user's YAML file."""
        _check_keys(values)
        try:
            return cls(**_converted(values))
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"Description of data set '{values.get('name')}': a value has the wrong form "
                f"({error}). Compare with datasets/template.yaml."
            ) from error


def load_description(path: Path) -> Description:
    """Read the description of a data set from YAML."""
    found = _locate(Path(path))
    try:
        values = read_yaml(found)
    except UnreadableError as error:
        raise UserError(f"{found}: expected a YAML file that can be read; {error}") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{found}: expected 'key: value' lines at the top level, found "
            f"{type(values).__name__}. Start from {DATASETS_FOLDER / 'template.yaml'}."
        )
    try:
        return Description.from_dict(values)
    except UserError as error:
        raise UserError(f"{found}: {error}") from error


def _locate(path: Path) -> Path:
    """The file meant by a path or by the bare name of a file in `datasets/`."""
    candidates = [path, DATASETS_FOLDER / path.name, DATASETS_FOLDER / f"{path.name}.yaml"]
    bare = path.parent == Path()
    for candidate in candidates if bare else candidates[:1]:
        if candidate.is_file():
            return candidate
    names = ", ".join(sorted(file.stem for file in DATASETS_FOLDER.glob("*.yaml")))
    raise UserError(
        f"{path}: expected the YAML description of a data set, found no such file. Give the path "
        f"of a file or one of these names: {names}."
    )


def _check_keys(values: Mapping[str, Any]) -> None:
    known = {item.name: item for item in fields(Description)}
    required = [
        name
        for name, item in known.items()
        if item.default is MISSING and item.default_factory is MISSING
    ]
    unknown = [str(key) for key in values if key not in known]
    missing = [key for key in required if key not in values]
    if unknown or missing:
        raise UserError(
            "Description of a data set: "
            + (f"unknown keys {', '.join(unknown)}; " if unknown else "")
            + (f"missing keys {', '.join(missing)}; " if missing else "")
            + f"known keys are {', '.join(known)}."
        )


def _converted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in the types of the attributes; lists become tuples, string keys numbers."""
    converted = dict(values)
    converted["name"] = str(values["name"])
    converted["patient"] = str(values.get("patient") or "")
    converted["modalities"] = {str(k): str(v) for k, v in values["modalities"].items()}
    converted["labels"] = {_integer(k): _integer(v) for k, v in values["labels"].items()}
    converted["classes"] = _strings(values["classes"])
    converted["regions"] = {str(k): _integers(v) for k, v in values["regions"].items()}
    converted["grid"] = _integers(values["grid"])
    crop = values.get("crop")
    converted["crop"] = None if crop is None else _integers(crop)
    converted["channels"] = {str(k): _integer(v) for k, v in (values.get("channels") or {}).items()}
    return converted


def _integer(value: Any) -> int:
    """A whole number; 2.5 or True are not silently rounded into one."""
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(f"expected a whole number, found {value!r}")
    return int(value)


def _integers(value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError(f"expected a list of numbers, found {value!r}")
    return tuple(_integer(item) for item in value)


def _strings(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError(f"expected a list of names, found {value!r}")
    return tuple(str(item) for item in value)


def _contradictions(description: Description) -> list[str]:
    """What in a description cannot be true at once, one sentence each."""
    return [
        *_file_contradictions(description),
        *_name_contradictions(description),
        *_label_contradictions(description),
        *_size_contradictions(description),
    ]


def _file_contradictions(description: Description) -> list[str]:
    patterns = {**description.modalities, "segmentation": description.segmentation}
    problems = [
        f"the pattern of '{name}' has no {{subject}} in '{alternative}', so files cannot be told "
        "apart; write it like '{subject}/{subject}_t1.nii*'."
        for name, pattern in patterns.items()
        for alternative in pattern.split("|")
        if "{subject}" not in alternative
    ]
    problems += [
        f"the pattern '{alternative}' of '{name}' {fault}."
        for name, pattern in patterns.items()
        for alternative in pattern.split("|")
        if (fault := _pattern_fault(alternative.strip()))
    ]
    if description.patient and "{patient}" not in description.patient:
        problems.append(f"patient is '{description.patient}'; expected a pattern with {{patient}}.")
    if fault := _pattern_fault(description.patient):
        problems.append(f"the pattern '{description.patient}' of 'patient' {fault}.")
    if "segmentation" in description.modalities:
        problems.append("a modality cannot be called 'segmentation', which is the label map.")
    if not description.modalities:
        problems.append("modalities is empty; name at least one with its file pattern.")
    stray = sorted(set(description.channels) - set(description.modalities))
    if stray:
        problems.append(f"channels names {', '.join(stray)}, which modalities does not.")
    return problems


def _pattern_fault(pattern: str) -> str:
    """What keeps a pattern from being looked for below the root of a data set; else empty."""
    if not pattern.isprintable():
        return "holds characters that cannot be printed"
    if pattern.startswith("/") or PureWindowsPath(pattern).is_absolute():
        return "is an absolute path; patterns are relative to the root of the data set"
    if ".." in pattern.split("/"):
        return "leads out of the data set; give a --data-root further up instead of '..'"
    # Each one more multiplies the time that a name which does not fit can take.
    if len(_WILDCARDS.findall(pattern)) > _MOST_WILDCARDS:
        return f"has more than {_MOST_WILDCARDS} wildcards; write out more of the names"
    for group in _CLASSES.findall(pattern):
        try:
            re.compile(group)
        except re.error as error:
            return f"holds {group}, which is no set of characters ({error})"
    return ""


def _name_contradictions(description: Description) -> list[str]:
    """Names that could not stand in a table, a file or the name of a folder."""
    named = {
        "modality": description.modalities,
        "class": description.classes,
        "region": description.regions,
    }
    problems = [
        f"the {kind} {name!r} must be called by a word of at most 100 bytes, of printable "
        "characters without slashes, that does not begin with a dot, =, +, - or @."
        for kind, names in named.items()
        for name in names
        if not is_name(name)
    ]
    if not description.name.isprintable():
        problems.append("its name holds characters that cannot be printed.")
    return problems


def _label_contradictions(description: Description) -> list[str]:
    problems = []
    count = len(description.classes)
    if description.labels.get(0) != 0:
        problems.append("labels must map 0 to 0 (background).")
    outside = [value for value in description.labels if value not in _LABELS]
    if outside:
        problems.append(
            f"labels names the value {outside[0]}; files hold those from {_LABELS.start} to "
            f"{_LABELS.stop - 1}."
        )
    if count > _MOST_CLASSES:
        problems.append(f"classes names {count}; expected at most {_MOST_CLASSES}.")
    if set(description.labels.values()) != set(range(count)):
        problems.append(
            f"labels maps to class indices {sorted(set(description.labels.values()))}, but "
            f"classes names {count}, so exactly the indices 0 to {count - 1} are expected."
        )
    if not description.regions:
        problems.append("regions is empty; name at least one with its class indices.")
    problems += [
        f"region '{name}' joins {list(indices)}; expected some of the classes 1 to {count - 1}."
        for name, indices in description.regions.items()
        if not indices or not set(indices) <= set(range(1, count))
    ]
    return problems


def _size_contradictions(description: Description) -> list[str]:
    problems = [
        f"{name} is {size}; expected three positive numbers of voxels."
        for name, size in (("grid", description.grid), ("crop", description.crop))
        if size is not None and (len(size) != 3 or min(size) < 1)
    ]
    if description.spacing not in {"header", "nominal"}:
        problems.append(f"spacing is '{description.spacing}'; expected 'header' or 'nominal'.")
    return problems
