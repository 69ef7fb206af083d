"""Segment images with a trained network: no teacher, no reference segmentation needed.

    python predict.py --model runs/demo/student/model.safetensors --input case_t1ce.nii.gz --out DIR
    python predict.py --model MODEL --input FOLDER --out DIR
    python predict.py --model MODEL --input t1ce=a.nii.gz --input flair=b.nii.gz --out DIR
    python predict.py --model HEMIS --input FOLDER --modalities t1ce --out DIR
    python predict.py --model student.onnx --input FOLDER --out DIR

A folder holds subject folders in a BraTS layout or in that of the training data, or the files
themselves. Label maps lie on the original grid, with the original affine and the label values of
the training data: `<stem of the first modality's file>_seg.nii.gz`.

A network that was trained for any subset of modalities (recipe missing_modality of crossval.py)
takes what each subject has, and the modalities that are used are shown. A file given alone is a
subject of its own. --modalities reads no others than it names.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from kdnet.data.checks import (
    Problem,
    check_subjects,
    problem_table,
    raise_for_problems,
    unlike_training,
)
from kdnet.data.description import DATASETS_FOLDER, Description, load_description
from kdnet.data.subjects import BUILT_IN, ImageFile, Subject, find_subjects
from kdnet.data.volumes import read_geometry
from kdnet.errors import UserError
from kdnet.evaluation.inference import volume_predictor
from kdnet.evaluation.label_maps import NIFTI_SUFFIXES, stem_of, write_label_map
from kdnet.evaluation.scoring import native_classes, predict_finite
from kdnet.exported import open_model
from kdnet.runs.command import exit_status
from kdnet.training.checkpoint import ModelMetadata
from privdistill import DistillationWrapper, GroundTruth


def find_inputs(inputs: Sequence[str], metadata: ModelMetadata) -> list[Subject]:
    """Find what is to be segmented."""
    named = [_split_name(text, metadata.description) for text in inputs]
    if any(modality is not None for modality, _ in named):
        return [_one_subject(named, metadata)]
    found: list[Subject] = []
    for _, path in named:
        found += _find_in_folder(path, metadata) if path.is_dir() else [_lone_file(path, metadata)]
    return found


def output_names(subjects: Sequence[Subject], metadata: ModelMetadata) -> list[str]:
    """File names of the label maps."""
    names = [f"{stem_of(_first(subject, metadata).path)}_seg.nii.gz" for subject in subjects]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"--input: several inputs would be written to {', '.join(twice)}. Expected files of "
            "different names; give them in separate calls with separate --out."
        )
    return names


def predict(
    model: Path,
    inputs: Sequence[str],
    out: Path,
    *,
    device: str,
    console: Console,
    modalities: Sequence[str] = (),
    trusted: Collection[str] = (),
    trust_program: bool = False,
    strict: bool = False,
) -> list[Path]:
    """Segment every input; nothing is written unless all of them can be used."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: expected a folder, found the file {out}.")
    network, metadata = open_model(model, trusted=trusted, trust_program=trust_program)
    if metadata.phantom:
        console.print(f"{model} was trained on phantoms: its label maps mean nothing in patients.")
    read = replace(metadata, modalities=_to_read(modalities, metadata))
    subjects = find_inputs(inputs, read)
    typical = dict(zip(metadata.modalities, metadata.nonzero, strict=False))
    problems = _problems(subjects, read, typical, progress=console.is_terminal)
    raise_for_problems(problems)
    if metadata.description.spacing == "header":
        problems += unlike_training(subjects, read.modalities, metadata.spacing)
    raise_for_problems(problems, strict=strict)
    if problems:
        console.print("These may be segmented wrongly; --strict refuses them.")
        console.print(problem_table(problems))
    _check_orientation(subjects, read)
    targets = [out / name for name in output_names(subjects, read)]
    if metadata.any_subset:
        _say_what_is_used(subjects, read, console)
    run = volume_predictor(_runner(network, device), patch=metadata.patch, slices=metadata.slices)
    with _progress(console) as bar:
        task = bar.add_task("Segmenting", total=len(subjects))
        for subject, target in zip(subjects, targets, strict=True):
            _segment(run, subject, target, metadata, _present(subject, read))
            bar.advance(task)
    return targets


def _to_read(wanted: Sequence[str], metadata: ModelMetadata) -> tuple[str, ...]:
    """The modalities that are read, in channel order; refuse a choice that the network lacks."""
    own = metadata.modalities
    unknown = [name for name in wanted if name not in own]
    if unknown:
        raise UserError(
            f"--modalities: this network sees {', '.join(own)}, found {', '.join(unknown)}."
        )
    if wanted and not metadata.any_subset and {*wanted} != {*own}:
        raise UserError(
            f"--modalities {','.join(wanted)}: this network needs all that it sees, "
            f"{', '.join(own)}. Only networks of the recipe missing_modality take fewer."
        )
    return tuple(name for name in own if name in wanted) if wanted else own


def _present(subject: Subject, metadata: ModelMetadata) -> tuple[str, ...]:
    """What the network is given of a subject, in channel order."""
    return tuple(name for name in metadata.modalities if name in subject.images)


def _first(subject: Subject, metadata: ModelMetadata) -> ImageFile:
    return subject.images[_present(subject, metadata)[0]]


def _by_view(
    subjects: Sequence[Subject], metadata: ModelMetadata
) -> dict[tuple[str, ...], list[Subject]]:
    """Subjects by what must be there: all that is read, or for any subset what there is of it."""
    groups: dict[tuple[str, ...], list[Subject]] = {}
    for subject in subjects:
        found = _present(subject, metadata) if metadata.any_subset else ()
        groups.setdefault(found or metadata.modalities, []).append(subject)
    return groups


def _problems(
    subjects: Sequence[Subject],
    metadata: ModelMetadata,
    typical: Mapping[str, float],
    *,
    progress: bool,
) -> list[Problem]:
    return [
        problem
        for view, group in _by_view(subjects, metadata).items()
        for problem in check_subjects(
            metadata.description,
            group,
            workers=1,
            progress=progress,
            need_segmentation=False,
            modalities=view,
            # The same image given twice is segmented twice.
            distinct=False,
            typical=typical,
        )
    ]


def _say_what_is_used(
    subjects: Sequence[Subject], metadata: ModelMetadata, console: Console
) -> None:
    for view, group in _by_view(subjects, metadata).items():
        names = ", ".join(subject.name for subject in group[:5])
        more = f" and {len(group) - 5} more" if len(group) > 5 else ""
        console.print(f"Uses {'+'.join(view)} of {names}{more}", highlight=False, soft_wrap=True)


def _check_orientation(subjects: Sequence[Subject], metadata: ModelMetadata) -> None:
    """Refuse volumes whose axes run otherwise than in training: the network never saw them so."""
    turned = {}
    for subject in subjects:
        file = _first(subject, metadata)
        found = read_geometry(file).orientation
        if metadata.orientation and found != metadata.orientation:
            turned[file.path.name] = found
    if turned:
        listed = ", ".join(f"{name} ({codes})" for name, codes in list(turned.items())[:5])
        raise UserError(
            f"--input: {len(turned)} volumes have other axes than the training data, which are "
            f"{metadata.orientation}: {listed}. Reorient them first, for example with "
            "nibabel.as_closest_canonical or fslreorient2std."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and segment."""
    options = _parser().parse_args(arguments)
    # Names of files are shown as they are, brackets and all.
    return exit_status(lambda: _predict(options, Console(markup=False)))


def _predict(options: argparse.Namespace, console: Console) -> None:
    written = predict(
        options.model,
        options.input,
        options.out,
        device=options.device,
        console=console,
        modalities=options.modalities,
        trusted=options.trust_backbone,
        trust_program=options.trust_program,
        strict=options.strict,
    )
    what = "1 label map" if len(written) == 1 else f"{len(written)} label maps"
    console.print(f"{what} in {options.out}", highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="model.safetensors of a run")
    parser.add_argument(
        "--input",
        action="extend",
        nargs="+",
        required=True,
        metavar="PATH | MODALITY=FILE",
        help="files, folders, or the modalities of one subject by name",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the label maps")
    parser.add_argument(
        "--modalities",
        type=lambda text: [name.strip() for name in text.split(",")],
        default=(),
        metavar="NAME,NAME",
        help="read these alone, with a network for any subset of modalities (default: all it sees)",
    )
    parser.add_argument(
        "--trust_backbone",
        "--trust-backbone",
        action="extend",
        nargs="+",
        default=[],
        metavar="IMPORT.PATH",
        help="a class that the model file may have imported, which runs its module; not needed "
        "for networks of this application and the usual ones of MONAI",
    )
    parser.add_argument(
        "--trust_program",
        "--trust-program",
        action="store_true",
        help="open a .pt2 although a file of somebody else could run any code",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse images that look unlike those of training: voxel size, share of non-zero "
        "voxels, background",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:1 (default: auto); a .pt2 and a .onnx run on the CPU",
    )
    return parser


def _split_name(text: str, description: Description) -> tuple[str | None, Path]:
    name, equals, path = text.partition("=")
    # A file name may hold an equals sign itself.
    if equals and not Path(text).exists():
        if name not in description.modalities:
            raise UserError(
                f"--input {text}: expected one of the modalities "
                f"{', '.join(description.modalities)} before '=', found '{name}'."
            )
        return name, Path(path)
    return None, Path(text)


def _one_subject(named: Sequence[tuple[str | None, Path]], metadata: ModelMetadata) -> Subject:
    images = {modality: _image(path, modality, metadata) for modality, path in named if modality}
    found = images.keys() & {*metadata.modalities}
    enough = bool(found) if metadata.any_subset else len(found) == len(metadata.modalities)
    if len(images) < len(named) or not enough:
        given = ", ".join(f"{modality or '?'}={path}" for modality, path in named)
        which = "any" if metadata.any_subset else "each"
        raise UserError(
            f"--input: expected {which} of {', '.join(metadata.modalities)} once as "
            f"MODALITY=FILE, found {given}."
        )
    subject = Subject(name="", images=images)
    return replace(subject, name=stem_of(_first(subject, metadata).path))


def _lone_file(path: Path, metadata: ModelMetadata) -> Subject:
    if len(metadata.modalities) > 1 and metadata.any_subset:
        return _lone_file_of_many(path, metadata)
    if len(metadata.modalities) > 1:
        wanted = " ".join(f"--input {name}=FILE" for name in metadata.modalities)
        raise UserError(
            f"--input {path}: this network sees {len(metadata.modalities)} modalities, so a lone "
            f"file is not enough; give {wanted}, or a folder of subjects."
        )
    modality = metadata.modalities[0]
    image = _image(path, modality, metadata)
    _check_modality(path, metadata)
    return Subject(name=stem_of(path), images={modality: image})


def _lone_file_of_many(path: Path, metadata: ModelMetadata) -> Subject:
    """A file of one of several modalities, for a network that takes any subset of them."""
    said = _named_modalities(path, metadata) & {*metadata.modalities}
    if path.is_file() and len(said) != 1:
        raise UserError(
            f"--input {path}: the name does not say which of {', '.join(metadata.modalities)} it "
            f"is. Give it as {metadata.modalities[0]}={path}, or whichever it is."
        )
    modality = next(iter(said), metadata.modalities[0])
    return Subject(name=stem_of(path), images={modality: _image(path, modality, metadata)})


def _image(path: Path, modality: str, metadata: ModelMetadata) -> ImageFile:
    if not path.is_file():
        raise UserError(f"--input {path}: expected a file or a folder, found nothing there.")
    if not path.name.endswith(NIFTI_SUFFIXES):
        raise UserError(f"--input {path}: expected a NIfTI file, .nii or .nii.gz.")
    return ImageFile(path, metadata.description.channels.get(modality))


def _find_in_folder(folder: Path, metadata: ModelMetadata) -> list[Subject]:
    """Subjects of the training data's layout, of a BraTS layout, or lone files."""
    best: list[Subject] = []
    for description in _layouts(metadata):
        try:
            _, subjects = find_subjects(folder, description)
        except UserError:
            continue
        if not best or _seen(subjects, metadata) > _seen(best, metadata):
            best = subjects
    # Where only other modalities are found, the subjects are kept for the checks to report.
    if best:
        used = {file.path for subject in best for file in subject.images.values()}
        left = sorted(p.name for p in folder.iterdir() if _is_image(p) and p not in used)
        if left:
            raise UserError(
                f"--input {folder}: {len(left)} files fit no subject: {', '.join(left[:5])}. Name "
                f"them like the others, or give them as {metadata.modalities[0]}=FILE."
            )
        return [replace(subject, segmentation=None) for subject in best]
    files = [path for path in sorted(folder.iterdir()) if _is_image(path)]
    if not files:
        raise UserError(
            f"--input {folder}: expected NIfTI files or subject folders with the modality "
            f"{metadata.modalities[0]}, found none. Layouts: BraTS 2018 to 2023, MSD Task01, that "
            "of the training data, or files of one modality side by side."
        )
    return [_lone_file(path, metadata) for path in files]


def _seen(subjects: Sequence[Subject], metadata: ModelMetadata) -> int:
    """Files that the network can use."""
    return sum(name in subject.images for subject in subjects for name in metadata.modalities)


def _layouts(metadata: ModelMetadata) -> Iterator[Description]:
    described = [metadata.description]
    described += [load_description(DATASETS_FOLDER / f"{name}.yaml") for name in BUILT_IN]
    named = [d for d in described if set(metadata.modalities) <= set(d.modalities)]
    yield from named
    # The same names without subject folders: all files side by side.
    yield from (_flattened(description) for description in named if not description.channels)


def _named_modalities(path: Path, metadata: ModelMetadata) -> set[str]:
    """What a file is by its name, in any layout; empty if the name does not say."""
    return {
        modality
        for description in _layouts(metadata)
        for modality, pattern in description.modalities.items()
        for part in pattern.split("|")
        if not description.channels
        and fnmatch(path.name, re.sub(r"\{[^}]*\}", "?*", part.strip().rpartition("/")[2]))
    }


def _check_modality(path: Path, metadata: ModelMetadata) -> None:
    """Refuse a file whose name says that it is another modality."""
    said = _named_modalities(path, metadata)
    if said and not said & set(metadata.modalities):
        wanted = metadata.modalities[0]
        raise UserError(
            f"--input {path}: expected an image of {wanted}, found one of {', '.join(said)} by "
            f"its name. If the name is wrong, give it as {wanted}={path}."
        )


def _flattened(description: Description) -> Description:
    patterns = {
        name: "|".join(part.strip().rpartition("/")[2] for part in pattern.split("|"))
        for name, pattern in description.modalities.items()
    }
    return replace(description, modalities=patterns, segmentation="{subject}_no_label_map.nii")


def _is_image(path: Path) -> bool:
    hidden, label_map = path.name.startswith("."), stem_of(path).endswith("_seg")
    return path.name.endswith(NIFTI_SUFFIXES) and path.is_file() and not hidden and not label_map


def _runner(network: nn.Module, device: str) -> Callable[[Tensor], Tensor]:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        target = torch.device(name)
        network = network.to(target).eval()
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(f"--device {device} cannot be used: {error}") from error
    # Any backbone's form of output is understood, as in training.
    distilled = DistillationWrapper(None, network, objective=GroundTruth())
    return lambda image: distilled.predict(image.to(target)).float().cpu()


def _segment(
    run: Callable[[Tensor], Tensor],
    subject: Subject,
    target: Path,
    metadata: ModelMetadata,
    present: Sequence[str],
) -> None:
    preprocessing = replace(metadata, modalities=tuple(present)).preprocessing()
    geometry = preprocessing.native_geometry(subject)
    image = _all_channels(preprocessing(subject)["image"], present, metadata)
    logits = predict_finite(run, image, subject.name)
    classes = native_classes(
        logits, geometry.shape, preprocessing, metadata.description, metadata.activation
    )
    write_label_map(
        target,
        classes,
        affine=geometry.affine,
        header=geometry.header,
        export_labels=metadata.description.export_labels,
        note="trained on phantoms" if metadata.phantom else "",
    )


def _all_channels(image: Tensor, present: Sequence[str], metadata: ModelMetadata) -> Tensor:
    """Put modalities into their channels, (M, *grid); absent ones are zero, as in training."""
    every = image.new_zeros(len(metadata.modalities), *image.shape[1:])
    every[[metadata.modalities.index(name) for name in present]] = image
    return every


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    sys.exit(main())
