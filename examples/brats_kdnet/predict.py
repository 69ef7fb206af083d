"""Segment images with a trained network: no teacher, no reference segmentation needed.

    python predict.py --model MODEL --input case_t1ce.nii.gz --out DIR
    python predict.py --model MODEL --input FOLDER --out DIR
    python predict.py --model MODEL --input t1ce=a.nii.gz --input flair=b.nii.gz --out DIR
    python predict.py --model HEMIS --input FOLDER --modalities t1ce --out DIR
    python predict.py --model student.onnx --input FOLDER --out DIR

A folder holds subject folders in a BraTS layout or in that of the training data, or the files
themselves. Label maps lie on the original grid, with the original affine and the label values of
the training data: `<stem of the first modality's file>_seg.nii.gz`, with `<subject>_` before it
where the stem does not begin with the subject's name.

A network that was trained for any subset of modalities (recipe missing_modality of crossval.py)
takes what each subject has, and the modalities that are used are shown. A file given alone is a
subject of its own. --modalities reads no others than it names.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from kdnet.command import add_trust, console, documented, exit_status
from kdnet.data.checks import Problem, check_subjects, listed, raise_for_problems, unlike_training
from kdnet.data.inputs import Inputs, stem_of
from kdnet.data.subjects import Subject
from kdnet.data.volumes import read_geometry
from kdnet.errors import UserError
from kdnet.evaluation.inference import (
    native_classes,
    predict_finite,
    volume_predictor,
    write_label_map,
)
from kdnet.exported import open_model
from kdnet.training.checkpoint import ModelMetadata


def predict(options: argparse.Namespace, console: Console) -> None:
    """Segment every input; nothing is written unless all of them can be used."""
    out: Path = options.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: expected a folder, found the file {out}.")
    network, metadata = open_model(
        options.model, trusted=options.trust_backbone, trust_program=options.trust_program
    )
    if metadata.description.phantom:
        console.out("The model was trained on phantoms: its label maps mean nothing in patients.")
    modalities = chosen_modalities(options.modalities, metadata)
    inputs = Inputs(metadata.description, modalities, metadata.any_subset)
    subjects = inputs.find(options.input)
    # Before images are read: what cannot be written need not be looked at.
    names = output_names(subjects, inputs)
    check(subjects, inputs, metadata, console, strict=options.strict)
    device = place_on(network.eval(), options.device)
    run = volume_predictor(
        network, device, metadata.example, patch=metadata.patch, slices=metadata.slices
    )
    pairs, quiet = [*zip(subjects, names, strict=True)], not console.is_terminal
    for subject, name in track(pairs, "Segmenting", console=console, disable=quiet):
        present = inputs.present(subject)
        if metadata.any_subset:
            console.out(f"Uses {'+'.join(present)} of {subject.name}")
        segment(run, subject, out / name, metadata, present)
    what = "1 label map" if len(subjects) == 1 else f"{len(subjects)} label maps"
    console.out(f"{what} in {out}")


def chosen_modalities(wanted: Sequence[str], metadata: ModelMetadata) -> tuple[str, ...]:
    """Return what is read, in channel order; refuse a choice that the network lacks."""
    own = metadata.modalities
    if not {*wanted} <= {*own}:
        raise UserError(
            f"--modalities: this network sees {', '.join(own)}, found {', '.join(wanted)}."
        )
    if wanted and not metadata.any_subset and {*wanted} != {*own}:
        raise UserError(f"--modalities: this network needs all that it sees, {', '.join(own)}.")
    return tuple(name for name in own if name in wanted) if wanted else own


def check(
    subjects: Sequence[Subject],
    inputs: Inputs,
    metadata: ModelMetadata,
    console: Console,
    *,
    strict: bool,
) -> None:
    """Refuse what cannot be segmented, and say what looks unlike the images of training."""
    problems: list[Problem] = []
    for subject in track(subjects, "Checking", console=console, disable=not console.is_terminal):
        # All that is read must be there, or for any subset what there is of it.
        present = inputs.present(subject) if inputs.any_subset else ()
        # Each alone: the same image may be segmented twice, and training says what is usual.
        problems += check_subjects(
            metadata.description,
            [subject],
            workers=1,
            progress=False,
            need_segmentation=False,
            modalities=present or inputs.modalities,
            typical=dict(zip(metadata.modalities, metadata.nonzero, strict=False)),
        )
    raise_for_problems(problems)
    # Headers are known to be sound from here on.
    spacing = metadata.spacing if metadata.description.spacing == "header" else ()
    problems += unlike_training(subjects, inputs.modalities, metadata.orientation, spacing)
    # Voxels of 6 mm, or a skull, give a label map as willingly as a fitting image does.
    raise_for_problems(problems, strict=strict)
    if problems:
        said = f"These may be segmented wrongly; --strict refuses them.\n{listed(problems)}"
        console.out(said)


def output_names(subjects: Sequence[Subject], inputs: Inputs) -> list[str]:
    """File names of the label maps."""
    # Files of other modalities alone are told by the checks.
    known = [subject for subject in subjects if inputs.present(subject)]
    stems = [(subject.name, stem_of(inputs.first(subject))) for subject in known]
    # Where folders alone name subjects, all files are called alike.
    named = [stem if stem.startswith(name) else f"{name}_{stem}" for name, stem in stems]
    names = [f"{name}_seg.nii.gz" for name in named]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        listing = ", ".join(twice)
        raise UserError(f"--input: several inputs would be written to {listing}; call it for each.")
    return names


def place_on(network: nn.Module, device: str) -> torch.device:
    """Bring the network to a device, and return which that is."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        target = torch.device(name)
        network.to(target)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(f"--device {device} cannot be used: {error}") from error
    return target


def segment(
    run: Callable[[Tensor], Tensor],
    subject: Subject,
    target: Path,
    metadata: ModelMetadata,
    present: tuple[str, ...],
) -> None:
    """Write the label map of one subject on its own grid."""
    # Only what is there is read.
    preprocessing = replace(metadata, modalities=present).preprocessing()
    geometry = read_geometry(subject.images[present[0]])
    image = preprocessing(subject)["image"]
    # Modalities that are absent are zero, as in training.
    every = image.new_zeros(len(metadata.modalities), *image.shape[1:])
    every[[metadata.modalities.index(name) for name in present]] = image
    logits = predict_finite(run, every, subject.name)
    classes = native_classes(logits, geometry.shape, preprocessing, metadata.activation)
    write_label_map(target, classes, geometry, metadata.description)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and segment."""
    options = parser().parse_args(arguments)
    return exit_status(lambda: predict(options, console()))


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    found = documented(__doc__)
    add = found.add_argument
    add("--model", type=Path, required=True, help="model.safetensors of a run")
    add(
        "--input",
        action="extend",
        nargs="+",
        required=True,
        metavar="PATH | MODALITY=FILE",
        help="files, folders, or the modalities of one subject by name",
    )
    add("--out", type=Path, required=True, help="folder for the label maps")
    add(
        "--modalities",
        type=lambda text: [name.strip() for name in text.split(",")],
        default=(),
        metavar="NAME,NAME",
        help="read these alone, with a network for any subset of modalities (default: all it sees)",
    )
    add_trust(found)
    add(
        *("--trust-program", "--trust_program"),
        action="store_true",
        help="open a .pt2 although a file of somebody else could run any code",
    )
    add(
        "--strict",
        action="store_true",
        help="refuse images that look unlike those of training: voxel size, share of non-zero "
        "voxels, background",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1; a .pt2 or .onnx runs on the CPU")
    return found


if __name__ == "__main__":
    sys.exit(main())
