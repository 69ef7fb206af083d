"""One forward pass before training: where the taps are, what shapes they have, what must be cloned.

Networks leave a dry run as they entered it: modes, buffers and random state are restored.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from privdistill.exceptions import LayerNotFoundError, PrivDistillError, ShapeMismatchError
from privdistill.step import Select, find_heads
from privdistill.taps.heads import settle_heads
from privdistill.taps.location import Location, locate_bottleneck
from privdistill.taps.names import find_layer, uncompiled
from privdistill.taps.recorder import Recorder
from privdistill.taps.tap import Layer


class Trial(NamedTuple):
    """What a dry run of one network showed.

    Attributes:
        heads: Logits, `(B, C, *spatial)`, finest first; none if not asked for.
        features: Captured tensors by tap name.
        image: The view, as the network was given it.
        output: All that the network returned.
    """

    heads: list[Tensor]
    features: dict[str, Tensor]
    image: Tensor
    output: Any


def find_places(
    model: nn.Module,
    taps: Mapping[str, Layer],
    image: Tensor | None,
    role: str,
    select: Select = find_heads,
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Resolve each tap's layer to its name; locate the bottleneck where none is named.

    Args:
        model: The network.
        taps: Layer by tap name.
        image: The network's view of the example, or None without one.
        role: "student" or "teacher".
        select: Finds the logits in what the network returns.

    Returns:
        Layer by tap name, and for located ones a sentence on how it was decided.

    Raises:
        LayerNotFoundError: If a layer does not exist or no bottleneck can be told.
    """
    places, notes = {}, {}
    for tap, place in taps.items():
        if place.layer is not None:
            name = find_layer(model, place.layer, tap=tap, role=role)
            places[tap] = replace(place, layer=name)
            continue
        if image is None:
            raise LayerNotFoundError(
                f"Tap '{tap}': no layer of the {role} is named, and without an example the "
                "bottleneck cannot be located. Pass example=torch.zeros(1, C, *spatial) to the "
                "wrapper, or name the layers."
            )
        found = locate(model, image, role, select)
        chosen = found.select if place.select is None else place.select
        places[tap] = replace(place, layer=found.name, select=chosen)
        others = ", ".join(found.candidates[-4:]) or "none"
        notes[tap] = f"{found.how}; also there: {others}"
    return places, notes


def locate(model: nn.Module, image: Tensor, role: str, select: Select = find_heads) -> Location:
    """Locate the bottleneck and leave the network as it was.

    Args:
        model: The network.
        image: Its view of the example.
        role: What messages call the network.
        select: Finds the logits in what the network returns.

    Returns:
        The layer and how it was decided.

    Raises:
        LayerNotFoundError: If no bottleneck can be told.
    """
    with on_trial(model, image, role):
        model.eval()
        return locate_bottleneck(uncompiled(model), place(image, model), select, role=role)


def settle(model: nn.Module, image: Tensor, role: str, *, training: bool, asked: bool) -> Select:
    """Find out which of several outputs of one size are heads, and leave the network as it was.

    Args:
        model: The network.
        image: Its view of the example.
        role: What messages call the network.
        training: Whether it is trained, so that train mode counts.
        asked: Whether the user gave a weight to each head.

    Returns:
        Function from the network's output and the number of spatial axes to its heads.

    Raises:
        ShapeMismatchError: If nothing tells which is the main one.
    """
    with on_trial(model, image, role):
        inner, view = uncompiled(model), place(image, model)
        return settle_heads(inner, view, training=training, asked=asked, role=role)


def run(
    model: nn.Module,
    image: Tensor,
    recorder: Recorder,
    select: Select | None,
    *,
    training: bool = False,
) -> Trial:
    """Run one network once, without gradients and without the compiler.

    Taps that a later layer overwrites in place are marked, so that their hooks clone from now on.

    Args:
        model: The network.
        image: Its view of the example.
        recorder: Hooks on the network.
        select: Function from the network's output and the number of spatial axes to its heads;
            None leaves the output alone.
        training: Run in train mode instead of eval mode.

    Returns:
        The trial.
    """
    image = place(image, model)
    if training and image.shape[0] == 1:
        # batch norm on 1^n maps needs more than one value per channel
        image = torch.cat((image, image))
    version = image._version  # noqa: SLF001
    with on_trial(model, image, recorder.role), recorder.recording() as captured:
        model.train(training)
        output = uncompiled(model)(image)
    recorder.check(captured)
    recorder.cloned.update(recorder.corrupted(captured))
    recorder.edits_input |= image._version != version  # noqa: SLF001
    heads = [] if select is None else select(output, image.ndim - 2)
    return Trial(heads, captured, image, output)


@contextmanager
def on_trial(model: nn.Module, image: Tensor, role: str) -> Iterator[None]:
    """Run without gradients, compiler or autocast, and say which network failed on what.

    Args:
        model: The network; left as it was.
        image: Its view of the example, for the message.
        role: What messages call the network.

    Yields:
        Nothing.

    Raises:
        ShapeMismatchError: If the network fails.
    """
    parameter = next(model.parameters(), None)
    # Autocast knows no meta device.
    device = "cpu" if parameter is None or parameter.is_meta else parameter.device.type
    # Compiled parts keep no version counters and would compile for the example's shape.
    with (
        restored(model),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        torch.autocast(device, enabled=False),
    ):
        try:
            yield
        except PrivDistillError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            raise ShapeMismatchError(
                f"The {role} failed on its view of the example, shape {tuple(image.shape)}:\n"
                f"{error}\nCheck that teacher and student are not swapped, that the modalities "
                "fit the input layers, and that the example has the size the network expects."
            ) from error


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore a network's modes on leaving, module by module: some may have been set apart.

    Args:
        model: The network.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore a network's modes and buffers, and the random state, on leaving.

    Args:
        model: The network.

    Yields:
        Nothing.
    """
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with modes_kept(model), torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                # A forward pass may have replaced the tensor instead of writing into it.
                setattr(module, name, buffer)
                buffer.copy_(value)


def place(image: Tensor, model: nn.Module) -> Tensor:
    """Put the example where the network is; the user's example may lie on the CPU.

    Args:
        image: The network's view of the example.
        model: The network.

    Returns:
        A copy on the network's device, in its dtype.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        return image.clone()
    if image.is_meta and not parameter.is_meta:
        return torch.zeros(image.shape, device=parameter.device, dtype=parameter.dtype)
    # A copy: a network that edits its input must not edit the user's example.
    return image.clone().to(parameter.device, parameter.dtype)
