"""What a step costs in each precision, and what a run costs."""

import itertools
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from kdnet.config import TrainingConfig
from kdnet.errors import UserError

MemoryFormat = Literal["channels_last", "contiguous"]


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


def recommend(settings: TrainingConfig, network: nn.Module, shape: Sequence[int]) -> list[str]:
    """Measure a step of a network in every precision and memory format, the fastest first."""
    device = device_type(settings.accelerator)
    precisions = ["32-true", *_half_precisions(device, network, shape)]
    seconds = {
        (precision, layout): _seconds(network.to(device).train(), shape, precision, layout)
        for precision, layout in itertools.product(precisions, ("contiguous", "channels_last"))
    }
    ordered = sorted(seconds, key=lambda way: seconds[way])
    precision, layout = ordered[0]
    advice = (
        f"Fastest here: --precision {precision} --memory_format {layout}. Another precision gives "
        "other numbers: keep one for all networks that are compared."
    )
    return [*(f"{seconds[way]:8.4f} s a step  {', '.join(way)}" for way in ordered), advice]


def _half_precisions(device: str, network: nn.Module, shape: Sequence[int]) -> list[str]:
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ["bf16-mixed" if native else "16-mixed"]
    safe = device == "cpu" and not unsafe_in_bf16(network, shape)
    return ["bf16-mixed"] if safe else []


def _seconds(network: nn.Module, shape: Sequence[int], precision: str, layout: str) -> float:
    """Shortest of the steps of two seconds, after one that loads the kernels."""
    memory = torch_format(layout, len(shape) - 2)
    network.to(memory_format=memory)  # type: ignore[call-overload]
    device = next(network.parameters()).device
    image = torch.zeros(*shape, device=device).to(memory_format=memory)
    _timed_step(network, image, precision)
    best, end = float("inf"), time.perf_counter() + 2.0
    while time.perf_counter() < end or best == float("inf"):
        best = min(best, _timed_step(network, image, precision))
    return best


def device_type(accelerator: str) -> str:
    """Return "cuda", "mps" or "cpu" for the accelerator that Fabric would take."""
    if accelerator in {"auto", "gpu", "cuda"} and torch.cuda.is_available():
        return "cuda"
    if accelerator in {"auto", "gpu", "mps"} and torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def unsafe_in_bf16(network: nn.Module, shape: Sequence[int]) -> list[str]:
    """Find the 3-D convolutions whose bf16 weight gradient is wrong on a CPU."""
    names: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:  # noqa: ARG001
            if inputs[0].shape[2] == 2:
                names.append(name)

        return hook

    hooks = [
        module.register_forward_pre_hook(look(name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv3d)
    ]
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(*shape))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return names


def torch_format(name: str, axes: int = 3) -> torch.memory_format:
    """Return PyTorch's memory format for images (B, C, *spatial)."""
    if name != "channels_last":
        return torch.contiguous_format
    return torch.channels_last if axes == 2 else torch.channels_last_3d


def _timed_step(network: nn.Module, image: torch.Tensor, precision: str) -> float:
    start = time.perf_counter()
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with torch.autocast(image.device.type, dtype=half, enabled=half is not None):
        output: Any = network(image)
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    output.float().mean().backward()  # type: ignore[no-untyped-call]
    network.zero_grad(set_to_none=True)
    if image.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Stopwatch:
    """Wall-clock time per phase."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to a phase, also if an exception leaves it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_memory() -> dict[str, float]:
    """Return the peak memory so far, MiB: of this process and of the GPU."""
    # Linux counts in KiB, macOS in bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peaks = {
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
    }
    if torch.cuda.is_available():
        peaks["gpu"] = torch.cuda.max_memory_allocated() / 2**20
    return {name: round(value, 1) for name, value in peaks.items()}
