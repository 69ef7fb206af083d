"""Trained networks in the formats of others, and how predict.py runs them.

| file | holds | metadata |
|---|---|---|
| `.safetensors` | weights | inside |
| `.pt2` | program of torch.export | inside |
| `.onnx` | graph, for onnxruntime | inside |

TorchScript is not among them: PyTorch has deprecated it in favour of torch.export, whose programs
also refuse an image of another shape.
"""

from __future__ import annotations

import importlib
import json
import warnings
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdnet.errors import UserError
from kdnet.files import atomic, first_line
from kdnet.training.checkpoint import (
    ModelMetadata,
    load_model,
    parse_metadata,
    save_model,
)
from privdistill import DistillationWrapper, GroundTruth

#: Largest difference of logits between onnxruntime and torch, as a share of the largest logit
#: where that is above one.
TOLERANCE = 1e-4

Shape = tuple[int | str | torch.SymInt | None, ...]

_ENTRY = "privdistill"
FORMATS = (".safetensors", ".pt2", ".onnx")


def export(path: Path, network: nn.Module, metadata: ModelMetadata) -> float | None:
    """Write a network in the format of the file's ending; return how far ONNX is from torch."""
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".onnx":
        return _write_onnx(path, network, metadata)
    if path.suffix == ".safetensors":
        save_model(path, network, metadata)
        return None
    program = _program(path, network, metadata)
    with atomic(path) as partial:
        torch.export.save(program, partial, extra_files={_ENTRY: _text(metadata)})
    return None


def check_format(path: Path) -> None:
    """Refuse an ending that is no format."""
    if path.suffix not in FORMATS:
        raise UserError(
            f"{path}: expected a file that ends in {', '.join(FORMATS)}, found "
            f"{path.suffix or 'no ending'!r}."
        )


def open_model(
    path: Path, *, trusted: Collection[str] = (), trust_program: bool = False
) -> tuple[nn.Module, ModelMetadata]:
    """Open a model in any of the formats."""
    if path.suffix not in {".pt2", ".onnx"}:
        return load_model(path, trusted=trusted)
    if path.suffix == ".pt2" and not trust_program:
        raise UserError(
            f"{path}: opening a program of torch.export can run code that its author put there. "
            "If you wrote the file, give --trust_program; else use .safetensors or .onnx."
        )
    if not path.is_file():
        raise UserError(f"{path}: there is no such model file.")
    return _read_program(path) if path.suffix == ".pt2" else _read_onnx(path)


class _Logits(nn.Module):
    """A network of any form of output, as one from images to logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.kd = DistillationWrapper(None, network, objective=GroundTruth())

    def forward(self, image: Tensor) -> Tensor:
        return self.kd.predict(image)


class _Function(nn.Module):
    """A function that looks like a network; it is no submodule, as programs have no eval()."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._run = (run,)

    def forward(self, image: Tensor) -> Tensor:
        return self._run[0](image)


def _example(metadata: ModelMetadata) -> Tensor:
    # Two, as torch.export takes one for a constant.
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, metadata.in_channels, *metadata.input_size, generator=generator)


def _program(path: Path, network: nn.Module, metadata: ModelMetadata) -> Any:
    batch = {0: torch.export.Dim("batch")}
    try:
        with torch.no_grad():
            return torch.export.export(
                _Logits(network).eval(), (_example(metadata),), dynamic_shapes=(batch,)
            )
    except Exception as error:  # whatever a network of somebody else makes torch.export raise
        raise UserError(
            f"{path}: torch.export cannot turn {metadata.backbone} into a program "
            f"({first_line(error)}). Export its weights: .safetensors."
        ) from error


def _write_onnx(path: Path, network: nn.Module, metadata: ModelMetadata) -> float:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _package(name, path)
    program = _program(path, network, metadata)
    with warnings.catch_warnings():
        # What torch's exporter says of its own parts.
        warnings.simplefilter("ignore")
        written: Any = torch.onnx.export(
            program, (_example(metadata),), dynamo=True, verbose=False, external_data=False
        )
    written.model.metadata_props[_ENTRY] = _text(metadata)
    with atomic(path) as partial:
        written.save(str(partial), external_data=False)
        return _compare(path, partial, network, metadata)


def _compare(path: Path, partial: Path, network: nn.Module, metadata: ModelMetadata) -> float:
    image = _example(metadata)
    with torch.no_grad():
        expected = _Logits(network)(image)
        found = _read_onnx(partial)[0](image)
    difference = float((found - expected).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise UserError(
            f"{path}: onnxruntime gives logits that differ from torch's by {difference:.2g}, more "
            f"than {allowed:.2g}. Nothing was written; export to .pt2 or .safetensors."
        )
    return difference


def _read_program(path: Path) -> tuple[nn.Module, ModelMetadata]:
    _check_whole(path)
    extra = {_ENTRY: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
        shapes = _shapes_of_program(program)
    except Exception as error:  # torch.export raises many kinds
        raise UserError(f"{path} is no program of torch.export ({first_line(error)}).") from error
    metadata = _metadata(path, extra[_ENTRY])
    _check_shapes(path, shapes, metadata)
    module = program.module()
    # Its weights stay on the CPU, as those of onnxruntime do; a device is for the images.
    return _Function(lambda image: module(image.cpu())), metadata


def _shapes_of_program(program: Any) -> tuple[Shape, Shape]:
    """Of the image and of the logits."""
    (image,), (logits,) = program.graph_signature.user_inputs, program.graph_signature.user_outputs
    nodes = {node.name: node for node in program.graph.nodes}
    return tuple(nodes[image].meta["val"].shape), tuple(nodes[logits].meta["val"].shape)


def _check_whole(path: Path) -> None:
    """Refuse a damaged archive by its checksums; torch would log a traceback, or see nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            # Programs hold archives themselves, the last of which a cut file may end with.
            starts = min((part.header_offset for part in archive.infolist()), default=-1)
            fault = archive.testzip() if starts == 0 else "its beginning or its end"
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        fault = first_line(error)
    if fault is not None:
        raise UserError(
            f"{path} is damaged, or no file that export.py wrote ({fault}). Copy it again, or "
            "export the network again."
        )


def _check_shapes(path: Path, shapes: tuple[Shape, Shape], metadata: ModelMetadata) -> None:
    """Refuse metadata of another network; sizes that are no numbers are free."""
    image = (metadata.in_channels, *metadata.input_size)
    wanted, found = (*image, metadata.out_channels), (*shapes[0][1:], *shapes[1][1:2])
    known = [size if type(size) is int else own for size, own in zip(found, wanted, strict=False)]
    if len(found) != len(wanted) or known != [*wanted]:
        raise UserError(
            f"{path}: its metadata are those of another network. They say {image} (channels, "
            f"voxels) for the image and {metadata.out_channels} channels of logits; it takes "
            f"{found[:-1]} and gives {found[-1]}. Export the network again."
        )


def _read_onnx(path: Path) -> tuple[nn.Module, ModelMetadata]:
    runtime = _package("onnxruntime", path)
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base
        raise UserError(f"{path} cannot be read by onnxruntime ({first_line(error)}).") from error
    metadata = _metadata(path, session.get_modelmeta().custom_metadata_map.get(_ENTRY, ""))
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise UserError(
            f"{path}: expected a graph from one image to its logits, found {len(inputs)} inputs "
            f"and {len(outputs)} outputs."
        )
    _check_shapes(path, (tuple(inputs[0].shape), tuple(outputs[0].shape)), metadata)
    name = inputs[0].name

    def run(image: Tensor) -> Tensor:
        (logits,) = session.run(None, {name: image.cpu().contiguous().numpy()})
        return torch.from_numpy(logits)

    return _Function(run), metadata


def _metadata(path: Path, text: str) -> ModelMetadata:
    try:
        strings = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: its metadata are missing or damaged. Expected a file that export.py wrote."
        ) from error
    return parse_metadata(path, strings)


def _text(metadata: ModelMetadata) -> str:
    return json.dumps(metadata.to_strings())


def _package(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{path}: needs the package {name}, which cannot be imported ({error}). Install it: "
            "pip install './privdistill[export]'."
        ) from error
