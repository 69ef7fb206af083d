"""Precision and memory layout by trial, and what a run costs."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from errors import UserError

MemoryFormat = Literal["channels_last", "contiguous"]

_TRIAL_SECONDS = 0.25


def device_type(accelerator: str) -> str:
    """Return "cuda", "mps" or "cpu" for the accelerator that Fabric would take.

    Args:
        accelerator: auto, cpu, gpu, cuda or mps.
    """
    if accelerator in {"auto", "gpu", "cuda"} and torch.cuda.is_available():
        return "cuda"
    if accelerator in {"auto", "gpu", "mps"} and torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def choose_precision(setting: str, device: str, network: nn.Module, shape: tuple[int, ...]) -> str:
    """Resolve the precision "auto".

    Args:
        setting: "auto", or a precision that is returned as it is.
        device: "cuda", "mps" or "cpu".
        network: One of the networks to be trained.
        shape: Shape of its input, (1, C, X, Y, Z).

    Returns:
        "32-true", "bf16-mixed" or "16-mixed".

    Raises:
        UserError: If bf16 is asked for where its gradients would be wrong.
    """
    if device == "cuda" and setting == "auto":
        return (
            "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
        )
    if device != "cpu" or setting not in {"auto", "bf16-mixed"}:
        return "32-true" if setting == "auto" else setting
    layers = unsafe_in_bf16(network, shape)
    if setting == "bf16-mixed" and layers:
        raise UserError(
            f"--precision bf16-mixed gives wrong gradients on a CPU where a 3-D convolution sees a "
            f"volume of depth 2, as here: {', '.join(layers)}. Use --precision 32-true, a larger "
            "--grid, or a network with fewer levels."
        )
    if setting == "auto" and (layers or not _bf16_is_faster_on_cpu()):
        return "32-true"
    return "bf16-mixed"


def unsafe_in_bf16(network: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Find the 3-D convolutions whose bf16 weight gradient is wrong on a CPU.

    For a volume of depth 2 the kernel of oneDNN (seen with PyTorch 2.14.1) reads memory that was
    never written: the gradient is noise, or not a number. Depths 1, 3 and above are right.

    Args:
        network: Runs once, in eval mode; it is left as it was.
        shape: Shape of its input.

    Returns:
        Names of the layers.
    """
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
            network.eval()(torch.zeros(shape))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return names


def _bf16_is_faster_on_cpu() -> bool:
    # Processors without bf16 instructions emulate them, ten times slower: measured, not looked up.
    network = nn.Sequential(nn.Conv3d(16, 16, 3, padding=1), nn.Conv3d(16, 16, 3, padding=1))
    image = torch.zeros(1, 16, 24, 24, 24)
    threads = torch.get_num_threads()
    # Threads that wait for one another would measure what else the machine is doing.
    torch.set_num_threads(1)
    try:
        # In turns, so that a busy moment does not hit one of them alone.
        rounds = [
            [step_seconds(network, image, precision=name) for name in ("32-true", "bf16-mixed")]
            for _ in range(2)
        ]
    finally:
        torch.set_num_threads(threads)
    return min(half for _, half in rounds) < min(full for full, _ in rounds)


def choose_memory_format(
    setting: str, network: nn.Module, shape: tuple[int, ...], *, precision: str, device: str
) -> MemoryFormat:
    """Resolve the memory format "auto" by steps of the network at hand.

    Neither layout is always faster: on a CPU, channels last wins for few channels and loses by
    far for many.

    Args:
        setting: "auto", or a format that is returned as it is.
        network: It runs forward and backward; its format and gradients are as before afterwards.
        shape: Shape of a training batch, (B, C, X, Y, Z).
        precision: "32-true", "bf16-mixed" or "16-mixed".
        device: Where it runs.

    Returns:
        "channels_last" or "contiguous".
    """
    if setting != "auto":
        return "channels_last" if setting == "channels_last" else "contiguous"
    network = network.to(device)
    seconds = {"contiguous": float("inf"), "channels_last": float("inf")}
    with torch.random.fork_rng():
        for name in (*seconds, *seconds):
            layout = torch_format(name)
            image = torch.zeros(shape, device=device).to(memory_format=layout)
            network.to(memory_format=layout)
            measured = step_seconds(network, image, precision=precision)
            seconds[name] = min(seconds[name], measured)
    network.to(memory_format=torch.contiguous_format)
    return "channels_last" if seconds["channels_last"] < seconds["contiguous"] else "contiguous"


def torch_format(name: str) -> torch.memory_format:
    """Return PyTorch's memory format for volumes (B, C, X, Y, Z).

    Args:
        name: "channels_last" or "contiguous".
    """
    return torch.channels_last_3d if name == "channels_last" else torch.contiguous_format


def step_seconds(network: nn.Module, image: torch.Tensor, *, precision: str) -> float:
    """Measure a forward and backward pass.

    Args:
        network: The network; its gradients are cleared.
        image: Its input.
        precision: "32-true", "bf16-mixed" or "16-mixed".

    Returns:
        Seconds of the fastest of several steps, after one to warm up.
    """
    _timed_step(network, image, precision)
    fastest = float("inf")
    end = time.perf_counter() + _TRIAL_SECONDS
    while fastest == float("inf") or time.perf_counter() < end:
        fastest = min(fastest, _timed_step(network, image, precision))
    return fastest


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
    """Wall-clock time per phase.

    Args:
        seconds: What earlier parts of the same run took, by phase.

    Example:
        >>> watch = Stopwatch({"teacher": 2.0})
        >>> with watch.phase("teacher"):
        ...     pass
        >>> round(watch.seconds["teacher"])
        2
    """

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
