"""Model files that explain themselves, and the state that continues a training exactly.

Both are safetensors: numbers and text, of which no reader makes an object, with a digest of all.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from lightning_fabric import Fabric
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from kdnet.config import TrainingConfig
from kdnet.data.description import Description
from kdnet.data.preprocessing import Normalise, Preprocessing, Resample, Sample
from kdnet.data.samples import Plane, plane_of
from kdnet.data.targets import number_of_outputs
from kdnet.data.volumes import LIMIT_VARIABLE, largest_volume
from kdnet.environment import versions
from kdnet.errors import UserError, explain
from kdnet.files import file_digest, first_line, said, write_tensors
from kdnet.models import build_network
from kdnet.models.trust import check_trusted
from kdnet.stopping import Interruption
from kdnet.training.runtime import load_optimizer, load_weights, whole
from privdistill import DistillationWrapper

Loader = Any  # a DataLoader, or Fabric's wrapper around one
FORMAT = "privdistill-brats-1"
_STATE_FORMAT = "privdistill-brats-state-1"
# Entries beside the metadata: digests of the tensors, and of all other entries.
_TENSORS, _DIGEST = "tensors_sha256", "sha256"
# How far a training is.
_COUNTED = ("epoch", "step", "best", "batch", "seconds")
# What a hostile or foreign state makes of reading it.
_MISFITS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class ModelMetadata:
    """All that is needed to use a network again: how it is built and what it must be fed.

    Attributes:
        role: "teacher", "baseline" or "student".
        backbone: Name or import path of the network.
        backbone_arguments: Arguments of its class.
        in_channels: Channels of its input.
        out_channels: Channels of its logits.
        modalities: What it sees, in channel order.
        activation: "softmax" or "sigmoid".
        description: The data set it was trained on; export labels and regions come from here.
        crop: Central crop, voxels; None for the whole volume.
        grid: Grid of a subject after resampling, voxels; None if subjects keep their own.
        normalise: "after_crop" or "before_crop".
        resample: "trilinear" or "area".
        epoch: Epoch of these weights, from 1.
        orientation: Axis codes of the training images, such as "LPS".
        seen_cases: Subjects that trained or selected it, or any network that taught it; they must
            not test it.
        patch: Windows that it sees of a subject without a grid, voxels; None if it sees the grid.
        slices: Plane of the slices that it sees of the grid; None if it is three-dimensional.
        any_subset: Whether it was trained for any subset of its modalities, an absent one being a
            channel of zeros.
        spacing: Median voxel size of the training images, mm; empty if it is not known.
        nonzero: Median share of non-zero voxels of the training images, by modality.
        created_with: Versions of the packages.
    """

    role: str
    backbone: str
    backbone_arguments: dict[str, Any]
    in_channels: int
    out_channels: int
    modalities: tuple[str, ...]
    activation: Literal["softmax", "sigmoid"]
    description: Description
    crop: tuple[int, int, int] | None
    grid: tuple[int, int, int] | None
    normalise: Normalise = "after_crop"
    resample: Resample = "trilinear"
    epoch: int = 0
    orientation: str = ""
    seen_cases: tuple[str, ...] = ()
    patch: tuple[int, int, int] | None = None
    slices: Plane | None = None
    any_subset: bool = False
    spacing: tuple[float, ...] = ()
    nonzero: tuple[float, ...] = ()
    created_with: dict[str, str] = field(default_factory=versions)

    def build(self) -> nn.Module:
        """Build the untrained network."""
        return build_network(
            self.backbone,
            self.backbone_arguments,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
        )

    def preprocessing(self) -> Preprocessing:
        """Return what brings a subject to the input of this network."""
        return Preprocessing(
            self.description,
            self.modalities,
            self.crop,
            self.grid,
            self.normalise,
            self.resample,
        )

    @property
    def input_size(self) -> tuple[int, ...]:
        """Voxels along each axis of what the network sees at a time."""
        size = cast("tuple[int, ...]", self.patch or self.grid)
        return size if self.slices is None else plane_of(size, self.slices)

    @property
    def example(self) -> Tensor:
        """An input of the network, for a dry run."""
        return torch.zeros(1, self.in_channels, *self.input_size)

    @property
    def geometry(self) -> str:
        """What the network sees of a subject, in words."""
        edges = "x".join(map(str, self.patch or self.grid or ()))
        if self.patch is not None:
            return f"patches of {edges}"
        return f"grid {edges}" if self.slices is None else f"{self.slices} slices of grid {edges}"

    def summary(self) -> str:
        """Describe the network in one line."""
        arguments = ", ".join(f"{key}={value}" for key, value in self.backbone_arguments.items())
        return (
            f"{self.role}: {self.backbone}({arguments}), {self.in_channels} in "
            f"({', '.join(self.modalities)}), {self.out_channels} out ({self.activation}), "
            f"{self.description.name}, {self.geometry}"
        )

    def to_strings(self) -> dict[str, str]:
        """Return the form that safetensors stores: every value as JSON."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["description"] = self.description.to_dict()
        return {"format": FORMAT} | {key: json.dumps(value) for key, value in values.items()}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> "ModelMetadata":
        """Read what `to_strings` gave."""
        values = {item.name: json.loads(strings[item.name]) for item in fields(cls)}
        values["description"] = Description.from_dict(values["description"])
        # JSON has no tuples.
        for name in ("modalities", "crop", "grid", "patch", "seen_cases", "spacing", "nonzero"):
            values[name] = None if values[name] is None else tuple(values[name])
        # A network is built and a volume is made by what stands here.
        wrong = [name for name, fits in _fitting(values).items() if not fits]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)} cannot be used; sizes beyond {largest_volume():,} voxels are "
                f"read if {LIMIT_VARIABLE} is set"
            )
        return cls(**values)


def _fitting(values: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the entries of a file, which anybody may have written, are what they should be."""
    modalities, activation = values["modalities"], values["activation"]
    known = activation in {"softmax", "sigmoid"}
    outputs = number_of_outputs(values["description"], activation) if known else None
    return {
        "backbone": isinstance(values["backbone"], str),
        "backbone_arguments": isinstance(values["backbone_arguments"], dict),
        "in_channels": values["in_channels"] == len(modalities) > 0,
        "out_channels": values["out_channels"] == outputs,
        "modalities": {*modalities} <= {*values["description"].modalities},
        "activation": known,
        **{name: _is_size(values[name]) for name in ("crop", "grid", "patch")},
        "grid and patch": values["grid"] is not None or values["patch"] is not None,
        "slices": values["slices"] in {None, *get_args(Plane)},
        "normalise": values["normalise"] in get_args(Normalise),
        "resample": values["resample"] in get_args(Resample),
        "orientation": isinstance(values["orientation"], str),
        "seen_cases": all(isinstance(name, str) for name in values["seen_cases"]),
        "spacing": _are_numbers(values["spacing"], 3),
        "nonzero": _are_numbers(values["nonzero"], len(modalities)),
    }


def _are_numbers(values: Any, count: int) -> bool:
    return not values or (len(values) == count and all(type(value) is float for value in values))


def _is_size(value: Any) -> bool:
    return value is None or (
        len(value) == 3
        and all(type(edge) is int and edge >= 1 for edge in value)
        and math.prod(value) <= largest_volume()
    )


class TrainingFolder:
    """Files of one network.

    Attributes:
        root: Its folder.
        model: The selected weights, with all that predict.py needs.
        last: The weights after the last finished epoch.
        state: What goes on after an epoch; written last, so that it vouches for the other files.
        pause: What goes on in the middle of an epoch; there only after an interruption.
        history: One line per epoch.
        curves: Folder of the logger.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = root / "model.safetensors"
        self.last = root / "last.safetensors"
        self.state = root / "state.safetensors"
        self.pause = root / "pause.safetensors"
        self.history = root / "history.csv"
        self.curves = root / "curves"


@dataclass(frozen=True)
class Task:
    """What is trained, and how.

    Attributes:
        metadata: Describes the network; its role names the training.
        settings: Optimizer, schedule, selection.
        folder: Where its files go.
        console: Where progress is shown.
        volumes: Whole validation subjects, where a sample is a part of one: their Dice is that of
            whole volumes.
        seen_by_teachers: Subjects that each teacher was trained or selected on.
        options: Options of the run, which loggers show.
    """

    metadata: ModelMetadata
    settings: TrainingConfig
    folder: TrainingFolder
    console: Console
    volumes: Sequence[Sample] | None = None
    seen_by_teachers: tuple[frozenset[str], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def teacher_weights(self, names: Sequence[str]) -> Tensor | None:
        """Say which teachers teach which samples: those that were not trained on them."""
        if len(self.seen_by_teachers) < 2:
            return None
        cases = [name.partition("/")[0] for name in names]
        new = torch.tensor([[c not in seen for seen in self.seen_by_teachers] for c in cases])
        # Whom every teacher has seen, as validation subjects, is taught by all of them.
        return (new | ~new.any(dim=1, keepdim=True)).float()


def save_model(path: Path, network: nn.Module, metadata: ModelMetadata) -> None:
    """Write weights and metadata as one file, atomically."""
    save_weights(path, network.state_dict(), metadata)


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: ModelMetadata) -> None:
    """Write the weights of a network that need not be at hand, as `save_model` does."""
    _write(path, weights, metadata.to_strings())


def read_metadata(path: Path) -> ModelMetadata:
    """Read the metadata of a model file alone."""
    return parse_metadata(path, _read(path, FORMAT, tensors=False)[0])


def load_model(path: Path, *, trusted: Collection[str] = ()) -> tuple[nn.Module, ModelMetadata]:
    """Rebuild a network from its file."""
    strings, weights = _read(path, FORMAT)
    metadata = parse_metadata(path, strings)
    check_trusted(str(path), metadata.backbone, metadata.backbone_arguments, trusted)
    network = metadata.build()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        total = sum(tensor.numel() for tensor in weights.values())
        raise UserError(
            f"{path} holds the weights of another network.\nExpected {metadata.summary()}\n"
            f"Found {len(weights)} tensors with {total:,} numbers, such as "
            f"{next(iter(weights), 'none')}"
        ) from error
    return network.eval(), metadata


def parse_metadata(path: Path, strings: Mapping[str, str]) -> ModelMetadata:
    """Read metadata that came with a model."""
    _check_format(path, strings, FORMAT)
    try:
        return ModelMetadata.from_strings(strings)
    except (UserError, *_MISFITS, RecursionError) as error:
        raise UserError(f"{path}: its metadata cannot be used ({said(error)}).") from error


def check_compatible(path: Path, found: ModelMetadata, expected: ModelMetadata) -> None:
    """Refuse a trained network that does not fit the run it is given to."""
    keys = (
        *("modalities", "out_channels", "activation", "crop", "grid", "normalise", "resample"),
        "slices",
    )
    differing = [key for key in keys if getattr(found, key) != getattr(expected, key)]
    differing += [
        key
        for key in ("classes", "regions", "background", "phantom")
        if getattr(found.description, key) != getattr(expected.description, key)
    ]
    if differing:
        raise UserError(
            f"{path} is another network; it differs in {', '.join(differing)}.\n"
            f"Expected {expected.summary()}\nFound    {found.summary()}"
        )


def _write(path: Path, tensors: Mapping[str, Tensor], strings: Mapping[str, str]) -> None:
    """Write tensors and text with digests of both, atomically."""
    # Clones, because safetensors refuses tensors that share memory.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    strings = {**strings, _TENSORS: _digest_of_tensors(plain)}
    write_tensors(path, plain, strings | {_DIGEST: _digest(strings)})


def _read(
    path: Path, form: str, *, tensors: bool = True
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read what `_write` wrote, or say why it is something else."""
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; give the file in it, such as {path / 'model.safetensors'}."
        )
    try:
        with safe_open(path, framework="pt") as file:
            strings = dict(file.metadata() or {})
            names = file.keys() if tensors else ()
            # Clones, as what is mapped from a file ends the process when the file is cut short.
            values = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is no file of this application, or it is damaged ({first_line(error)})."
        ) from error
    _check_format(path, strings, form)
    # Digests are looked for whatever the file says, as damage may have hit the name of one.
    whole_text = strings.pop(_DIGEST, "") == _digest(strings)
    if not whole_text or (tensors and strings.get(_TENSORS) != _digest_of_tensors(values)):
        what = "numbers" if whole_text else "metadata"
        raise UserError(
            f"{path} is damaged: its {what} are not those that were written. Copy the file again, "
            "or train the network again."
        )
    return strings, values


def network_digest(path: Path) -> str:
    """Return SHA-256 of a model file's weights, which the order of what it says does not change."""
    return _read(path, FORMAT, tensors=False)[0][_TENSORS]


def _check_format(path: Path, strings: Mapping[str, str], form: str) -> None:
    if strings.get("format") != form:
        raise UserError(
            f"{path} is not what is looked for: expected format {form!r}, as train.py writes it, "
            f"found {strings.get('format', 'none')!r}."
        )


def _digest(strings: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(strings, sort_keys=True).encode()).hexdigest()


def _digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    # Files keep no order.
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}:".encode())
        # Bytes as they lie in memory, of every number format that there is.
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write how far a training is, atomically."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_as_json(state, tensors))
    _write(path, tensors, {"format": _STATE_FORMAT, "state": text})


def load_state(path: Path) -> dict[str, Any] | None:
    """Read what `save_state` wrote; None if there is nothing."""
    if not path.is_file():
        return None
    try:
        strings, tensors = _read(path, _STATE_FORMAT)
        state: dict[str, Any] = _from_json(json.loads(strings["state"]), tensors)
        names = list(state.get("files", {}))
        # Files are looked for beside the state, and nowhere else.
        if type(state["epoch"]) is not int or any(Path(name).name != name for name in names):
            raise ValueError("it is not the state of a training")
        return state | {"finished": state["finished"] is True}
    except (*_MISFITS, UserError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be gone on with ({first_line(error)}). Restore it from a copy, or "
            f"remove {path.name} alone to go on after what is kept without it."
        ) from error


def is_finished(folder: TrainingFolder) -> bool:
    """Say whether a network's training has come to its end, with the files that it left."""
    state = load_state(folder.state)
    if state is None or not state["finished"]:
        return False
    # Unfinished states may be older than the files beside them.
    for name, expected in state.get("files", {}).items():
        path = folder.root / name
        if not path.is_file() or file_digest(path) != expected:
            raise UserError(
                f"{path} is not the file with which the training was finished: it is damaged, "
                f"missing or another one. Restore it, or remove {folder.root} to train this "
                "network again; a network from elsewhere can be given as --teacher-model."
            )
    return True


def _as_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Put tensors into a table and mappings into pairs, as their keys may be numbers."""
    if isinstance(value, Tensor):
        tensors[name := str(len(tensors))] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"pairs": [[key, _as_json(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        return [_as_json(entry, tensors) for entry in value]
    return value


def _from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _from_json(entry, tensors) for key, entry in value["pairs"]}


@dataclass
class Means:
    """Running means over cases.

    Attributes:
        sums: Sum and number of cases by name, (2,) on the device; reading them is the only
            synchronisation.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor], cases: int | Tensor) -> None:
        """Add the means over some cases; their number may lie on the device."""
        for name, value in values.items():
            count = torch.as_tensor(cases, dtype=torch.float64, device=value.device)
            pair = torch.stack([value.detach().double() * count, count])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def reduce(self, fabric: Fabric, prefix: str) -> dict[str, float]:
        """Return the means over the cases of all processes, names prefixed."""
        pairs = torch.stack([*self.sums.values()]).to(fabric.device)
        sums, cases = torch.as_tensor(fabric.all_reduce(pairs, reduce_op="sum")).unbind(1)
        means = (sums / cases).tolist()
        return {f"{prefix}{name}": mean for name, mean in zip(self.sums, means, strict=True)}


@dataclass
class Training:
    """A network in training, and all that changes with it.

    Attributes:
        fabric: Launched.
        kd: The wrapper.
        model: The same, as Fabric runs it in training steps.
        optimizer: Drives the weights.
        stepping: The same, as Fabric steps it.
        scheduler: Drives the learning rate.
        train: Shuffled batches.
        validation: Batches in fixed order; None if there are no validation subjects.
        task: Settings and files.
        epoch: Finished epochs.
        step: Steps taken in all.
        best: Lowest validation loss so far.
        batch: Steps taken in the epoch that is not finished.
        seconds: Time that they took before the training was interrupted.
        means: Losses of these steps.
        interruption: Knows whether it was asked to stop.
    """

    fabric: Fabric
    kd: DistillationWrapper
    model: nn.Module
    optimizer: torch.optim.Optimizer
    stepping: torch.optim.Optimizer
    scheduler: LRScheduler
    train: Loader
    validation: Loader | None
    task: Task
    epoch: int = 0
    step: int = 0
    best: float = float("inf")
    batch: int = 0
    seconds: float = 0.0
    means: Means = field(default_factory=Means)
    interruption: Interruption = field(default_factory=Interruption)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.train)


def resume(training: Training) -> None:
    """Put everything back to where the training was interrupted, or to its last epoch's end."""
    task = training.task
    # The end of an epoch and the middle of the next; the latter is gone with the next end.
    state, paused = load_state(task.folder.state), load_state(task.folder.pause)
    epoch = 0 if state is None else state["epoch"]
    try:
        if paused is not None and _goes_on(training, paused, epoch):
            state = paused
        if state is not None:
            _restore(training, state)
    except _MISFITS as error:
        # The machine's own faults are told as what they are.
        if explain(error) is not None:
            raise
        raise UserError(
            f"{task.folder.root}: its state does not fit this network and its optimizer "
            f"({first_line(error)}). Restore it, or remove the folder to train this network again; "
            f"{task.folder.pause.name} alone, if it is there, to go on after epoch {epoch}."
        ) from error


def save_epoch(training: Training, validation_loss: float) -> None:
    """Write last weights, selected weights, and then the state that vouches for both."""
    task = training.task
    better = validation_loss < training.best
    training.best = min(training.best, validation_loss)
    # Files hold the names of the network itself, not those that torch.compile gives.
    network = getattr(training.kd.student, "_orig_mod", training.kd.student)
    # Gathered from all processes where the network is sharded.
    weights = whole(network.state_dict())
    finished = training.epoch == task.settings.epochs
    state = {"finished": True, "epoch": training.epoch} if finished else _state(training)
    if not training.fabric.is_global_zero:
        return
    metadata = replace(task.metadata, epoch=training.epoch)
    save_weights(task.folder.last, weights, metadata)
    if better or task.settings.selection == "last" or not task.folder.model.is_file():
        save_weights(task.folder.model, weights, metadata)
    # The last weights are of no further use once all is finished, and may be removed.
    files = {task.folder.model.name: file_digest(task.folder.model)}
    save_state(task.folder.state, state | {"files": files})
    task.folder.pause.unlink(missing_ok=True)


def pause(training: Training) -> None:
    """Keep the middle of an epoch, beside the state of the last finished one."""
    state = _state(training)
    if training.fabric.is_global_zero:
        save_state(training.task.folder.pause, state)


def _state(training: Training) -> dict[str, Any]:
    """All that goes on, in the same form from one process as from many."""
    fabric = training.fabric
    sums = {name: pair.to(fabric.device) for name, pair in training.means.sums.items()}
    random = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        random["gpu"] = torch.cuda.get_rng_state(fabric.device)
    return {
        "finished": False,
        "network": training.task.metadata.summary(),
        **{name: getattr(training, name) for name in _COUNTED},
        "steps": training.steps,
        "means": {name: _gathered(fabric, own) for name, own in sums.items()},
        "weights": whole(training.kd.state_dict()),
        "optimizer": whole(training.optimizer.state_dict()),
        "scheduler": training.scheduler.state_dict(),
        "precision": fabric.strategy.precision.state_dict(),
        "random": {name: _gathered(fabric, own) for name, own in random.items()},
    }


def _goes_on(training: Training, paused: Mapping[str, Any], epoch: int) -> bool:
    """Whether an interrupted epoch is the one that comes next and can be gone on with."""
    # One that was left behind by a kill between two files is older than the state.
    if paused["epoch"] != epoch:
        return False
    fabric, then = training.fabric, (len(paused["random"]["cpu"]), paused["steps"])
    now = (fabric.world_size, training.steps)
    if then != now:
        fabric.print(
            f"{training.task.metadata.role}: epoch {epoch + 1} begins again, as it was "
            f"interrupted with {then[0]} processes and {then[1]} steps in an epoch; now they are "
            f"{now[0]} and {now[1]}"
        )
    return then == now


def _restore(training: Training, state: Mapping[str, Any]) -> None:
    fabric, task, rank = training.fabric, training.task, training.fabric.global_rank
    now = task.metadata.summary()
    if state["network"] != now:
        raise UserError(
            f"{task.folder.root} holds the state of another network.\nExpected {now}\n"
            f"Found    {state['network']}\nChoose another --out."
        )
    # Into what stands already, so that Fabric and the scheduler keep their hold of it.
    load_weights(training.kd, state["weights"])
    load_optimizer(training.optimizer, state["optimizer"])
    _load_schedule(training, state)
    fabric.strategy.precision.load_state_dict(state["precision"])
    # A process that is new begins with the random numbers of the first.
    own = rank if rank < len(state["random"]["cpu"]) else 0
    # Clones, because PyTorch reads them from the beginning of their memory.
    random = {name: every[own].clone() for name, every in state["random"].items()}
    torch.set_rng_state(random["cpu"])
    if "gpu" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["gpu"])
    for name in _COUNTED:
        setattr(training, name, state[name])
    training.means = Means({n: own[rank].to(fabric.device) for n, own in state["means"].items()})
    where = f"after epoch {training.epoch}"
    if training.batch:
        where = f"in epoch {training.epoch + 1}, after step {training.batch} of {training.steps}"
    fabric.print(f"{task.metadata.role}: continues {where} ({training.step} in all)")


def _load_schedule(training: Training, state: Mapping[str, Any]) -> None:
    scheduler = training.scheduler
    if not isinstance(scheduler, OneCycleLR) or state["steps"] == training.steps:
        scheduler.load_state_dict(state["scheduler"])
        return
    # The end of the same epoch, in a schedule that counts the steps of now.
    done = state["epoch"] * training.steps
    scheduler.load_state_dict({"last_epoch": done - 1, "_step_count": done})
    scheduler.step()


def _gathered(fabric: Fabric, own: Tensor) -> Tensor:
    """One row for each process, on the CPU."""
    every = torch.as_tensor(fabric.all_gather(own))
    return every.reshape(fabric.world_size, *own.shape).cpu()
