"""What a data set is: its files, labels, regions and grid, as one YAML file can say it."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from kdnet.config import parsed
from kdnet.errors import UserError
from kdnet.files import is_name, read_mapping

Size = tuple[int, int, int]

_WILDCARDS = re.compile(r"\*+|\?|\[[^\]]+\]|\{[^}]*\}")
_CLASSES = re.compile(r"\[[^\]]+\]")
_MOST_WILDCARDS = 8
_WHOLE_NUMBER = re.compile(r"-?\d+")
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
    def from_dict(
        cls, values: Mapping[str, Any], place: str = "Description of a data set"
    ) -> "Description":
        """Build a description from what `to_dict` gave, or from a user's YAML file."""
        labels = values.get("labels")
        # Keys are made numbers: 2.5 or True shall not be rounded into one without a word.
        keys = map(str, labels) if isinstance(labels, Mapping) else ()
        if wrong := [key for key in keys if not _WHOLE_NUMBER.fullmatch(key)]:
            raise UserError(f"{place}: labels holds {wrong[0]}; expected whole numbers.")
        return parsed(cls, values, place)


def load_description(path: Path) -> Description:
    """Read the description of a data set from YAML."""
    found = _locate(Path(path))
    return Description.from_dict(read_mapping(found), str(found))


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
        if size is not None and min(size) < 1:
            yield f"{name} is {size}; expected three positive numbers of voxels."


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
