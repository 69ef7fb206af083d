"""Folders of plans that are invented: no number comes from a training."""

import json
from dataclasses import replace
from itertools import product

import nibabel as nib
import numpy as np
import pandas as pd
import yaml
from quick import STUDENT

from kdnet.evaluation.scoring import COLUMNS, gather_scores, write_scores
from kdnet.runs.networks import build
from kdnet.training.checkpoint import save_model

REGIONS = ("ET", "TC", "WT")
ROLES = ("teacher", "baseline", "student")
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])
LABELS = {"kdnet": "KD-Net (GT+KL+KD)"}
PLAIN = {"fold": 0, "seed": 0, "labelled": 8, "unlabelled": 0, "postprocessing": "off"}


def line_of(row, case, dice, region="ET", **changes):
    """One line of a table of scores."""
    line = {
        "row": row,
        "against": "" if row in {"teacher", "baseline"} else "baseline",
        "case": case,
        "region": region,
        "space": "native",
        "modalities": "t1ce",
        "dice": dice,
        "dice_reference_present": dice,
        "hd95": 4.0,
        "hd95_unit": "mm",
        "nsd": float("nan"),
        "reference_voxels": 50,
        "predicted_voxels": 40,
    }
    return line | PLAIN | changes


def scores_of(row, values, region="ET", **changes):
    """Lines of one row: case to Dice."""
    lines = [line_of(row, case, dice, region, **changes) for case, dice in values.items()]
    return pd.DataFrame(lines, columns=[*COLUMNS])


def table(*parts):
    return pd.concat(parts, ignore_index=True)


def two_networks(differences, region="ET", **changes):
    """A student with these differences to a baseline of 0.5."""
    base = {f"c{index}": 0.5 for index in range(len(differences))}
    better = {f"c{index}": 0.5 + gain for index, gain in enumerate(differences)}
    return table(
        scores_of("baseline", base, region, **changes),
        scores_of("student", better, region, **changes),
    )


def invented_scores(cases=8, gain=0.05, rows=ROLES, first=0, **changes):
    """Scores of a baseline, of a teacher, and of networks that are better by about `gain`."""
    generator = np.random.default_rng(first)
    lines = []
    for index in range(first, first + cases):
        base = float(generator.uniform(0.4, 0.6))
        for row in rows:
            noise = float(generator.normal(0, 0.01))
            dice = {"teacher": 0.9, "baseline": base}.get(row, base + gain + noise)
            for region, space in product(REGIONS, ("grid", "native")):
                empty = {"dice_reference_present": float("nan"), "reference_voxels": 0}
                empty = empty if region == "ET" and index == 0 else {}
                more = {"space": space} | empty | changes
                lines.append(line_of(row, f"Case_{index}", 0.0 if empty else dice, region, **more))
    return pd.DataFrame(lines, columns=[*COLUMNS])


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


def write_model(unit, role, description):
    """A model file and a history."""
    view = tuple(description.modalities) if role.startswith("teacher") else ("t1ce",)
    described = replace(
        STUDENT,
        role=role,
        backbone_arguments={"channels": [2, 4]},
        in_channels=len(view),
        modalities=view,
        description=description,
        epoch=3,
    )
    unit.mkdir(parents=True, exist_ok=True)
    save_model(unit / "model.safetensors", build(described), described)
    header = "epoch,step,learning_rate,seconds,train_loss,train_ground_truth,"
    header += "validation_loss,validation_dice\n"
    rows = "".join(f"{e},{e},0.001,1.5,{1 / e},{2 / e},{1.1 / e},{1 - 1 / e}\n" for e in (1, 2, 3))
    (unit / "history.csv").write_text(header + rows)
    record = {"seconds": {"training": 61.0, "scoring": 8.25}, "peak_mib": {"process": 1234.0}}
    (unit / "unit.json").write_text(json.dumps(record))


def write_plan(
    root, description, rows=ROLES, folds=1, cases=8, seeds=(0,), kind="train", config=None
):
    """The folder of a finished plan; its images lie in `data` beside it."""
    names = [f"Case_{index}" for index in range(folds * cases)]
    data = root.parent / "data"
    labels = write_data(data, names)
    for fold, seed in product(range(folds), seeds):
        here = {"fold": fold, "seed": seed}
        scores = invented_scores(cases, 0.05 + 0.01 * seed, rows=rows, first=fold * cases, **here)
        for place, row in enumerate(rows):
            unit = root / "units" / row / f"fold{fold}-seed{seed}"
            write_model(unit, row, description)
            write_scores(unit / "scores.csv", scores[scores["row"] == row])
            # Label maps equal the reference but for one more row of voxels per network.
            predicted = labels.astype(np.uint8)
            predicted[14 + place, 6:12, 3:7] = 2
            (unit / "predictions").mkdir()
            for name in names[fold * cases : (fold + 1) * cases]:
                path = unit / "predictions" / f"{name}_seg.nii.gz"
                nib.save(nib.Nifti1Image(predicted, AFFINE), path)
    gather_scores(root)
    settings = {"data_root": str(data), "student_modalities": ["t1ce"], "temperature": 5.0}
    (root / "config.yaml").write_text(yaml.safe_dump(settings | (config or {})))
    (root / "description.json").write_text(json.dumps(description.to_dict()))
    (root / "environment.json").write_text(json.dumps({"versions": {"torch": "2.x"}}))
    parts = {"train": ["Case_a", "Case_b"], "test": names}
    (root / "folds.json").write_text(json.dumps({"folds": [{"number": 0} | parts]}))
    taught = {"teacher": "teacher", "against": "baseline", "recipe": "distilled"}
    fields = {
        "teacher": {"role": "teacher"},
        "baseline": {},
        "gt_kl": {"options": {"imitation": 0.0}},
    }
    plan = {
        "kind": kind,
        "title": f"Invented {kind}",
        "dataset": description.name,
        "phantom": description.phantom,
        "protocol": f"{description.name}, {len(names)} cases, {folds} folds, 3 epochs",
        "rows": [
            {"name": row, "label": LABELS.get(row, row)} | taught | fields.get(row, {})
            for row in rows
        ],
    }
    for row in plan["rows"]:
        if row["name"] in {"teacher", "baseline"}:
            row |= {"teacher": None, "against": None, "recipe": "supervised"}
    (root / "plan.json").write_text(json.dumps(plan))
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
                base = {
                    "row": f"{count}-of-{max(labelled)}_{kind}",
                    "kind": kind,
                    "labelled": count,
                    "unlabelled": rest,
                    "fold": index % folds,
                    "seed": seed,
                    "case": f"Case_{index:02d}",
                    "region": region,
                    "space": "native",
                    "dice": float(ease[index] + 0.005 * count + gain + generator.normal(0, noise)),
                    "steps": 10 * (count + rest),
                }
                rows += [base, base | {"space": "grid", "dice": base["dice"] + 0.01}]
    return pd.DataFrame(rows)


def write_study(folder, rows=None, **changes):
    """The published rows of an invented study; students are compared with `<setting>_baseline`."""
    rows = invented_study() if rows is None else rows
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_csv(folder / "rows.csv", index=False)
    plan = {"kind": "study", "title": "invented", "dataset": "Nothing", "rows": []}
    plan["labels"] = {"baseline": "baseline", "chosen": "chosen recipe", "teacher": "teacher"}
    plan["protocol"] = "Invented numbers, two folds."
    for name, kind in rows[["row", "kind"]].drop_duplicates().itertuples(index=False):
        row = {"name": name, "kind": kind, "role": "teacher" if kind == "teacher" else "student"}
        if kind not in {"teacher", "baseline"}:
            setting = name.rpartition("_")[0]
            row |= {"teacher": f"{setting}_teacher", "against": f"{setting}_baseline"}
        plan["rows"].append(row)
    plan["chosen"] = [row["name"] for row in plan["rows"] if row["kind"] == "chosen"]
    (folder / "plan.json").write_text(json.dumps(plan | changes))
    return folder
