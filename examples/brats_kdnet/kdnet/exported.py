"""Trained networks in the formats of others, and how predict.py runs them.

| file | holds | metadata |
|---|---|---|
| `.safetensors` | weights | inside |
| `.pt2` | program of torch.export | inside |
| `.onnx` | graph, for onnxruntime | inside |

TorchScript is not among them: PyTorch has deprecated it in favour of torch.export, whose programs
also refuse an image of another shape.
"""

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
from kdnet.evaluation.inference import logits_of
from kdnet.files import atomic, first_line
from kdnet.training.checkpoint import ModelMetadata, load_model, parse_metadata, save_model

#: Largest difference of logits between onnxruntime and torch, as a share of the largest logit
#: where that is above one.
TOLERANCE = 1e-4

_ENTRY = "privdistill"
FORMATS = (".safetensors", ".pt2", ".onnx")


def export(path: Path, network: nn.Module, metadata: ModelMetadata) -> float | None:
    """Write a network in the format of the file's ending; return how far ONNX is from torch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".onnx":
        return _write_onnx(path, network, metadata)
    if path.suffix == ".safetensors":
        save_model(path, network, metadata)
        return None
    program = _program(path, network, metadata)
    extra = {_ENTRY: json.dumps(metadata.to_strings())}
    with atomic(path) as partial:
        torch.export.save(program, partial, extra_files=extra)
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
    if path.suffix == ".onnx":
        return _read_onnx(path)
    if path.suffix != ".pt2":
        return load_model(path, trusted=trusted)
    if not trust_program:
        raise UserError(
            f"{path}: opening a program of torch.export can run code that its author put there. "
            "If you wrote the file, give --trust-program; else use .safetensors or .onnx."
        )
    return _read_program(path)


class _Logits(nn.Module):
    """A network of any form of output, as one from images to logits."""

    def __init__(self, network: nn.Module, metadata: ModelMetadata) -> None:
        super().__init__()
        self.kd = logits_of(network, metadata.example)

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
            # Strict tracing, the default of PyTorch 2.6, cannot follow what the wrapper enters.
            return torch.export.export(
                _Logits(network, metadata).eval(),
                (_example(metadata),),
                dynamic_shapes=(batch,),
                strict=False,
            )
    except Exception as error:  # whatever a network of somebody else makes torch.export raise
        raise UserError(
            f"{path}: torch.export cannot turn {metadata.backbone} into a program "
            f"({first_line(error)}). Export its weights: .safetensors."
        ) from error


def _write_onnx(path: Path, network: nn.Module, metadata: ModelMetadata) -> float:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _package(name, path)
    program, example = _program(path, network, metadata), _example(metadata)
    with warnings.catch_warnings():
        # What torch's exporter says of its own parts.
        warnings.simplefilter("ignore")
        written: Any = torch.onnx.export(
            program, (example,), dynamo=True, verbose=False, external_data=False
        )
    written.model.metadata_props[_ENTRY] = json.dumps(metadata.to_strings())
    with atomic(path) as partial:
        written.save(str(partial), external_data=False)
        with torch.no_grad():
            expected, found = _Logits(network, metadata)(example), _read_onnx(partial)[0](example)
        difference = float((found - expected).abs().max())
        allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
        # Also true for NaN. The file is not there yet, and so never will be.
        if not difference <= allowed:
            raise UserError(
                f"{path}: onnxruntime gives logits that differ from torch's by {difference:.2g}, "
                f"more than {allowed:.2g}. Nothing was written; export to .pt2 or .safetensors."
            )
    return difference


def _read_program(path: Path) -> tuple[nn.Module, ModelMetadata]:
    _check_whole(path)
    extra = {_ENTRY: ""}
    try:
        # Read before its metadata, which a program of somebody else does not have.
        module = torch.export.load(path, extra_files=extra).module()
    except Exception as error:  # torch.export raises many kinds
        raise UserError(f"{path} is no program of torch.export ({first_line(error)}).") from error
    # Its weights stay on the CPU, as those of onnxruntime do; a device is for the images.
    return _Function(lambda image: module(image.cpu())), _metadata(path, extra[_ENTRY])


def _check_whole(path: Path) -> None:
    """Refuse a damaged archive by its checksums; torch would log a traceback, or see nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            # Programs hold archives themselves, the last of which a cut file may end with.
            starts = min((part.header_offset for part in archive.infolist()), default=-1)
            fault = archive.testzip() if starts == 0 else "its beginning or its end"
    # What zipfile raises of flipped bits: also for methods it lacks, and for encryption.
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        fault = first_line(error)
    if fault is not None:
        raise UserError(
            f"{path} is damaged, or no file that export.py wrote ({fault}). Copy it again, or "
            "export the network again."
        )


def _read_onnx(path: Path) -> tuple[nn.Module, ModelMetadata]:
    runtime = _package("onnxruntime", path)
    try:
        # On the CPU: a file must give the same on any machine.
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (image,), (_,) = session.get_inputs(), session.get_outputs()
    except Exception as error:  # onnxruntime's errors have no common base
        raise UserError(
            f"{path} is no graph from one image to its logits that onnxruntime can read "
            f"({first_line(error)})."
        ) from error

    def run(given: Tensor) -> Tensor:
        (logits,) = session.run(None, {image.name: given.cpu().contiguous().numpy()})
        return torch.from_numpy(logits)

    entry = session.get_modelmeta().custom_metadata_map.get(_ENTRY, "")
    return _Function(run), _metadata(path, entry)


def _metadata(path: Path, text: str) -> ModelMetadata:
    try:
        strings = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: its metadata are missing or damaged. Expected a file that export.py wrote."
        ) from error
    return parse_metadata(path, strings)


def _package(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{path}: needs the package {name}, which cannot be imported ({error}). Install it: "
            "pip install './privdistill[export]'."
        ) from error
