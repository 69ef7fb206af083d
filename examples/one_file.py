"""A network that sees T1ce alone learns from one that saw four modalities: one file to copy.

    python one_file.py                                      # phantoms, about a minute
    python one_file.py --data-root BraTS2021 --steps 4000   # folders NAME of NAME_t1ce.nii.gz, ...

Without NAME_seg.nii.gz the teacher alone teaches. Change the constants and `network` to yours.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import monai
import monai.transforms as mt
import nibabel as nib
import numpy as np
import torch

import privdistill
from privdistill import DistillationWrapper, GroundTruth, PrivilegedInput, SoftTargetDiceBCE

MODALITIES = ("flair", "t1", "t1ce", "t2")  # endings of the files
STUDENT = ("t1ce",)  # what there will be at test time
# Label values of each region, innermost region first; a label map shows the first value.
REGIONS = {"ET": torch.tensor([4]), "TC": torch.tensor([1, 4]), "WT": torch.tensor([2, 1, 4])}
SPACING, PATCH, BATCH, HELD_OUT = (3.0, 3.0, 3.0), (32, 32, 32), 2, 6  # mm, voxels, subjects
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def network(modalities: int) -> torch.nn.Module:
    """Any encoder-decoder: (B, modalities, X, Y, Z) to logits (B, regions, X, Y, Z)."""
    return monai.networks.nets.UNet(3, modalities, len(REGIONS), (16, 32, 64), (2, 2)).to(DEVICE)


def find_subjects(root: Path) -> list[dict[str, Any]]:
    """Find the images of each subject, and its reference if there is one."""
    subjects: list[dict[str, Any]] = []
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        *image, seg = (folder / f"{folder.name}_{end}.nii.gz" for end in (*MODALITIES, "seg"))
        if missing := [path for path in image if not path.exists()]:
            raise SystemExit(f"{missing[0]}: no such file; a subject has each of {MODALITIES}.")
        known = seg.exists()
        if known and np.setdiff1d(nib.load(seg).dataobj, [0, *torch.cat([*REGIONS.values()])]).size:
            raise SystemExit(f"{seg}: REGIONS lacks some of its labels: add them, or drop this.")
        # Without a reference any volume will do, as its values are never read.
        subjects.append({"image": image, "label": seg if known else image[0], "labelled": known})
    if sum(subject["labelled"] for subject in subjects) <= HELD_OUT:
        raise SystemExit(f"{root}: expected over {HELD_OUT} folders NAME with NAME_seg.nii.gz.")
    return subjects


def load(subjects: list[dict[str, Any]], *, train: bool) -> Any:
    """Read subjects once; a reference to be tested against stays in the space of its file."""
    keys = ["image", "label"] if train else ["image"]
    steps = [
        mt.LoadImaged(["image", "label"], ensure_channel_first=True),
        mt.Lambdad("label", lambda x: torch.cat([torch.isin(x, v) for v in REGIONS.values()])),
        mt.CropForegroundd(keys, "image"),
        mt.Spacingd(keys, SPACING, mode=["bilinear", "nearest"][: len(keys)]),
        mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True),
        mt.SpatialPadd(keys, PATCH),
    ]
    random = [mt.RandSpatialCropd(keys, PATCH), mt.RandFlipd(keys, 0.5, spatial_axis=0)]
    return monai.data.CacheDataset(subjects, mt.Compose(steps + random * train))


def train(name: str, data: Any, steps: int, inputs: Any, **options: Any) -> DistillationWrapper:
    """Train a network for its modalities; `options` are the objective and the teacher."""
    student = network(len(inputs.student))
    # Regions overlap; exclusive classes need "softmax".
    kd = DistillationWrapper(student=student, inputs=inputs, activation="sigmoid", **options)
    optimizer = torch.optim.Adam(kd.parameters(), lr=2e-3)
    sampler = torch.utils.data.RandomSampler(data, num_samples=steps * BATCH)
    for step, batch in enumerate(monai.data.DataLoader(data, batch_size=BATCH, sampler=sampler), 1):
        image, target = batch["image"].to(DEVICE), batch["label"].to(DEVICE)
        out = kd(image, target, labelled=batch["labelled"])
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            print(f"{name}: step {step} of {steps}, loss {out.loss.item():.3f}", flush=True)
    kd.close()  # gives both networks back as they came; predict() still works
    return kd


@torch.no_grad()
def predict(kd: DistillationWrapper, sample: dict[str, Any]) -> torch.Tensor:
    """Segment a subject: regions (R, X, Y, Z) in the space of its files."""
    image = sample["image"][None].to(DEVICE)
    maps = monai.inferers.sliding_window_inference(image, PATCH, BATCH, kd.predict, overlap=0.5)
    return mt.ResampleToMatch(padding_mode="zeros")(maps[0].sigmoid().cpu(), sample["label"]) > 0.5


def write_phantoms(root: Path) -> Path:
    """Write 30 balls in noise, of which 10 have a reference: tumours, and rims that are none."""
    # Brightness of healthy tissue, core, oedema, a rim without oedema that is no tumour, and rim.
    shades = {"flair": (3, 4, 5, 3, 4), "t1": (4, 3, 3, 4, 3), "t1ce": (3, 2, 3.4, 5, 5)}
    shades |= {"t2": (3, 5, 4.5, 3, 4), "seg": (0, 1, 2, 0, 4)}
    random, affine = np.random.default_rng(0), np.diag([-3.0, -3.0, 3.0, 1.0])
    for name in (f"Phantom_{number:02}" for number in range(30)):
        (root / name).mkdir(parents=True, exist_ok=True)
        centres = random.uniform(10, 22, (2, 3, 1, 1, 1))
        far, other = np.linalg.norm(np.indices((32, 32, 32)) - centres, axis=1)
        label = np.select([far < 2.5, far < 5, far < 8, abs(other - 3.75) < 1.25], [1, 4, 2, 3])
        for end in [*shades][: 5 if name < "Phantom_10" else 4]:
            volume = np.take(shades[end], label) + (end != "seg") * random.normal(size=label.shape)
            image = nib.Nifti1Image(np.float32(volume), affine)
            nib.save(image, root / name / f"{name}_{end}.nii.gz")
    return root


def main(arguments: list[str] | None = None) -> None:
    """Train teacher, baseline and student; print their Dice; write a label map and the student."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="folder of subjects (default: phantoms)")
    parser.add_argument("--out", type=Path, default=Path("runs/one_file"), help="folder to write")
    parser.add_argument("--steps", type=int, default=400, help="of teacher and student (400)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    monai.utils.set_determinism(0)
    subjects = find_subjects(options.data_root or write_phantoms(options.out / "phantoms"))
    held_out = [subject for subject in subjects if subject["labelled"]][:HELD_OUT]
    rest = [subject for subject in subjects if subject not in held_out]
    every = load(rest, train=True)
    few = torch.utils.data.Subset(every, [i for i, s in enumerate(rest) if s["labelled"]])

    full, own = PrivilegedInput(MODALITIES, MODALITIES), PrivilegedInput(MODALITIES, STUDENT)
    teacher = train("teacher", few, options.steps, full, teacher=None, objective=GroundTruth())
    # A student that starts from its teacher has had the teacher's steps, too; so has the baseline.
    baseline = train("baseline", few, 2 * options.steps, own, teacher=None, objective=GroundTruth())
    images = monai.data.DataLoader(every, batch_size=BATCH)
    fitted = privdistill.fit_temperature(teacher.student, images, activation="sigmoid", inputs=full)
    objective = 0.9 * SoftTargetDiceBCE(temperature=fitted) + 0.1 * GroundTruth()
    distilled = {"teacher": teacher.student, "objective": objective, "start": "teacher"}
    kd = train("student", every, options.steps, own, **distilled)
    test = load(held_out, train=False)
    print(f"\n{'Dice':8}", *(f"{region:>6}" for region in REGIONS))
    for name, model in {"teacher": teacher, "baseline": baseline, "student": kd}.items():
        metric = monai.metrics.DiceMetric(ignore_empty=False, reduction="mean_batch")
        for sample in test:
            metric(predict(model, sample)[None], sample["label"][None])
        print(f"{name:8}", *(f"{dice:6.3f}" for dice in metric.aggregate()))
    torch.save(kd.student.state_dict(), options.out / "student.pt")  # loads into a plain network(1)
    masks, values = predict(kd, test[0]).numpy(), [int(v[0]) for v in REGIONS.values()]
    label_map, source = np.select([*masks], values).astype(np.uint8), held_out[0]["label"]
    nib.save(nib.Nifti1Image(label_map, nib.load(source).affine), options.out / source.name)


if __name__ == "__main__":
    main()
