"""What a data set is: its files, labels, regions and grid, as one YAML file can say it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
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
        background: "zero" if voxels outside of the head are exactly 0, so that z-scores leave them
            out; "noise" if they are not, so that z-scores are over all voxels.
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
    background: Literal["zero", "noise"] = "zero"
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
        # Folders of visits say what names then repeat: {subject}_{session}.
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
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        # JSON knows no numbers as keys.
        return plain | {"labels": dict(self.labels)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Description:
        """Build a description from what `to_dict` gave, or from a user's YAML file."""
        known = [item.name for item in fields(cls)]
        # The attributes that have a default.
        optional = {"crop", "background", "channels", "phantom", "citation", "patient"}
        unknown = [str(key) for key in values if key not in known]
        missing = [name for name in known if name not in {*optional, *values}]
        if unknown or missing:
            raise UserError(
                f"Description of a data set: unknown keys {', '.join(unknown) or 'none'}; missing "
                f"keys {', '.join(missing) or 'none'}; known keys are {', '.join(known)}."
            )
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
        if not isinstance(values, dict):
            raise UnreadableError("it does not consist of 'key: value' lines")
    except UnreadableError as error:
        template = DATASETS_FOLDER / "template.yaml"
        raise UserError(f"{found}: expected a YAML file such as {template}; {error}") from error
    try:
        return Description.from_dict(values)
    except UserError as error:
        raise UserError(f"{found}: {error}") from error


def _locate(path: Path) -> Path:
    """The file meant by a path or by the bare name of a file in `datasets/`."""
    # A name without a folder may be one of the descriptions that come along.
    candidates = [path]
    if path.parent == Path():
        candidates += [DATASETS_FOLDER / path.name, DATASETS_FOLDER / f"{path.name}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = ", ".join(sorted(file.stem for file in DATASETS_FOLDER.glob("*.yaml")))
    raise UserError(
        f"{path}: expected the YAML description of a data set, found no such file. Give the path "
        f"of a file or one of these names: {names}."
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
    # Text would be taken for a list of its letters.
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError(f"expected a list of numbers or names, found {value!r}")
    return value


def _contradictions(described: Description) -> Iterator[str]:
    """What in a description cannot be true at once, one sentence each."""
    yield from _pattern_contradictions(described)
    names = (*described.modalities, *described.classes, *described.regions)
    # They stand in tables, and in the names of files and folders.
    for name in itertools.filterfalse(is_name, names):
        yield (
            f"{name!r} must be a word of at most 100 bytes, of printable characters without "
            "slashes, that does not begin with a dot, =, +, - or @."
        )
    if not described.name.isprintable():
        yield "its name holds characters that cannot be printed."
    yield from _label_contradictions(described)
    for name, size in (("grid", described.grid), ("crop", described.crop)):
        if size is not None and (len(size) != 3 or min(size) < 1):
            yield f"{name} is {size}; expected three positive numbers of voxels."
    if described.spacing not in {"header", "nominal"}:
        yield f"spacing is '{described.spacing}'; expected 'header' or 'nominal'."
    if described.background not in {"zero", "noise"}:
        yield f"background is '{described.background}'; expected 'zero' or 'noise'."


def _pattern_contradictions(described: Description) -> Iterator[str]:
    if not described.modalities or "segmentation" in described.modalities:
        yield "modalities is empty, or names the label map, 'segmentation'; expected images."
    if stray := sorted({*described.channels} - {*described.modalities}):
        yield f"channels names {', '.join(stray)}, which modalities does not."
    written = [
        (name, "{subject}", alternative.strip())
        for name, pattern in described.patterns.items()
        for alternative in pattern.split("|")
    ]
    if described.patient:
        written.append(("patient", "{patient}", described.patient))
    for name, placeholder, pattern in written:
        # Without it, the files of two subjects cannot be told apart.
        if placeholder not in pattern:
            yield f"the pattern '{pattern}' of '{name}' has no {placeholder}."
        if fault := _pattern_fault(pattern):
            yield f"the pattern '{pattern}' of '{name}' {fault}."


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
    try:
        re.compile("".join(_CLASSES.findall(pattern)))
    except re.error as error:
        return f"holds what is no set of characters ({error})"
    return ""


def _label_contradictions(described: Description) -> Iterator[str]:
    count, indices = len(described.classes), {*described.labels.values()}
    if described.labels.get(0) != 0:
        yield "labels must map 0 to 0 (background)."
    # Class indices fit into a byte, but what files hold need not.
    if outside := [value for value in described.labels if value not in _LABELS]:
        yield f"labels names {outside[0]}; expected {_LABELS.start} to {_LABELS.stop - 1}."
    # A class that no value leads to would never be learned, and an index without a name
    # never be shown.
    if indices != {*range(count)} or count > _MOST_CLASSES:
        yield (
            f"labels maps to class indices {sorted(indices)}, but classes names {count}, so "
            f"exactly the indices 0 to {count - 1} are expected, and no more than {_MOST_CLASSES}."
        )
    if not described.regions:
        yield "regions is empty; name at least one with its class indices."
    for name, joined in described.regions.items():
        if not joined or not {*joined} <= {*range(1, count)}:
            yield f"region '{name}' joins {list(joined)}; expected some of 1 to {count - 1}."
