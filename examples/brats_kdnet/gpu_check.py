"""What only a CUDA device can show, in parts of at most two minutes that run alone.

    python examples/brats_kdnet/gpu_check.py --part compile
    python examples/brats_kdnet/gpu_check.py --part resume --out runs/gpu

Each part writes gpu-PART.json into the folder and prints it; status 1 says that it found a fault.
Phantoms stand in for subjects. Without a GPU a part says that it is skipped, and succeeds.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from kdnet.data.phantom_files import generate_phantoms
from kdnet.runs.folder import Folder, UnitFolder
from kdnet.training.history import read_history

_HERE = Path(__file__).parent
_ROLES = ("teacher", "baseline", "student")
_EPOCHS = 6
_CHANNELS = ("flair", "t1", "t1ce", "t2")
# The paper's networks and its crop and grid; eight of twelve phantoms train and validate.
_PAPER = (
    *("--preset", "paper", "--phantoms", "12", "--phantom_size", "128", "--epochs", str(_EPOCHS)),
    *("--crop", "128,128,128", "--grid", "64,64,64", "--validation_fraction", "0.25"),
    *("--predictions", "false"),
)
_STUDY = {
    "title": "On the device",
    "options": {"validation_fraction": 0, "selection": "last", "schedule": "onecycle"},
    "recipes": {"soft": {"label": "soft targets", "options": {"binarisation": "soft"}}},
    "chosen": "soft",
    "blocks": [{"recipes": ["baseline", "soft"], "labelled": [4]}],
}
_TRAINERS = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from privdistill.integrations.nnunet import nnUNetTrainerDistillation

class Short:
    def on_train_start(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 10, 2
        super().on_train_start()

class nnUNetTrainerShort(Short, nnUNetTrainer): ...
class nnUNetTrainerShortDistillation(Short, nnUNetTrainerDistillation): ...
"""


def command(program: str, out: Path, *flags: str) -> list[str]:
    """Return the command of a program on phantoms that all runs of a folder share."""
    shared = ["--out", str(out), "--cache_dir", str(out.parent / "cache")]
    return [sys.executable, str(_HERE / f"{program}.py"), *_PAPER, *shared, *flags]


def trained(out: Path, *flags: str) -> dict[str, UnitFolder]:
    """Train three networks and return their folders."""
    subprocess.run(command("train", out, *flags), check=True)  # noqa: S603
    return {role: Folder(out).unit(f"{role}/fold0-seed0") for role in _ROLES}


def took(units: dict[str, UnitFolder]) -> dict[str, Any]:
    """Say what epochs took, without the first one, which compiles and tries out kernels."""
    rows = {role: read_history(unit.history)[1:] for role, unit in units.items()}
    return {
        "seconds_per_epoch": {r: sum(e["seconds"] for e in es) / len(es) for r, es in rows.items()},
        "peak_mib": units["student"].read_record()["peak_mib"],
    }


def difference(one: UnitFolder, other: UnitFolder) -> float:
    """Return the largest difference between two networks' weights."""
    first, second = load_file(one.model), load_file(other.model)
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def steps(out: Path, flags: list[str]) -> dict[str, Any]:
    """Measure steps in both precisions, and their peak memory."""
    return {
        precision: took(trained(out / precision, *flags, "--precision", precision))
        for precision in ("32-true", "bf16-mixed")
    }


def compiled(out: Path, flags: list[str]) -> dict[str, Any]:
    """Train with and without torch.compile; the losses must agree."""
    runs = {
        name: trained(out / name, *flags, "--compile", value)
        for name, value in (("eager", "false"), ("compiled", "true"))
    }
    losses = [read_history(units["student"].history)[0]["train_loss"] for units in runs.values()]
    found: dict[str, Any] = {name: took(units) for name, units in runs.items()}
    # Kernels of another order; what was computed is the same.
    fine = abs(losses[0] - losses[1]) < 0.01 * abs(losses[0])
    return found | {"first_losses": losses, "ok": fine}


def resume(out: Path, flags: list[str]) -> dict[str, Any]:
    """Stop a training in the middle of an epoch, let it go on, and compare."""
    whole = trained(out / "whole", *flags)
    process = subprocess.Popen(command("train", out / "stopped", *flags))  # noqa: S603
    teacher = Folder(out / "stopped").unit("teacher/fold0-seed0")
    while process.poll() is None and not (teacher.root / "state.safetensors").is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status = process.wait()
    stopped = trained(out / "stopped", *flags)
    # A GPU adds in an order of its own, so they need not be zero.
    differences = {role: difference(whole[role], stopped[role]) for role in _ROLES}
    fine = status == 128 + signal.SIGTERM and max(differences.values()) < 0.1
    return {"status": status, "largest_differences": differences, "ok": fine}


def nnunet(out: Path, flags: list[str]) -> dict[str, Any]:
    """Train an nnU-Net of all channels and distil it into one of T1ce."""
    raw, trainers = out / "raw" / "Dataset901_Phantom", out / "trainers"
    for folder in (raw / "imagesTr", raw / "labelsTr", trainers):
        folder.mkdir(parents=True)
    phantoms = generate_phantoms(out / "phantoms", subjects=10, seed=0, size=48, progress=False)
    for case in sorted(path for path in phantoms.iterdir() if path.is_dir()):
        for number, channel in enumerate(_CHANNELS):
            image = case / f"{case.name}_{channel}.nii.gz"
            shutil.copy(image, raw / "imagesTr" / f"{case.name}_{number:04d}.nii.gz")
        write_labels(case / f"{case.name}_seg.nii.gz", raw / "labelsTr" / f"{case.name}.nii.gz")
    labels = {"background": 0, "necrosis": 1, "oedema": 2, "enhancing": 3}
    names = {str(number): channel for number, channel in enumerate(_CHANNELS)}
    dataset = {
        "channel_names": names,
        "labels": labels,
        "numTraining": 10,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(dataset))
    (trainers / "short.py").write_text(_TRAINERS)
    results = out / "results"
    model = results / "Dataset901_Phantom" / "nnUNetTrainerShort__nnUNetPlans__3d_fullres"
    own = {f"nnUNet_{name}": str(out / name) for name in ("raw", "preprocessed", "results")}
    own |= {"nnUNet_extTrainer": str(trainers), "nnUNet_n_proc_DA": "4"}
    own |= {"PRIVDISTILL_CHANNELS": "t1ce", "PRIVDISTILL_TEACHER": str(model)}
    train = ("nnUNetv2_train", "901", "3d_fullres", "0", "-device", "cpu" if flags else "cuda")
    for call in (
        ("nnUNetv2_plan_and_preprocess", "-d", "901", "-c", "3d_fullres", "-np", "4"),
        (*train, "-tr", "nnUNetTrainerShort"),
        (*train, "-tr", "nnUNetTrainerShortDistillation"),
    ):
        program = str(Path(sys.executable).with_name(call[0]))
        subprocess.run([program, *call[1:]], check=True, env=os.environ | own)  # noqa: S603
    students = sorted(str(p.relative_to(results)) for p in results.rglob("checkpoint_final.pth"))
    return {"checkpoints": students, "ok": len(students) >= 2}


def write_labels(source: Path, target: Path) -> None:
    """Write labels without a gap, as nnU-Net wants them."""
    import nibabel as nib  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    image: Any = nib.load(source)
    labels = np.asarray(image.dataobj).astype(np.uint8)
    labels[labels == 4] = 3
    nib.save(image.__class__(labels, image.affine), target)


def study(out: Path, flags: list[str]) -> dict[str, Any]:
    """Train a study of six units, as many at a time as there are GPUs."""
    out.mkdir(parents=True)
    (out / "device.yaml").write_text(yaml.safe_dump(_STUDY))
    small = ("--folds", "2", "--epochs", "2", "--activation", "sigmoid", *flags)
    given = command("study", out / "study", "--study", str(out / "device.yaml"), *small)
    subprocess.run(given, check=True)  # noqa: S603
    scored = sorted(str(p.parent) for p in (out / "study").glob("units/*/*/scores.csv"))
    return {"units": len(scored), "ok": len(scored) == 6}


# What was never seen on a device stands first.
PARTS: dict[str, Callable[[Path, list[str]], dict[str, Any]]] = {
    "compile": compiled,
    "resume": resume,
    "nnunet": nnunet,
    "study": study,
    "steps": steps,
}


def main() -> int:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="where its files go")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="for train.py, last")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.flags:
        print(f"{options.part}: skipped, PyTorch finds no CUDA device")
        return 0
    folder = options.out / options.part
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    found = PARTS[options.part](folder, options.flags)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found |= {"part": options.part, "device": device, "seconds": time.perf_counter() - started}
    text = json.dumps(found, indent=2)
    (options.out / f"gpu-{options.part}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if found.get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main())
