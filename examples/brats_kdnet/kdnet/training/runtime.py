"""What a training runs on: precision, memory, several processes, signals, and numbers that fail."""

import copy
import itertools
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.benchmark import Timer

from kdnet.config import TrainingConfig
from kdnet.data.loading import Batch
from kdnet.errors import UserError
from privdistill import DistillationWrapper, Output, PrivilegedInput

#: A way to take steps is measured for this long.
_MEASURED_SECONDS = 2.0
_SHOWN = 5


# Precision and memory format


def device_type(accelerator: str) -> str:
    """Return "cuda", "mps" or "cpu" for the accelerator that Fabric would take."""
    if accelerator in {"auto", "gpu", "cuda"} and torch.cuda.is_available():
        return "cuda"
    if accelerator in {"auto", "gpu", "mps"} and torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def torch_format(name: str, axes: int = 3) -> torch.memory_format:
    """Return PyTorch's memory format for images (B, C, *spatial)."""
    if name != "channels_last":
        return torch.contiguous_format
    return torch.channels_last if axes == 2 else torch.channels_last_3d


def check_precision(precision: str, device: str, network: nn.Module, shape: Sequence[int]) -> None:
    """Refuse bf16 where its gradients would be wrong."""
    if device != "cpu" or precision != "bf16-mixed":
        return
    if layers := unsafe_in_bf16(network, shape):
        raise UserError(
            f"--precision bf16-mixed gives wrong gradients on a CPU where a 3-D convolution sees a "
            f"volume of depth 2, as here: {', '.join(layers)}. Use --precision 32-true, a larger "
            "--grid, or a network with fewer levels."
        )


def unsafe_in_bf16(network: nn.Module, shape: Sequence[int]) -> list[str]:
    """Find the 3-D convolutions of a new network whose bf16 weight gradient is wrong on a CPU."""
    names = {module: name for name, module in network.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[2] == 2:
            found.append(names[module])

    hooks = [m.register_forward_pre_hook(look) for m in names if isinstance(m, nn.Conv3d)]
    # Not in training mode, in which batch norms refuse one voxel and change their statistics.
    network.eval()
    with torch.no_grad():
        network(torch.zeros(*shape))
    network.train()
    for hook in hooks:
        hook.remove()
    return found


def measure_steps(
    network: nn.Module, shape: Sequence[int], accelerator: str = "auto"
) -> dict[tuple[str, str], float]:
    """Return the seconds of a training step by precision and memory format, the fastest first."""
    device, half = device_type(accelerator), "bf16-mixed"
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        half = "16-mixed"
    measured = device == "cuda" or (device == "cpu" and not unsafe_in_bf16(network, shape))
    precisions = ["32-true", *[half] * measured]
    network = network.to(device).train()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        seconds = {
            way: _seconds(network, shape, *way)
            for way in itertools.product(precisions, ("contiguous", "channels_last"))
        }
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def recommend(settings: TrainingConfig, network: nn.Module, shape: Sequence[int]) -> list[str]:
    """Say what was measured, and which options are the fastest here."""
    seconds = measure_steps(network, shape, settings.accelerator)
    precision, layout = next(iter(seconds))
    lines = [f"{value:8.4f} s a step  {', '.join(way)}" for way, value in seconds.items()]
    advice = (
        f"Fastest here: --precision {precision} --memory-format {layout}. Another precision gives "
        "other numbers: keep one for all networks that are compared."
    )
    return [*lines, advice]


def _seconds(network: nn.Module, shape: Sequence[int], precision: str, layout: str) -> float:
    """The shortest of the steps that two seconds have room for."""
    memory = torch_format(layout, len(shape) - 2)
    network.to(memory_format=memory)
    image = torch.zeros(*shape, device=next(network.parameters()).device).to(memory_format=memory)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)

    def step() -> None:
        with torch.autocast(image.device.type, dtype=half, enabled=half is not None):
            output: Any = network(image)
        while not isinstance(output, Tensor):
            output = next(iter(output.values())) if isinstance(output, dict) else output[0]
        output.float().mean().backward()  # type: ignore[no-untyped-call]
        network.zero_grad(set_to_none=True)

    # It loads the kernels beforehand, and waits for a GPU.
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=_MEASURED_SECONDS).times)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time spent in the block to a phase, also if an exception leaves it."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def peak_memory() -> dict[str, float]:
    """Return the peak memory so far, MiB: of this process and of the GPU."""
    # Linux counts in KiB, macOS in bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peaks = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if torch.cuda.is_available():
        peaks["gpu"] = torch.cuda.max_memory_allocated() / 2**20
    return {name: round(value, 1) for name, value in peaks.items()}


# Several processes: FSDP2 spreads weights, gradients and Adam's moments; files hold whole tensors


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Leave each process its part of the weights; for Fabric's `ModelParallelStrategy`."""
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            distributed.broadcast(tensor.data, 0)
    every = init_device_mesh(mesh.device_type, (distributed.get_world_size(),))
    # Whole until the backward pass, as one unit has nothing to gain from being gathered twice.
    fully_shard(model, mesh=every, reshard_after_forward=False)
    return model


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep the weights whole in the block, so that processes may run forward at their own pace."""
    if not isinstance(model, FSDPModule):
        yield
        return
    for buffer in model.buffers():
        distributed.broadcast(buffer, 0)
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def whole(value: Any) -> Any:
    """Gather the tensors of a state; all processes must ask."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        # A copy keeps what PyTorch notes on a state besides its entries.
        twin = copy.copy(value)
        twin.update({key: whole(item) for key, item in value.items()})
        return twin
    return [whole(item) for item in value] if isinstance(value, list) else value


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give each process its part of whole weights."""
    there = model.state_dict()
    model.load_state_dict({name: _like(value, there.get(name)) for name, value in weights.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give each process its part of an optimizer's state."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {
        index: {name: _like(value, weights[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _like(value: Any, other: Any) -> Any:
    """A tensor spread like another of its shape; anything else as it is."""
    # An optimizer also counts its steps, which every process does for itself.
    if not (isinstance(other, DTensor) and value.shape == other.shape):
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


# Numbers that are not finite


class NonFiniteError(UserError):
    """An image, loss or gradient is infinite or not a number; what is on disk was made before."""


def check_image(batch: Batch, kd: DistillationWrapper, where: str) -> None:
    """Look at the images before the network does, whose running statistics they would spoil."""
    image = batch["image"]
    if bool(torch.isfinite(image).all()):
        return
    modalities = [*cast("PrivilegedInput", kd.inputs).channels]
    wrong = (~torch.isfinite(image)).flatten(2).sum(2).tolist()
    found = [
        f"{int(count)} of {image[0, 0].numel()} voxels of {modalities[channel]} of {name}"
        for name, counts in zip(batch["name"], wrong, strict=True)
        for channel, count in enumerate(counts)
        if count
    ]
    more = f" and {len(found) - _SHOWN} more" * (len(found) > _SHOWN)
    raise NonFiniteError(
        f"Training stopped ({where}): not finite are {', '.join(found[:_SHOWN])}{more}. Nothing "
        "was computed with it. Repair or remove these cases (check_data.py names every file that "
        "is not finite) and give the same command with a new --out."
    )


def check_step(fabric: Fabric, batch: Batch, out: Output, norm: Tensor | None, where: str) -> float:
    """Return the loss of a step that the optimizer has not taken yet, if it may be taken."""
    slope = torch.zeros(()) if norm is None else torch.as_tensor(whole(norm))
    numbers = [value.detach().float().to(out.loss.device) for value in (out.loss, slope)]
    # Both at once, as each look at a GPU's numbers waits for it.
    loss, length = torch.stack(numbers).tolist()
    # Under fp16 an infinite gradient is how the loss scaler finds its scale: it skips the step.
    scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
    if math.isfinite(loss) and (scaled or math.isfinite(length)):
        return float(loss)
    terms = ", ".join(f"{name} {float(value):.4g}" for name, value in out.terms.items())
    raise NonFiniteError(
        f"Training stopped ({where}): expected finite numbers, found loss {loss:.4g} and "
        f"gradient norm {length:.4g}. Terms: {terms}. Cases: {', '.join(batch['name'])}.\n"
        "The weights of the last finished epoch are kept. Look at these cases, lower "
        "--learning-rate, set --gradient-clip, or use --precision 32-true; then choose a new --out."
    )
