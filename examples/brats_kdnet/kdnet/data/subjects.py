"""Finding the subjects of a data set on disk, and whether their files stay what they were."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from kdnet.data.description import DATASETS_FOLDER, Description, load_description
from kdnet.errors import UserError

#: Written by the phantom generator into the root of what it made.
PHANTOM_MARKER = "phantom.json"

#: Looked for in this order; of two layouts that fit equally well the first is taken.
BUILT_IN = ("brats2021", "brats2018", "brats2023", "msd_task01", "bids")

#: What `Subject.rivals` calls the label map.
SEGMENTATION = "segmentation"
#: Files that claim to be the same one of a subject, with the strata they lie in.
_Claims: TypeAlias = "list[tuple[Path, str | None]]"

#: Size in bytes and time of change in ns of every file, by subject and path.
States = dict[str, dict[str, list[int]]]

_PLACEHOLDER = re.compile(r"\{(subject|session|grade|patient)(?::([^}]*))?\}|\*|\?|\[[^\]]+\]")
#: Names of subjects that say which patient they are of: BraTS from 2023, BIDS, TCGA, UPENN-GBM.
_VISITS = (
    *(r"(?P<patient>BraTS-\w+-\d+)-\d+", r"(?P<patient>sub-[^_]+)_ses-.+"),
    *(r"(?P<patient>TCGA.\w\w.\w{4})_.+", r"(?P<patient>UPENN-GBM-\d+)_\d+"),
)
#: How nnU-Net numbers the channels of a case.
_CHANNEL = re.compile(r".+_\d{4}")


@dataclass(frozen=True)
class ImageFile:
    """A volume on disk.

    Attributes:
        path: A NIfTI file, compressed or not.
        channel: Index along the fourth axis of a 4-D file; None for a 3-D file.
    """

    path: Path
    channel: int | None = None


@dataclass(frozen=True)
class Subject:
    """The files of one subject, as far as they were found.

    Attributes:
        name: Unique in the data set.
        images: Modality name to its file, in the order of the description; missing modalities
            are absent.
        segmentation: The label map, if there is one.
        grade: "HGG" or "LGG" (or another stratum) where the layout tells it.
        rivals: Modality name, or "segmentation", to further files that claim the same; nobody can
            tell which is meant, so the checks report them and preprocessing refuses them.
        unlisted: Why nobody could look into its folder; empty if that was possible.
        patient: Whose visit it is; empty if nothing says so, and it is a patient of its own.
    """

    name: str
    images: dict[str, ImageFile]
    segmentation: ImageFile | None = None
    grade: str | None = None
    rivals: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    unlisted: str = ""
    patient: str = ""

    @property
    def files(self) -> dict[str, ImageFile]:
        """What there is, by modality, and the label map as "segmentation"."""
        labels = {} if self.segmentation is None else {SEGMENTATION: self.segmentation}
        return {**self.images, **labels}


def patient_of(name: str, pattern: str = "") -> str:
    """Return whose visit a subject is, by the description's pattern or a known form of names.

    >>> [patient_of(name) for name in ("BraTS-GLI-00006-101", "sub-07_ses-2", "case_12")]
    ['BraTS-GLI-00006', 'sub-07', 'case_12']
    """
    for form in (_to_expression(pattern),) if pattern else _VISITS:
        if match := re.fullmatch(form, name):
            return match["patient"]
    return name


def find_subjects(
    root: Path, description: Description | None = None
) -> tuple[Description, list[Subject]]:
    """Find every subject below a folder."""
    root = Path(root)
    if not root.is_dir():
        there = "a file" if root.exists() else "nothing"
        raise UserError(f"{root}: expected the folder of a data set, found {there}.")
    candidates = _candidates(root) if description is None else [description]
    found = [(candidate, _subjects(root, candidate)) for candidate in candidates]
    best, subjects = max(found, key=lambda pair: _files(pair[1]))
    if not _files(subjects):
        raise UserError(_nothing_found(root, candidates))
    if best.channels and any(_CHANNEL.fullmatch(subject.name) for subject in subjects):
        raise UserError(
            f"{root}: expected one 4-D file per subject ({best.name}), found files of one channel "
            f"each, such as {subjects[-1].name}, as nnU-Net lays them out. Compare the numbers in "
            "datasets/nnunet.yaml with `channel_names` in its dataset.json, then give "
            "--description nnunet."
        )
    if (root / PHANTOM_MARKER).exists():
        best = replace(best, phantom=True)
    return best, subjects


def _candidates(root: Path) -> list[Description]:
    names = ("phantom",) if (root / PHANTOM_MARKER).exists() else BUILT_IN
    return [load_description(DATASETS_FOLDER / f"{name}.yaml") for name in names]


def _files(subjects: list[Subject]) -> int:
    return sum(len(subject.images) for subject in subjects)


def _subjects(root: Path, description: Description) -> list[Subject]:
    """Every subject of whom at least one image was found, or whose folder holds other images."""
    found = {name: _matches(root, pattern) for name, pattern in description.modalities.items()}
    found[SEGMENTATION] = _matches(root, description.segmentation)
    unlisted = dict(_other_folders(root, description))
    names: dict[str, str | None] = dict.fromkeys(unlisted)
    for matches in found.values():
        names.update({name: claims[0][1] for name, claims in matches.items()})
    return [
        replace(_subject(name, grade, found, description), unlisted=unlisted.get(name, ""))
        for name, grade in sorted(names.items())
    ]


def _subject(
    name: str, grade: str | None, found: dict[str, dict[str, _Claims]], description: Description
) -> Subject:
    own = {role: [path for path, _ in found[role][name]] for role in found if name in found[role]}
    rivals = {role: tuple(paths[1:]) for role, paths in own.items() if paths[1:]}
    segmentation = own.pop(SEGMENTATION, None)
    return Subject(
        name=name,
        images={
            modality: ImageFile(paths[0], description.channels.get(modality))
            for modality, paths in own.items()
        },
        segmentation=ImageFile(segmentation[0]) if segmentation else None,
        grade=grade,
        rivals=rivals,
        patient=patient_of(name, description.visits),
    )


def _matches(root: Path, pattern: str) -> dict[str, _Claims]:
    """Subject name to the files that fit a pattern, each with the stratum it lies in."""
    matches: dict[str, _Claims] = {}
    for alternative in pattern.split("|"):
        earlier = set(matches)
        for name, grade, path in _alternative_matches(root, alternative.strip()):
            if name not in earlier:
                matches.setdefault(name, []).append((path, grade))
    return matches


def _alternative_matches(root: Path, pattern: str) -> Iterator[tuple[str, str | None, Path]]:
    expression = re.compile(_to_expression(pattern))
    # A star beside a placeholder is one star, as two would mean any depth.
    for path in sorted(root.glob(re.sub(r"(\{[^}]*\}|\*)+", "*", pattern))):
        match = expression.fullmatch(path.relative_to(root).as_posix())
        # Names that start with a dot are what file managers and archivers leave behind.
        if match and not path.name.startswith("."):
            groups = match.groupdict()
            visit = [groups["subject"], groups.get("session")]
            yield "_".join(filter(None, visit)), groups.get("grade"), path


def _to_expression(pattern: str) -> str:
    """A glob pattern with placeholders as a regular expression with named groups."""
    parts: list[str] = []
    seen: set[str] = set()
    position = 0
    for token in _PLACEHOLDER.finditer(pattern):
        parts += [re.escape(pattern[position : token.start()]), _expression_of(token, seen)]
        position = token.end()
    return "".join([*parts, re.escape(pattern[position:])])


def _expression_of(token: re.Match[str], seen: set[str]) -> str:
    name = token.group(1)
    if name is None:
        return {"*": "[^/]*", "?": "[^/]"}.get(token.group(), token.group())
    if name in seen:
        return f"(?P={name})"
    seen.add(name)
    if token.group(2):
        return f"(?P<{name}>{'|'.join(re.escape(word) for word in token.group(2).split(','))})"
    if name == "patient":
        return "(?P<patient>[^/]+)"
    # A dot is not part of a subject's name, so that "{subject}.nii*" stops before the ending.
    return f"(?P<{name}>[^/.][^/]*?)"


def _other_folders(root: Path, description: Description) -> Iterator[tuple[str, str]]:
    """Names of subject folders with NIfTI files, whether or not their names fit."""
    patterns = (*description.modalities.values(), description.segmentation)
    folders = {p.strip().rpartition("/")[0] for pattern in patterns for p in pattern.split("|")}
    if "{subject}" not in folders:
        return
    for path in root.iterdir():
        if path.is_dir() and not path.name.startswith("."):
            try:
                if any(".nii" in file.name for file in path.iterdir()):
                    yield path.name, ""
            except OSError as error:
                yield path.name, str(error.strerror)


def _nothing_found(root: Path, candidates: list[Description]) -> str:
    lines = [f"{root}: expected a data set, found no image in any layout looked for:"]
    for candidate in candidates:
        modality, pattern = next(iter(candidate.modalities.items()))
        lines.append(f"  {candidate.name}: {modality} as {pattern}")
    below = [folder for folder in sorted(root.iterdir()) if folder.is_dir()]
    fitting = [f for f in below[:20] if any(_files(_subjects(f, c)) for c in candidates)]
    if fitting:
        lines.append(f"There are images in {fitting[0]}: give that folder instead.")
    else:
        lines.append("Check the path, or describe the data set: copy datasets/template.yaml.")
    return "\n".join(lines)


def file_states(subjects: Iterable[Subject]) -> States:
    """Return the present state of the subjects' files."""
    states: States = {}
    for subject in subjects:
        own = states.setdefault(subject.name, {})
        for file in subject.files.values():
            try:
                status = file.path.stat()
                own[str(file.path)] = [status.st_size, status.st_mtime_ns]
            except OSError:
                own[str(file.path)] = [-1, -1]
    return states


def changed_files(before: Mapping[str, Any], now: States) -> list[str]:
    """Return the paths of files that are others than before, or new, or gone."""
    found = []
    for subject, files in now.items():
        known = before.get(subject, files)
        known = known if isinstance(known, dict) else {}
        found += [str(path) for path in {**files, **known} if files.get(path) != known.get(path)]
    return found
