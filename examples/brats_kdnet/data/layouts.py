"""Finding the subjects of a data set on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data.description import DATASETS_FOLDER, Description, load_description
from errors import UserError

#: Written by the phantom generator into the root of what it made.
PHANTOM_MARKER = "phantom.json"

#: Looked for in this order; of two layouts that fit equally well the first is taken.
BUILT_IN = ("brats2021", "brats2018", "brats2023", "msd_task01")

_PLACEHOLDER = re.compile(r"\{(subject|grade)(?::([^}]*))?\}|\*|\?|\[[^\]]+\]")


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
    """

    name: str
    images: dict[str, ImageFile]
    segmentation: ImageFile | None = None
    grade: str | None = None


def find_subjects(
    root: Path, description: Description | None = None
) -> tuple[Description, list[Subject]]:
    """Find every subject below a folder.

    Args:
        root: The folder that holds the data set.
        description: What to look for; None tries the layouts of BraTS 2018 to 2023 and of the
            Medical Segmentation Decathlon, and takes the one that fits most files.

    Returns:
        The description (marked as phantom where the files are) and the subjects sorted by name.

    Raises:
        UserError: If the folder does not exist or no layout fits, naming all that were tried; if
            two files claim the same modality of one subject.
    """
    root = Path(root)
    if not root.is_dir():
        there = "a file" if root.exists() else "nothing"
        raise UserError(f"{root}: expected the folder of a data set, found {there}.")
    candidates = _candidates(root) if description is None else [description]
    found = [(candidate, _subjects(root, candidate)) for candidate in candidates]
    best, subjects = max(found, key=lambda pair: _files(pair[1]))
    if not _files(subjects):
        raise UserError(_nothing_found(root, candidates))
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
    images = {
        modality: _matches(root, pattern) for modality, pattern in description.modalities.items()
    }
    segmentations = _matches(root, description.segmentation)
    names: dict[str, str | None] = dict.fromkeys(_other_folders(root, description))
    for matches in (*images.values(), segmentations):
        names.update({name: grade for name, (_, grade) in matches.items()})
    return [
        Subject(
            name=name,
            images={
                modality: ImageFile(matches[name][0], description.channels.get(modality))
                for modality, matches in images.items()
                if name in matches
            },
            segmentation=ImageFile(segmentations[name][0]) if name in segmentations else None,
            grade=grade,
        )
        for name, grade in sorted(names.items())
    ]


def _matches(root: Path, pattern: str) -> dict[str, tuple[Path, str | None]]:
    """Subject name to the file that fits a pattern and the stratum it lies in."""
    matches: dict[str, tuple[Path, str | None]] = {}
    for alternative in pattern.split("|"):
        earlier = set(matches)
        for name, grade, path in _alternative_matches(root, alternative.strip()):
            if name in earlier:
                continue
            if name in matches:
                raise UserError(
                    f"Subject '{name}': expected one file for the pattern '{alternative}', found "
                    f"{matches[name][0]} and {path}. Remove one, or make the pattern stricter."
                )
            matches[name] = (path, grade)
    return matches


def _alternative_matches(root: Path, pattern: str) -> Iterator[tuple[str, str | None, Path]]:
    expression = re.compile(_to_expression(pattern))
    for path in sorted(root.glob(re.sub(r"\{[^}]*\}", "*", pattern))):
        match = expression.fullmatch(path.relative_to(root).as_posix())
        # Names that start with a dot are what file managers and archivers leave behind.
        if match and not path.name.startswith("."):
            groups = match.groupdict()
            yield groups["subject"], groups.get("grade"), path


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
    # A dot is not part of a subject's name, so that "{subject}.nii*" stops before the ending.
    return f"(?P<{name}>[^/.][^/]*?)"


def _other_folders(root: Path, description: Description) -> Iterator[str]:
    """Names of subject folders with NIfTI files, whether or not their names fit.

    A folder in which no file name fits is a mistake to report, not a subject to forget.
    """
    patterns = (*description.modalities.values(), description.segmentation)
    folders = {p.strip().rpartition("/")[0] for pattern in patterns for p in pattern.split("|")}
    for folder in folders:
        if folder == "{subject}":
            yield from (
                path.name
                for path in root.iterdir()
                if path.is_dir() and not path.name.startswith(".") and any(path.glob("*.nii*"))
            )


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
