"""The fastest way to take a step, found by trial, and what a run costs."""

import functools
import importlib.util
import itertools
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from kdnet.config import TrainingConfig
from kdnet.errors import UserError

MemoryFormat = Literal["channels_last", "contiguous"]

#: A choice must take this share of the plain step or less; less is noise, and not worth rounding.
_WORTHWHILE = 0.95
#: After two steps of every candidate, those in the running take turns for this long.
_TRIAL_SECONDS = 2.0
#: A first step that is longer is not repeated before the candidates are compared.
_SHORT_SECONDS = 1.0
#: torch.compile is tried where the run would take this long without it.
_LONG_SECONDS = 1800.0


@dataclass(frozen=True)
class Performance:
    """One way to take a training step.

    Attributes:
        precision: "32-true", "bf16-mixed" or "16-mixed".
        memory_format: Layout of images and weights.
        compile: Whether networks go through torch.compile.
    """

    precision: str = "32-true"
    memory_format: MemoryFormat = "contiguous"
    compile: bool = False

    def __str__(self) -> str:
        compiled = ", compiled" if self.compile else ""
        return f"{self.precision}, {self.memory_format}{compiled}"


def performance_of(resolved: Mapping[str, Any], path: Path) -> Performance:
    """Return the choice with which a run began."""
    allowed = {
        "precision": ("32-true", "bf16-mixed", "16-mixed"),
        "memory_format": ("contiguous", "channels_last"),
        "compile": (False, True),
    }
    for name, values in allowed.items():
        found = resolved.get(name)
        if not isinstance(found, str | bool) or found not in values:
            raise UserError(
                f"{path} is damaged: expected '{name}' of 'resolved' to be one of "
                f"{', '.join(map(str, values))}; found {found!r}. Restore it from a copy; what a "
                "run began with must not change."
            )
    return Performance(**{name: resolved[name] for name in allowed})


#: Seconds of one step taken in a certain way.
Measure = Callable[[Performance], float]


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


def candidates(
    settings: TrainingConfig, device: str, network: nn.Module, shape: Sequence[int]
) -> list[Performance]:
    """List what a trial compares without torch.compile, the plainest first."""
    precisions, formats = ["32-true"], ["contiguous"]
    if settings.performance == "auto":
        precisions += _half_precisions(device, network, shape)
        if settings.strategy == "fsdp":
            # Fabric has no loss scaler for sharded gradients.
            precisions = [name for name in precisions if name != "16-mixed"]
        formats += ["channels_last"]
    if settings.precision != "auto":
        precisions = [settings.precision]
    if settings.memory_format != "auto":
        formats = [settings.memory_format]
    return [
        Performance(precision, cast("MemoryFormat", layout))
        for precision, layout in itertools.product(precisions, formats)
    ]


def _half_precisions(device: str, network: nn.Module, shape: Sequence[int]) -> list[str]:
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ["bf16-mixed" if native else "16-mixed"]
    safe = device == "cpu" and not unsafe_in_bf16(network, shape)
    return ["bf16-mixed"] if safe else []


def may_compile(settings: TrainingConfig, device: str) -> bool:
    """Say whether a trial of torch.compile can pay."""
    left_open = settings.performance == "auto" and settings.compile == "auto"
    left_open &= settings.strategy != "fsdp"
    compiler = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
    triton = importlib.util.find_spec("triton") is not None
    return left_open and device == "cuda" and compiler and triton


def choose(
    options: Sequence[Performance],
    measure: Measure,
    *,
    steps: int,
    compilable: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Performance, dict[str, float]]:
    """Choose the fastest way to take a step by trying them on the network at hand."""
    plain = options[0]
    seconds: dict[Performance, float] = {}
    if len(options) > 1 or compilable:
        seconds = _trial(options, measure, clock)
    best = _faster(plain, seconds)
    if compilable and steps * seconds[best] > _LONG_SECONDS:
        compiled = replace(best, compile=True)
        started = clock()
        measure(compiled)
        spent = clock() - started
        seconds |= _trial([best, compiled], measure, clock)
        # Three networks are compiled, the teacher twice: it trains, and then it teaches.
        if steps * (seconds[best] - seconds[compiled]) > 4 * spent:
            best = compiled
    return best, {str(option): round(value, 6) for option, value in seconds.items()}


def _faster(plain: Performance, seconds: dict[Performance, float]) -> Performance:
    best = min(seconds, key=lambda option: seconds[option], default=plain)
    return best if seconds and seconds[best] < _WORTHWHILE * seconds[plain] else plain


def _trial(
    options: Sequence[Performance], measure: Measure, clock: Callable[[], float]
) -> dict[Performance, float]:
    """Measure in turns, so that a busy moment does not hit one of them alone."""
    measure(options[0])
    seconds = {option: measure(option) for option in options}
    # The first step of each loads its kernels, which takes a GPU longer than many steps.
    short = [option for option in options if seconds[option] < _SHORT_SECONDS]
    seconds |= {option: min(seconds[option], measure(option)) for option in short}
    # Those far behind even so are not worth more: a step may take a minute.
    near = [option for option in options if seconds[option] < 3 * min(seconds.values())]
    near = list(dict.fromkeys((options[0], *near)))
    end = clock() + _TRIAL_SECONDS
    while True:
        seconds |= {option: min(seconds[option], measure(option)) for option in near}
        if clock() >= end:
            return seconds


@contextmanager
def steps_of(network: nn.Module, shape: Sequence[int], device: str) -> Iterator[Measure]:
    """Take steps of a network, for `choose`."""
    network = network.to(device).train()
    compiled = functools.cache(lambda: cast("nn.Module", torch.compile(network)))

    def measure(way: Performance) -> float:
        layout = torch_format(way.memory_format, len(shape) - 2)
        network.to(memory_format=layout)
        image = torch.zeros(*shape, device=device).to(memory_format=layout)
        return _timed_step(compiled() if way.compile else network, image, way.precision)

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield measure
    if compiled.cache_info().currsize:
        torch.compiler.reset()


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
