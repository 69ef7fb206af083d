"""What a data set is: its files, labels, regions and grid, as one YAML file can say it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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
    def patterns(self) -> dict[str, str]:
        """Patterns of the modalities and, as "segmentation", of the label map."""
        return {**self.modalities, "segmentation": self.segmentation}

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
    unknown = [str(key) for key in values if key not in known]
    missing = [
        name
        for name, item in known.items()
        if item.default is MISSING and item.default_factory is MISSING and name not in values
    ]
    found = [
        f"{what} keys {', '.join(names)}; "
        for what, names in (("unknown", unknown), ("missing", missing))
        if names
    ]
    if found:
        raise UserError(
            f"Description of a data set: {''.join(found)}known keys are {', '.join(known)}."
        )


def _converted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in the types of the attributes; lists become tuples, string keys numbers."""
    crop, channels = values.get("crop"), values.get("channels") or {}
    return {
        **values,
        "name": str(values["name"]),
        "patient": str(values.get("patient") or ""),
        "modalities": {str(k): str(v) for k, v in values["modalities"].items()},
        "labels": {_integer(k): _integer(v) for k, v in values["labels"].items()},
        "classes": tuple(map(str, _list(values["classes"]))),
        "regions": {str(k): _integers(v) for k, v in values["regions"].items()},
        "grid": _integers(values["grid"]),
        "crop": None if crop is None else _integers(crop),
        "channels": {str(k): _integer(v) for k, v in channels.items()},
    }


def _integer(value: Any) -> int:
    """A whole number; 2.5 or True are not silently rounded into one."""
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(f"expected a whole number, found {value!r}")
    return int(value)


def _integers(value: Any) -> tuple[int, ...]:
    return tuple(map(_integer, _list(value)))


def _list(value: Any) -> Any:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError(f"expected a list of numbers or names, found {value!r}")
    return value


def _contradictions(description: Description) -> Iterator[str]:
    """What in a description cannot be true at once, one sentence each."""
    yield from _file_contradictions(description)
    yield from _name_contradictions(description)
    yield from _label_contradictions(description)
    for name, size in (("grid", description.grid), ("crop", description.crop)):
        if size is not None and (len(size) != 3 or min(size) < 1):
            yield f"{name} is {size}; expected three positive numbers of voxels."
    if description.spacing not in {"header", "nominal"}:
        yield f"spacing is '{description.spacing}'; expected 'header' or 'nominal'."


def _file_contradictions(description: Description) -> Iterator[str]:
    for name, pattern in description.patterns.items():
        for alternative in map(str.strip, pattern.split("|")):
            if "{subject}" not in alternative:
                yield (
                    f"the pattern of '{name}' has no {{subject}} in '{alternative}', so files "
                    "cannot be told apart; write it like '{subject}/{subject}_t1.nii*'."
                )
            if fault := _pattern_fault(alternative):
                yield f"the pattern '{alternative}' of '{name}' {fault}."
    if description.patient and "{patient}" not in description.patient:
        yield f"patient is '{description.patient}'; expected a pattern with {{patient}}."
    if fault := _pattern_fault(description.patient):
        yield f"the pattern '{description.patient}' of 'patient' {fault}."
    if "segmentation" in description.modalities:
        yield "a modality cannot be called 'segmentation', which is the label map."
    if not description.modalities:
        yield "modalities is empty; name at least one with its file pattern."
    if stray := sorted(set(description.channels) - set(description.modalities)):
        yield f"channels names {', '.join(stray)}, which modalities does not."


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


def _name_contradictions(description: Description) -> Iterator[str]:
    """Names that could not stand in a table, a file or the name of a folder."""
    named = {
        "modality": description.modalities,
        "class": description.classes,
        "region": description.regions,
    }
    for kind, names in named.items():
        for name in names:
            if not is_name(name):
                yield (
                    f"the {kind} {name!r} must be called by a word of at most 100 bytes, of "
                    "printable characters without slashes, that does not begin with a dot, =, +, "
                    "- or @."
                )
    if not description.name.isprintable():
        yield "its name holds characters that cannot be printed."


def _label_contradictions(description: Description) -> Iterator[str]:
    count, indices = len(description.classes), {*description.labels.values()}
    if description.labels.get(0) != 0:
        yield "labels must map 0 to 0 (background)."
    if outside := [value for value in description.labels if value not in _LABELS]:
        yield (
            f"labels names the value {outside[0]}; files hold those from {_LABELS.start} to "
            f"{_LABELS.stop - 1}."
        )
    if indices != {*range(count)} or count > _MOST_CLASSES:
        yield (
            f"labels maps to class indices {sorted(indices)}, but classes names {count}, so "
            f"exactly the indices 0 to {count - 1} are expected, and no more than {_MOST_CLASSES}."
        )
    if not description.regions:
        yield "regions is empty; name at least one with its class indices."
    for name, joined in description.regions.items():
        if not joined or not {*joined} <= {*range(1, count)}:
            yield f"region '{name}' joins {list(joined)}; expected some of 1 to {count - 1}."
