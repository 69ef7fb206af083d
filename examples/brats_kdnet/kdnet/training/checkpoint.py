"""Model files that explain themselves, and the state that continues a training exactly."""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kdnet.data.description import Description
from kdnet.data.preprocessing import Preprocessing
from kdnet.data.samples import Plane, plane_of
from kdnet.data.targets import number_of_outputs
from kdnet.data.volumes import LIMIT_VARIABLE, largest_volume
from kdnet.environment import versions
from kdnet.errors import UserError
from kdnet.models import build_network
from kdnet.models.trust import check_trusted
from kdnet.training.digests import check_archive, check_tensors, damaged, digest, digests
from kdnet.training.states import misfits
from kdnet.writing import atomic, first_line, write_tensors

FORMAT = "privdistill-brats-1"

# Entries of a file beside the metadata: digests of its tensors, and of all other entries.
_TENSORS, _DIGEST = "tensors_sha256", "sha256"


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
        phantom: Whether it was trained on phantoms.
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
    normalise: Literal["after_crop", "before_crop"] = "after_crop"
    resample: Literal["trilinear", "area"] = "trilinear"
    epoch: int = 0
    phantom: bool = False
    orientation: str = ""
    seen_cases: tuple[str, ...] = ()
    patch: tuple[int, int, int] | None = None
    slices: Plane | None = None
    any_subset: bool = False
    spacing: tuple[float, ...] = ()
    nonzero: tuple[float, ...] = ()
    created_with: dict[str, str] = field(default_factory=versions)

    def preprocessing(self) -> Preprocessing:
        """Return what brings a subject to the input of this network."""
        return Preprocessing(
            self.description,
            self.modalities,
            self.crop,
            self.grid,
            normalise=self.normalise,
            resample=self.resample,
        )

    @property
    def input_size(self) -> tuple[int, ...]:
        """Voxels along each axis of what the network sees at a time."""
        size = self.patch or self.grid
        if size is None:
            raise ValueError(f"{self.role}: neither a patch nor a grid is known.")
        return size if self.slices is None else plane_of(size, self.slices)

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
        # Files from before there were patches, slices and subsets have none of them.
        written = {"patch": "null", "slices": "null", "any_subset": "false"}
        written |= {"spacing": "[]", "nonzero": "[]"} | dict(strings)
        values = {item.name: json.loads(written[item.name]) for item in fields(cls)}
        values["description"] = Description.from_dict(values["description"])
        for name in ("modalities", "crop", "grid", "patch", "seen_cases", "spacing", "nonzero"):
            values[name] = None if values[name] is None else tuple(values[name])
        wrong = [name for name, fits in _fitting(values).items() if not fits]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} cannot be used")
        large = [name for name in ("crop", "grid", "patch") if _is_large(values[name])]
        if large:
            raise ValueError(
                f"{', '.join(large)} of more than the {largest_volume():,} voxels that are read; "
                f"if it is meant, set {LIMIT_VARIABLE}"
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
        "in_channels": _is_count(values["in_channels"], len(modalities)),
        "out_channels": _is_count(values["out_channels"], outputs),
        "modalities": bool(modalities) and {*modalities} <= {*values["description"].modalities},
        "activation": known,
        "crop": _is_size(values["crop"]),
        "grid": _is_size(values["grid"]),
        "patch": _is_size(values["patch"]),
        "grid and patch": values["grid"] is not None or values["patch"] is not None,
        "slices": values["slices"] in {None, *get_args(Plane)},
        "orientation": isinstance(values["orientation"], str),
        "spacing": _are_numbers(values["spacing"], 3),
        "nonzero": _are_numbers(values["nonzero"], len(modalities)),
        "seen_cases": all(isinstance(name, str) for name in values["seen_cases"]),
    }


def _is_count(value: Any, expected: int | None) -> bool:
    return type(value) is int and value >= 1 and value == (expected or value)


def _are_numbers(values: Any, count: int) -> bool:
    return not values or (len(values) == count and all(type(value) is float for value in values))


def _is_size(value: Any) -> bool:
    return value is None or (
        len(value) == 3 and all(type(edge) is int and edge >= 1 for edge in value)
    )


def _is_large(size: Sequence[int] | None) -> bool:
    return size is not None and math.prod(size) > largest_volume()


def save_model(path: Path, network: nn.Module, metadata: ModelMetadata) -> None:
    """Write weights and metadata as one safetensors file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, network.state_dict(), metadata)


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: ModelMetadata) -> None:
    """Write the weights of a network that need not be at hand, as `save_model` does."""
    # Clones, because safetensors refuses weights that share memory.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }
    strings = metadata.to_strings() | {_TENSORS: json.dumps(digests(plain))}
    strings |= {_DIGEST: _digest(strings)}
    with atomic(path) as partial:
        try:
            save_file(plain, partial, metadata=strings)
        except SafetensorError as error:
            # So its writer reports a full disk.
            raise OSError(first_line(error)) from error


def read_metadata(path: Path) -> ModelMetadata:
    """Read the metadata of a model file alone."""
    strings, _ = _read(path, weights=False)
    return parse_metadata(path, strings)


def parse_metadata(path: Path, strings: Mapping[str, str]) -> ModelMetadata:
    """Read metadata that came with a model."""
    if strings.get("format") != FORMAT:
        found = f"format {strings['format']!r}" if "format" in strings else "no format"
        raise UserError(
            f"{path} is not a model of this application: expected metadata of format "
            f"{FORMAT!r}, as train.py writes them, found {found}."
        )
    # Files from before there were digests have neither; one alone has lost its name to damage.
    known = _DIGEST in strings or _TENSORS in strings
    if known and strings.get(_DIGEST) != _digest(strings):
        raise UserError(
            f"{path} is damaged: its metadata are not those that were written. Copy the file "
            "again, or train the network again."
        )
    try:
        return ModelMetadata.from_strings(strings)
    except UserError as error:
        raise UserError(f"{path}: its metadata cannot be used. {error}") from error
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: its metadata are damaged ({error!r}).") from error


def load_model(path: Path, *, trusted: Collection[str] = ()) -> tuple[nn.Module, ModelMetadata]:
    """Rebuild a network from its file."""
    strings, weights = _read(path, weights=True)
    metadata = parse_metadata(path, strings)
    network = _network(path, metadata, trusted)
    spoilt = damaged(weights, json.loads(strings[_TENSORS])) if _TENSORS in strings else []
    if spoilt:
        raise UserError(
            f"{path} is damaged: the numbers of {_listed(spoilt)} are not those that were written. "
            "Copy the file again, or train the network again."
        )
    return _filled(path, network, metadata, weights), metadata


def _network(path: Path, metadata: ModelMetadata, trusted: Collection[str]) -> nn.Module:
    """Build what the metadata ask for, if it may be built."""
    check_trusted(str(path), metadata.backbone, metadata.backbone_arguments, trusted)
    return build_network(
        metadata.backbone,
        metadata.backbone_arguments,
        in_channels=metadata.in_channels,
        out_channels=metadata.out_channels,
    )


def _filled(
    path: Path, network: nn.Module, metadata: ModelMetadata, weights: Mapping[str, Tensor]
) -> nn.Module:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise _another_network(path, metadata, weights) from error
    return network.eval()


def check_compatible(path: Path, found: ModelMetadata, expected: ModelMetadata) -> None:
    """Refuse a trained network that does not fit the run it is given to."""
    keys = (
        *("modalities", "out_channels", "activation", "crop", "grid", "normalise", "resample"),
        *("slices", "phantom"),
    )
    differing = [key for key in keys if getattr(found, key) != getattr(expected, key)]
    differing += [
        key
        for key in ("classes", "regions")
        if getattr(found.description, key) != getattr(expected.description, key)
    ]
    if differing:
        raise UserError(
            f"{path} is another network; it differs in {', '.join(differing)}.\n"
            f"Expected {expected.summary()}\nFound    {found.summary()}"
        )


def file_digest(path: Path) -> str:
    """Return SHA-256 of a file, for a state that vouches for it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a training, atomically, with a digest of each of its entries."""
    content = {name: value for name, value in state.items() if name != _DIGEST}
    write_tensors(path, content | {_DIGEST: digests(content)})


def load_state(path: Path, say: Callable[[str], None] | None = None) -> dict[str, Any] | None:
    """Read what `save_state` wrote."""
    if not path.is_file():
        return None
    try:
        check_archive(path)
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        expected = state.pop(_DIGEST, None)
        check_tensors(state)
        # States from before there were digests have none.
        spoilt = [] if expected is None else damaged(state, expected)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({error}). Remove {path.parent} to train this network again."
        ) from error
    if spoilt:
        raise UserError(
            f"{path} is damaged: {_listed(spoilt)} of it are not what was written. Restore it from "
            f"a copy, or remove {path.parent} to train this network again."
        )
    wrong = misfits(state)
    if wrong:
        raise UserError(
            f"{path} is not the state of a training: {_listed(wrong)} of it are missing or of "
            f"another kind. Restore it, or remove {path.parent} to train this network again."
        )
    if expected is None and say is not None:
        say(f"{path} has no digest, as an older version wrote it: damage in it cannot be seen")
    return state


def _read(path: Path, *, weights: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such model file.")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys()) if weights else []
            tensors = {name: file.get_tensor(name) for name in names}
            return dict(file.metadata() or {}), tensors
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a model of this application, or it is damaged ({error}). Expected a "
            "model.safetensors written by train.py."
        ) from error


def _digest(strings: Mapping[str, str]) -> str:
    return digest({name: strings[name] for name in sorted(strings) if name != _DIGEST})


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _another_network(
    path: Path, metadata: ModelMetadata, weights: Mapping[str, Tensor]
) -> UserError:
    return UserError(
        f"{path} holds the weights of another network.\n"
        f"Expected {metadata.summary()}\n"
        f"Found {_describe_weights(weights)}"
    )


def _describe_weights(weights: Mapping[str, Tensor]) -> str:
    total = sum(tensor.numel() for tensor in weights.values())
    names = list(weights)
    first = f"{names[0]} {tuple(weights[names[0]].shape)}" if names else "nothing"
    return f"{len(names)} tensors with {total:,} numbers, the first one {first}"
