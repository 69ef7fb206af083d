"""Finding the subjects of a data set on disk, and whether their files stay what they were."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdnet.data.description import DATASETS_FOLDER, Description, load_description
from kdnet.errors import UserError

#: Written by the phantom generator into the root of what it made.
PHANTOM_MARKER = "phantom.json"

#: Looked for in this order; of two layouts that fit equally well the first is taken.
BUILT_IN = ("brats2021", "brats2018", "brats2023", "msd_task01", "bids")

#: What `Subject.files` and `Subject.rivals` call the label map.
SEGMENTATION = "segmentation"

#: Size in bytes and time of change in ns of every file, by subject and path.
States = dict[str, dict[str, list[int]]]

#: What a pattern consists of: placeholders, wildcards, and letters that stand for themselves.
_TOKEN = re.compile(
    r"\{(?P<name>subject|session|grade|patient)(?::(?P<words>[^}]*))?\}"
    r"|(?P<wildcard>\*|\?|\[[^\]]+\])|.",
    re.DOTALL,
)
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
            tell which is meant, so the checks report them.
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
    """Find every subject below a folder, in the layout that explains most of its files."""
    root = Path(root)
    if not root.is_dir():
        there = "a file" if root.exists() else "nothing"
        raise UserError(f"{root}: expected the folder of a data set, found {there}.")
    phantom = (root / PHANTOM_MARKER).exists()
    layouts = [description] if description is not None else _built_in(phantom=phantom)
    found = [(layout, _subjects(root, layout)) for layout in layouts]
    best, subjects = max(found, key=lambda pair: _images(pair[1]))
    if not _images(subjects):
        raise UserError(_nothing_found(root, layouts))
    # Each channel would be taken for a subject, and read as one 4-D file.
    if best.channels and any(_CHANNEL.fullmatch(subject.name) for subject in subjects):
        raise UserError(
            f"{root}: expected one 4-D file per subject ({best.name}), found files of one channel "
            f"each, such as {subjects[-1].name}, as nnU-Net lays them out. Compare the numbers in "
            "datasets/nnunet.yaml with `channel_names` in its dataset.json, then give "
            "--description nnunet."
        )
    # Whatever description was given: no result on phantoms may be taken for one on patients.
    return (replace(best, phantom=True) if phantom else best), subjects


def _built_in(*, phantom: bool) -> list[Description]:
    # Phantoms lie in the layout of BraTS 2021, but are not it.
    names = ("phantom",) if phantom else BUILT_IN
    return [load_description(DATASETS_FOLDER / f"{name}.yaml") for name in names]


def _images(subjects: Sequence[Subject]) -> int:
    return sum(len(subject.images) for subject in subjects)


def _subjects(root: Path, description: Description) -> list[Subject]:
    """Every subject of whom at least one image was found, or whose folder holds other images."""
    found = {role: _matches(root, pattern) for role, pattern in description.patterns.items()}
    # A folder whose files are all misnamed would else be missed without a word.
    unlisted = dict(_other_folders(root, description))
    parts: dict[str, dict[str, str]] = {name: {} for name in unlisted}
    for matches in found.values():
        parts |= {name: claims[0][1] for name, claims in matches.items()}
    subjects = []
    for name in sorted(parts):
        paths = {
            role: [path for path, _ in matches[name]]
            for role, matches in found.items()
            if name in matches
        }
        channels = description.channels
        files = {role: ImageFile(own[0], channels.get(role)) for role, own in paths.items()}
        segmentation = files.pop(SEGMENTATION, None)
        subjects.append(
            Subject(
                name,
                files,
                segmentation,
                grade=parts[name].get("grade"),
                rivals={role: tuple(own[1:]) for role, own in paths.items() if own[1:]},
                unlisted=unlisted.get(name, ""),
                patient=_patient(name, parts[name], description),
            )
        )
    return subjects


def _patient(name: str, parts: Mapping[str, str], description: Description) -> str:
    """Whose visit a subject is; where folders of visits tell, that is not guessed from its name."""
    told = "" if description.patient or not description.visits else parts.get("subject", name)
    return told or patient_of(name, description.patient)


def check_patients(subjects: Iterable[Subject], description: Description) -> str:
    """Refuse a pattern of patients that fits no subject; say how many it does not fit."""
    pattern, names = description.patient, [subject.name for subject in subjects]
    strange = [name for name in names if pattern and not _fits(name, pattern)]
    if not strange:
        return ""
    text = f"the pattern of patients, '{pattern}', fits {len(names) - len(strange)} of {len(names)}"
    told = f"{description.name}: {text} subjects, and not {', '.join(sorted(strange)[:5])}"
    if len(strange) == len(names):
        raise UserError(
            f"{told}, so that visits of one patient could train and test. Correct `patient` in "
            "the description, or leave it out if nobody came twice."
        )
    return f"{told}; each of those is taken for a patient of its own."


def _fits(name: str, pattern: str) -> bool:
    return re.fullmatch(_to_expression(pattern), name) is not None


def _matches(root: Path, pattern: str) -> dict[str, list[tuple[Path, dict[str, str]]]]:
    """Subject name to the files that fit a pattern, each with what its placeholders stand for."""
    matches: dict[str, list[tuple[Path, dict[str, str]]]] = {}
    for alternative in map(str.strip, pattern.split("|")):
        earlier = {*matches}
        expression = re.compile(_to_expression(alternative))
        # A star beside a placeholder is one star, as two would mean any depth.
        for path in sorted(root.glob(re.sub(r"(\{[^}]*\}|\*)+", "*", alternative))):
            match = expression.fullmatch(path.relative_to(root).as_posix())
            # Names that start with a dot are what file managers and archivers leave behind.
            if match is None or path.name.startswith("."):
                continue
            parts = match.groupdict()
            # The last underscore of a name then parts the two, whatever folders are called.
            session = (parts.get("session") or "").replace("_", "-")
            name = "_".join(filter(None, (parts["subject"], session)))
            if name not in earlier:
                matches.setdefault(name, []).append((path, parts))
    return matches


def _to_expression(pattern: str) -> str:
    """A glob pattern with placeholders as a regular expression with named groups."""
    seen: set[str] = set()

    def expression_of(token: re.Match[str]) -> str:
        name, words, wildcard = token.group("name", "words", "wildcard")
        if wildcard:
            return {"*": "[^/]*", "?": "[^/]"}.get(wildcard, wildcard)
        if name is None:
            return re.escape(token[0])
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        if words:
            return f"(?P<{name}>{'|'.join(map(re.escape, words.split(',')))})"
        if name == "patient":
            return "(?P<patient>[^/]+)"
        # A dot is not part of a subject's name, so that "{subject}.nii*" stops before the ending.
        return f"(?P<{name}>[^/.][^/]*?)"

    return _TOKEN.sub(expression_of, pattern)


def _other_folders(root: Path, description: Description) -> Iterator[tuple[str, str]]:
    """Names of subject folders with NIfTI files, whether or not their names fit."""
    patterns = "|".join(description.patterns.values()).split("|")
    if "{subject}" not in {pattern.strip().rpartition("/")[0] for pattern in patterns}:
        return
    for path in root.iterdir():
        if path.is_dir() and not path.name.startswith("."):
            try:
                if any(".nii" in file.name for file in path.iterdir()):
                    yield path.name, ""
            except OSError as error:
                yield path.name, str(error.strerror)


def _nothing_found(root: Path, layouts: Sequence[Description]) -> str:
    lines = [f"{root}: expected a data set, found no image in any layout looked for:"]
    for layout in layouts:
        modality, pattern = next(iter(layout.modalities.items()))
        lines.append(f"  {layout.name}: {modality} as {pattern}")
    lines.append("Check the path, or describe the data set: copy datasets/template.yaml.")
    # The folder above, or one inside, is what people give by mistake.
    for folder in sorted(path for path in root.iterdir() if path.is_dir())[:20]:
        if any(_images(_subjects(folder, layout)) for layout in layouts):
            lines[-1] = f"There are images in {folder}: give that folder instead."
            break
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
        # A subject that a further fold brings was not looked at before.
        known = before.get(subject, files)
        known = known if isinstance(known, dict) else {}
        found += [str(path) for path in {**files, **known} if files.get(path) != known.get(path)]
    return found
