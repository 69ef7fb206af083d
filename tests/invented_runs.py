"""Folders of runs and cross-validations that are invented: no number comes from a training."""

import json
from dataclasses import replace
from itertools import product

import nibabel as nib
import numpy as np
import yaml

from kdnet.data.subjects import find_subjects
from kdnet.evaluation.scoring import Score, write_scores
from kdnet.models import build_network
from kdnet.results.slices import save_slices
from kdnet.studies.facts import Facts, write_facts
from kdnet.studies.rows import StudyRow, write_rows
from kdnet.training.checkpoint import ModelMetadata, save_model

REGIONS = ("ET", "TC", "WT")
ROLES = ("teacher", "baseline", "student")
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def invented_scores(cases=8, gain=0.05, unit="mm", rows=ROLES, first=0):
    """Scores of a baseline, of a teacher, and of networks that are better by about `gain`."""
    generator = np.random.default_rng(first)
    scores = []
    for index in range(first, first + cases):
        base = float(generator.uniform(0.4, 0.6))
        for row in rows:
            noise = float(generator.normal(0, 0.01))
            dice = {"teacher": 0.9, "baseline": base}.get(row, base + gain + noise)
            for region in REGIONS:
                empty = region == "ET" and index == 0
                value = Score(
                    role=row,
                    case=f"Case_{index}",
                    region=region,
                    space="native",
                    dice=0.0 if empty else dice,
                    dice_reference_present=float("nan") if empty else dice,
                    hd95=4.0,
                    hd95_unit=unit,
                    reference_voxels=0 if empty else 50,
                    predicted_voxels=40,
                )
                scores += [replace(value, space="grid"), value]
    return scores


def write_data(root, names):
    """Subjects of 24 x 20 x 10 voxels with nested boxes as tumour."""
    labels = np.zeros((24, 20, 10), dtype=np.int16)
    labels[8:14, 6:12, 3:7] = 2
    labels[9:12, 8:11, 4:6] = 4
    for name in names:
        (root / name).mkdir(parents=True)
        for modality in ("flair", "t1", "t1ce", "t2"):
            grey = np.zeros(labels.shape, dtype=np.int16)
            grey[3:20, 2:18] = 100 + 50 * labels[3:20, 2:18] + 10 * np.arange(10)
            nib.save(nib.Nifti1Image(grey, AFFINE), root / name / f"{name}_{modality}.nii.gz")
        nib.save(nib.Nifti1Image(labels, AFFINE), root / name / f"{name}_seg.nii.gz")
    return labels


def write_role(run, role, description):
    """A model file and a history."""
    view = tuple(description.modalities) if role.startswith("teacher") else ("t1ce",)
    arguments = {"channels": [2, 4], "skip_connections": 1}
    described = ModelMetadata(
        role=role,
        backbone="kdnet",
        backbone_arguments=arguments,
        in_channels=len(view),
        out_channels=4,
        modalities=view,
        activation="softmax",
        description=description,
        crop=None,
        grid=(16, 16, 16),
        epoch=3,
        phantom=description.phantom,
    )
    network = build_network("kdnet", arguments, in_channels=len(view), out_channels=4)
    (run / role).mkdir(parents=True, exist_ok=True)
    save_model(run / role / "model.safetensors", network, described)
    header = "epoch,step,learning_rate,seconds,train_loss,train_ground_truth,"
    header += "validation_loss,validation_dice\n"
    rows = "".join(f"{e},{e},0.001,1.5,{1 / e},{2 / e},{1.1 / e},{1 - 1 / e}\n" for e in (1, 2, 3))
    (run / role / "history.csv").write_text(header + rows)


def write_predictions(folder, rows, names, labels):
    """Label maps that equal the reference but for one more row of voxels per network."""
    for place, row in enumerate(rows):
        for name in names:
            predicted = labels.astype(np.uint8)
            predicted[14 + place, 6:12, 3:7] = 2
            path = folder / row / f"{name}_seg.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(predicted, AFFINE), path)


def write_run(run, description, config=None):
    """The folder of one finished run with eight held-out cases."""
    names = [f"Case_{index}" for index in range(8)]
    labels = write_data(run.parent / "data", names)
    scores = invented_scores()
    for role in ROLES:
        write_role(run, role, description)
    write_predictions(run / "predictions", ROLES, names, labels)
    write_scores(run / "scores.csv", scores)
    settings = {"preset": "demo", "folds": 3, "fold": 0, "temperature": 5.0} | (config or {})
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "environment.json").write_text(json.dumps({"versions": {"torch": "2.x"}, "seed": 7}))
    parts = {"train": ["Case_a", "Case_b"], "validation": ["Case_c"], "test": names}
    (run / "cases.json").write_text(json.dumps(parts))
    summary = {"seconds": {"teacher": 61.0, "student": 8.25}, "peak_mib": {"process": 1234.0}}
    (run / "summary.json").write_text(json.dumps(summary))
    subjects = {s.name: s for s in find_subjects(run.parent / "data", description)[1]}
    save_slices(
        run / "slices.npz",
        subjects,
        description,
        run / "predictions",
        scores,
        modality="t1ce",
    )
    return run


def write_crossval(
    root, description, rows=("teacher", "baseline", "kdnet"), folds=3, cases=4, seeds=(0,)
):
    """The folder of a finished cross-validation; its images lie in `data` beside it."""
    names = [f"Case_{index}" for index in range(folds * cases)]
    data = root.parent / "data"
    labels = write_data(data, names)
    scores = []
    for fold in range(folds):
        held_out = names[fold * cases : (fold + 1) * cases]
        for seed in seeds:
            run = root / f"fold{fold}-seed{seed}"
            for row in rows:
                write_role(run, row, description)
                (run / row / "summary.json").write_text('{"total_seconds": 61.0}')
                (run / row / "scores.csv").touch()
            write_predictions(run / "predictions", rows, held_out, labels)
            (run / "cases.json").write_text(json.dumps({"train": [], "test": held_out}))
            gain = 0.05 + 0.01 * seed
            fresh = invented_scores(cases, gain, rows=rows, first=fold * cases)
            scores += [replace(score, fold=fold, seed=seed) for score in fresh]
    write_scores(root / "scores.csv", scores)
    config = {"data_root": str(data), "student_modalities": ["t1ce"], "folds": folds}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    (root / "description.json").write_text(json.dumps(description.to_dict()))
    (root / "environment.json").write_text(json.dumps({"versions": {"torch": "2.x"}}))
    facts = {
        "rows": list(rows),
        "labels": {"kdnet": "KD-Net (GT+KL+KD)"},
        "folds": folds,
        "seeds": list(seeds),
        "dataset": description.name,
        "phantom": description.phantom,
        "protocol": f"{description.name}, {len(names)} cases, {folds} folds, 3 epochs",
    }
    (root / "crossval.json").write_text(json.dumps(facts))
    return root


def invented_study(
    gains=None,
    *,
    cases=20,
    folds=2,
    seeds=(0, 1),
    regions=("tumour",),
    labelled=(8, 20),
    noise=0.02,
):
    """Rows of a study in which a kind gains what `gains` says, give or take noise.

    Every row is there with each number of labelled subjects; with fewer than most, the rest is
    unlabelled for the students.
    """
    generator = np.random.default_rng(7)
    gains = {"chosen": 0.1} if gains is None else gains
    ease = generator.uniform(0.2, 0.5, size=cases)
    rows = []
    for count in labelled:
        for kind, gain in {"baseline": 0.0, **gains, "teacher": 0.3}.items():
            rest = max(labelled) - count if kind in gains else 0
            for index, seed, region in product(range(cases), seeds, regions):
                base = StudyRow(
                    study="invented",
                    row=f"{count}-of-{max(labelled)}_{kind}",
                    kind=kind,
                    labelled=count,
                    unlabelled=rest,
                    fold=index % folds,
                    seed=seed,
                    case=f"Case_{index:02d}",
                    region=region,
                    space="native",
                    dice=float(ease[index] + 0.005 * count + gain + generator.normal(0, noise)),
                    steps=10 * (count + rest),
                )
                rows += [base, replace(base, space="grid", dice=base.dice + 0.01)]
    return rows


def invented_facts(**changes):
    """What an invented study is about."""
    labels = {"baseline": "baseline", "chosen": "chosen recipe", "teacher": "teacher"}
    protocol = "Invented numbers, two folds."
    return replace(Facts("invented", "Nothing", protocol, labels), **changes)


def write_invented_study(folder, rows=None, **changes):
    """The folder of an invented study."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.csv", invented_study() if rows is None else rows)
    write_facts(folder / "study.json", invented_facts(**changes))
    return folder
