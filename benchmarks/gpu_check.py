"""What only a CUDA device can show, in parts of at most two minutes that run alone.

    python benchmarks/gpu_check.py --part compile
    python benchmarks/gpu_check.py --part resume --out runs/gpu

Each part writes gpu-PART.json into the folder and prints it; status 1 says that it found a fault.
Phantoms stand in for subjects. Without a GPU a part says that it is skipped, and succeeds;
`--device cpu` tries the parts themselves on the smallest networks.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "brats_kdnet"))

from kdnet.data.phantom_files import generate_phantoms
from kdnet.files import write_json
from kdnet.runs.folder import Folder, UnitFolder
from kdnet.training.history import read_history

_PROGRAMS = Path(__file__).parents[1] / "examples" / "brats_kdnet"
_ROLES = ("teacher", "baseline", "student")
_CHANNELS = ("flair", "t1", "t1ce", "t2")
# Eight of twelve phantoms train and validate.
_RUN = (
    *("--preset", "paper", "--phantoms", "12", "--predictions", "false"),
    *("--epochs", "6", "--validation-fraction", "0.25"),
)
_SIZES = {
    # The paper's networks with its crop and grid.
    "cuda": ("--phantom-size", "128", "--crop", "128,128,128", "--grid", "64,64,64"),
    "cpu": (
        *("--phantom-size", "16", "--crop", "null", "--grid", "8,8,8", "--workers", "1"),
        *("--backbone-arguments", '{"channels": [2, 4]}', "--threads", "1"),
        *("--accelerator", "cpu"),
    ),
}
_STUDY = {
    "title": "On the device",
    "options": {"activation": "sigmoid", "selection": "last", "schedule": "onecycle"},
    "recipes": {"soft": {"label": "soft targets", "options": {"binarisation": "soft"}}},
    "chosen": "soft",
    "blocks": [{"recipes": ["baseline", "soft"], "labelled": [4]}],
}
_TRAINERS = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from privdistill.integrations.nnunet import nnUNetTrainerDistillation

class Short:
    def on_train_start(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = {length}
        super().on_train_start()

class nnUNetTrainerShort(Short, nnUNetTrainer): ...
class nnUNetTrainerShortDistillation(Short, nnUNetTrainerDistillation): ...
"""


def command(program: str, out: Path, device: str, *flags: str) -> list[str]:
    """Return the command of a program on phantoms that all runs of a folder share."""
    places = ["--out", str(out), "--cache-dir", str(out.parent / "cache")]
    return [
        sys.executable,
        str(_PROGRAMS / f"{program}.py"),
        *_RUN,
        *_SIZES[device],
        *places,
        *flags,
    ]


def run(call: Sequence[str], **variables: str) -> None:
    """Run a program to its end; what it says on a failure is seen above the traceback."""
    subprocess.run(call, check=True, env=os.environ | variables)  # noqa: S603


def trained(out: Path, device: str, *flags: str) -> dict[str, UnitFolder]:
    """Train three networks and return their folders."""
    run(command("train", out, device, *flags))
    return {role: Folder(out).unit(f"{role}/fold0-seed0") for role in _ROLES}


def took(units: dict[str, UnitFolder]) -> dict[str, Any]:
    """Say what epochs took, without the first one, which compiles and tries out kernels."""
    rows = {role: read_history(unit.history)[1:] for role, unit in units.items()}
    return {
        "seconds_per_epoch": {r: sum(e["seconds"] for e in es) / len(es) for r, es in rows.items()},
        "peak_mib": units["student"].read_record()["peak_mib"],
    }


def steps(out: Path, device: str) -> dict[str, Any]:
    """Measure steps in both precisions, and their peak memory."""
    return {
        precision: took(trained(out / precision, device, "--precision", precision))
        for precision in ("32-true", "bf16-mixed")
    }


def compiled(out: Path, device: str) -> dict[str, Any]:
    """Train with and without torch.compile; the losses must agree."""
    runs = {
        name: trained(out / name, device, "--compile", value)
        for name, value in (("eager", "false"), ("compiled", "true"))
    }
    one, other = (read_history(u["student"].history)[0]["train_loss"] for u in runs.values())
    # Kernels of another order; what was computed is the same.
    fine = abs(one - other) < 0.01 * abs(one)
    return {name: took(units) for name, units in runs.items()} | {
        "first_losses": [one, other],
        "ok": fine,
    }


def resume(out: Path, device: str) -> dict[str, Any]:
    """Stop a training in the middle, let it go on, and compare with one that was not stopped."""
    whole = trained(out / "whole", device)
    process = subprocess.Popen(command("train", out / "stopped", device))  # noqa: S603
    state = Folder(out / "stopped").unit("teacher/fold0-seed0").root / "state.safetensors"
    while process.poll() is None and not state.is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status = process.wait()
    stopped = trained(out / "stopped", device)
    differences = {role: difference(whole[role], stopped[role]) for role in _ROLES}
    # A GPU adds in an order of its own, so they need not be zero.
    fine = status == 128 + signal.SIGTERM and max(differences.values()) < 0.1
    return {"status": status, "largest_differences": differences, "ok": fine}


def difference(one: UnitFolder, other: UnitFolder) -> float:
    """Return the largest difference between two networks' weights."""
    first, second = load_file(one.model), load_file(other.model)
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def nnunet(out: Path, device: str) -> dict[str, Any]:
    """Train an nnU-Net of all channels and distil it into one of T1ce."""
    raw, results, trainers = (out / name for name in ("raw", "results", "trainers"))
    write_dataset(raw / "Dataset901_Phantom", out / "phantoms", 48 if device == "cuda" else 32)
    trainers.mkdir()
    length = "2, 10, 2" if device == "cuda" else "1, 1, 1"
    (trainers / "short.py").write_text(_TRAINERS.format(length=length))
    teacher = results / "Dataset901_Phantom" / "nnUNetTrainerShort__nnUNetPlans__3d_fullres"
    processes = "4" if device == "cuda" else "1"
    variables = {f"nnUNet_{name}": str(out / name) for name in ("raw", "preprocessed", "results")}
    variables |= {"nnUNet_extTrainer": str(trainers), "nnUNet_n_proc_DA": processes}
    variables |= {"nnUNet_def_n_proc": processes, "PRIVDISTILL_CHANNELS": "t1ce"}
    train = ("nnUNetv2_train", "901", "3d_fullres", "0", "-device", device, "-tr")
    plan = ("nnUNetv2_plan_and_preprocess", "-d", "901", "-c", "3d_fullres")
    for program, *flags in (
        (*plan, "-np", processes, "-npfp", processes),
        (*train, "nnUNetTrainerShort"),
        (*train, "nnUNetTrainerShortDistillation"),
    ):
        place = str(Path(sys.executable).with_name(program))
        run([place, *flags], PRIVDISTILL_TEACHER=str(teacher), **variables)
    found = sorted(str(p.relative_to(results)) for p in results.rglob("checkpoint_final.pth"))
    # The teacher's, the training's and the stand-alone student's.
    return {"checkpoints": found, "ok": len(found) == 3}


def write_dataset(folder: Path, phantoms: Path, size: int) -> None:
    """Write phantoms as nnU-Net's raw data set, labels without a gap."""
    import nibabel as nib  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    images, labels = folder / "imagesTr", folder / "labelsTr"
    for part in (images, labels):
        part.mkdir(parents=True)
    generate_phantoms(phantoms, subjects=10, seed=0, size=size, progress=False)
    for case in sorted(path for path in phantoms.iterdir() if path.is_dir()):
        for number, channel in enumerate(_CHANNELS):
            image = case / f"{case.name}_{channel}.nii.gz"
            shutil.copy(image, images / f"{case.name}_{number:04d}.nii.gz")
        label: Any = nib.load(case / f"{case.name}_seg.nii.gz")
        classes = np.asarray(label.dataobj).astype(np.uint8)
        classes[classes == 4] = 3
        nib.save(label.__class__(classes, label.affine), labels / f"{case.name}.nii.gz")
    dataset = {"numTraining": 10, "file_ending": ".nii.gz"}
    dataset["channel_names"] = {str(n): channel for n, channel in enumerate(_CHANNELS)}
    dataset["labels"] = {"background": 0, "necrosis": 1, "oedema": 2, "enhancing": 3}
    write_json(folder / "dataset.json", dataset)


def study(out: Path, device: str) -> dict[str, Any]:
    """Train a study of six units, as many at a time as there are GPUs."""
    out.mkdir(parents=True)
    (out / "device.yaml").write_text(yaml.safe_dump(_STUDY))
    small = ("--folds", "2", "--epochs", "2", "--validation-fraction", "0")
    run(command("study", out / "study", device, "--study", str(out / "device.yaml"), *small))
    scored = len(list((out / "study").glob("units/*/*/scores.csv")))
    return {"units": scored, "ok": scored == 6}


# What was never seen on a device stands first.
PARTS: dict[str, Callable[[Path, str], dict[str, Any]]] = {
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
    parser.add_argument("--device", choices=_SIZES, default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"{options.part}: skipped, PyTorch finds no CUDA device")
        return 0
    folder = options.out.resolve() / options.part
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    found = PARTS[options.part](folder, options.device)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    found |= {"part": options.part, "device": name, "seconds": time.perf_counter() - started}
    write_json(options.out / f"gpu-{options.part}.json", found)
    print(json.dumps(found, indent=2))
    return 0 if found.get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main())
