"""Images that are to be segmented: files, folders and modalities by name, as subjects."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from kdnet.data.description import DATASETS_FOLDER, Description, load_description
from kdnet.data.subjects import BUILT_IN, ImageFile, Subject, find_subjects
from kdnet.errors import UserError

NIFTI_SUFFIXES = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Inputs:
    """Finds what a network is to be given.

    Attributes:
        description: Of the data that it was trained on.
        modalities: What is read, in channel order.
        any_subset: Whether some of these are enough.
    """

    description: Description
    modalities: tuple[str, ...]
    any_subset: bool = False

    def find(self, inputs: Sequence[str]) -> list[Subject]:
        """Find the subjects that the arguments of --input name."""
        named = [self._split(text) for text in inputs]
        if any(modality is not None for modality, _ in named):
            return [self._one_subject(named)]
        return [
            subject
            for _, path in named
            for subject in (self._in_folder(path) if path.is_dir() else [self._lone_file(path)])
        ]

    def present(self, subject: Subject) -> tuple[str, ...]:
        """Return what the network is given of a subject, in channel order."""
        return tuple(name for name in self.modalities if name in subject.images)

    def first(self, subject: Subject) -> Path:
        """Return the file that label maps are named after."""
        return subject.images[self.present(subject)[0]].path

    def _split(self, text: str) -> tuple[str | None, Path]:
        name, equals, path = text.partition("=")
        # A file name may hold an equals sign itself.
        if not equals or Path(text).exists():
            return None, Path(text)
        known = self.description.modalities
        if name not in known:
            expected = f"one of {', '.join(known)} before '='"
            raise UserError(f"--input {text}: expected {expected}, found '{name}'.")
        return name, Path(path)

    def _one_subject(self, named: Sequence[tuple[str | None, Path]]) -> Subject:
        images = {name: self._image(path, name) for name, path in named if name is not None}
        subject = Subject(name="", images=images)
        present = self.present(subject)
        enough = bool(present) if self.any_subset else present == self.modalities
        if len(images) < len(named) or not enough:
            which = f"{'any' if self.any_subset else 'each'} of {', '.join(self.modalities)}"
            given = ", ".join(f"{name or '?'}={path}" for name, path in named)
            raise UserError(f"--input: expected {which} once as MODALITY=FILE, found {given}.")
        return replace(subject, name=stem_of(self.first(subject)))

    def _lone_file(self, path: Path) -> Subject:
        """A file whose modality is told by its name, or is the only one that the network sees."""
        said = self._said_by_name(path)
        fitting = [name for name in self.modalities if name in said]
        alone = len(self.modalities) == 1
        if alone and not said:
            # Nothing else can be meant; another modality's name would be a mistake.
            fitting = [*self.modalities]
        if len(fitting) != 1 or not (alone or self.any_subset):
            wanted = " ".join(f"--input {name}=FILE" for name in self.modalities)
            found = f"found one of {', '.join(sorted(said)) or 'no known name'}"
            raise UserError(f"--input {path}: {found}. Give {wanted}, or a folder of subjects.")
        return Subject(stem_of(path), {fitting[0]: self._image(path, fitting[0])})

    def _image(self, path: Path, modality: str) -> ImageFile:
        if not path.is_file() or not path.name.endswith(NIFTI_SUFFIXES):
            found = path.name if path.exists() else "nothing there"
            raise UserError(f"--input {path}: expected a NIfTI file or a folder, found {found}.")
        return ImageFile(path, self.description.channels.get(modality))

    def _in_folder(self, folder: Path) -> list[Subject]:
        """Subjects of the training data's layout, of a BraTS layout, or lone files."""
        images = [path for path in sorted(folder.iterdir()) if _is_image(path)]
        layouts = [_subjects_of(folder, description) for description in self._layouts()]
        # Where only other modalities are found, the subjects are kept for the checks to report.
        best = max(layouts, key=self._worth, default=[])
        if not best and not images:
            wanted = self.description.modalities[self.modalities[0]]
            raise UserError(
                f"--input {folder}: expected NIfTI files or subject folders as in BraTS, MSD or "
                f"the training data ({wanted}); found none."
            )
        if not best:
            return [self._lone_file(path) for path in images]
        used = {file.path for subject in best for file in subject.images.values()}
        left = [path.name for path in images if path not in used]
        # Files that were passed over in silence would be missed by nobody until it is too late.
        if left:
            names = ", ".join(left[:5])
            raise UserError(f"--input {folder}: {len(left)} files fit no subject: {names}.")
        # A label map beside the images is no input, and need not be sound.
        return [replace(subject, segmentation=None) for subject in best]

    def _worth(self, subjects: Sequence[Subject]) -> tuple[int, bool]:
        """How many files the network can use, and whether there are any."""
        return sum(len(self.present(subject)) for subject in subjects), bool(subjects)

    def _layouts(self) -> Iterator[Description]:
        built_in = [load_description(DATASETS_FOLDER / f"{name}.yaml") for name in BUILT_IN]
        every = [self.description, *built_in]
        named = [layout for layout in every if {*self.modalities} <= {*layout.modalities}]
        yield from named
        # The same names without subject folders: all files side by side.
        for layout in named:
            yield from _flattened(layout)

    def _said_by_name(self, path: Path) -> set[str]:
        """What a file is by its name, in any layout; empty if the name does not say."""
        return {
            modality
            for layout in self._layouts()
            for modality, pattern in layout.modalities.items()
            for part in pattern.split("|")
            if not layout.channels
            and fnmatch(path.name, re.sub(r"\{[^}]*\}", "?*", _file_part(part)))
        }


def stem_of(path: Path) -> str:
    """Return the name of a volume's file without its ending."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _subjects_of(folder: Path, description: Description) -> list[Subject]:
    try:
        return find_subjects(folder, description)[1]
    # Other layouts are tried; the user is told if none fits.
    except UserError:
        return []


def _flattened(description: Description) -> Iterator[Description]:
    patterns = {
        # Where folders alone name subjects, files side by side cannot be told apart.
        name: "|".join(part for part in map(_file_part, pattern.split("|")) if "{subject}" in part)
        for name, pattern in description.modalities.items()
    }
    if all(patterns.values()) and not description.channels:
        # A pattern that finds no label map, since one beside the images is none of theirs.
        yield replace(description, modalities=patterns, segmentation="{subject}_no_label_map.nii")


def _file_part(pattern: str) -> str:
    return pattern.strip().rpartition("/")[2]


def _is_image(path: Path) -> bool:
    hidden, label_map = path.name.startswith("."), stem_of(path).endswith("_seg")
    return path.name.endswith(NIFTI_SUFFIXES) and path.is_file() and not hidden and not label_map
