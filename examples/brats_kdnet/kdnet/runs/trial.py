"""How training steps are taken: what is refused, tried out and recorded."""

from dataclasses import asdict, replace

from lightning_fabric import Fabric
from rich.console import Console

from kdnet.config import Config
from kdnet.data.description import Description
from kdnet.data.samples import samples_per_subject
from kdnet.data.splits import Split
from kdnet.runs.folders import out_folder
from kdnet.runs.networks import build, describe_network
from kdnet.runs.subjects import find_description
from kdnet.runs.run_folder import RunFolder
from kdnet.training.checkpoint import ModelMetadata
from kdnet.training.performance import (
    Performance,
    candidates,
    check_precision,
    choose,
    device_type,
    may_compile,
    performance_of,
    steps_of,
)


def refuse_wrong_gradients(config: Config) -> None:
    """Refuse a precision whose gradients would be wrong, before anything is started or written."""
    training, description = config.training, find_description(config)
    for role in ("teacher", "student"):
        metadata = describe_network(role, config, description)
        check_precision(
            training.precision,
            device_type(training.accelerator),
            build(metadata),
            (1, metadata.in_channels, *metadata.input_size),
        )


def settle(
    config: Config, description: Description, split: Split, *, fabric: Fabric, console: Console
) -> Performance:
    """Choose how steps are taken, unless an earlier part of the run has; record it in the run."""
    run = RunFolder(out_folder(config))
    resolved = run.resolved()
    if not resolved and fabric.is_global_zero:
        network = describe_network("student", config, description)
        samples = len(split.train) * samples_per_subject(config.data, network.grid)
        steps = -(-samples // (config.training.batch_size * fabric.world_size))
        choice, seconds = try_out(config, network, fabric.device.type, steps)
        show_trial(console, choice, seconds)
        resolved = asdict(choice) | {"trial_seconds": seconds}
    resolved = fabric.broadcast(resolved)
    resolved |= {"device": str(fabric.device), "world_size": fabric.world_size}
    performance = performance_of(resolved, run.environment)
    if fabric.is_global_zero:
        run.write_environment(seed=config.training.seed, resolved=resolved)
    return performance


def try_out(
    config: Config, metadata: ModelMetadata, device: str, steps: int
) -> tuple[Performance, dict[str, float]]:
    """Compare ways to take a step of a network."""
    training, network = config.training, build(metadata)
    shape = (training.batch_size, metadata.in_channels, *metadata.input_size)
    options = candidates(training, device, network, shape)
    with steps_of(network, shape, device) as measure:
        choice, seconds = choose(
            options,
            measure,
            steps=training.epochs * steps,
            compilable=may_compile(training, device),
        )
    return (replace(choice, compile=True) if training.compile is True else choice), seconds


def show_trial(console: Console, choice: Performance, seconds: dict[str, float]) -> None:
    """Print what a trial measured, the fastest first; nothing if there was none."""
    for name, value in sorted(seconds.items(), key=lambda item: item[1]):
        mark = "  <- taken" if name == str(choice) else ""
        console.print(f"Trial step: {value:8.4f} s  {name}{mark}", highlight=False, soft_wrap=True)
