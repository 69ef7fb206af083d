"""One forward pass before training: where the taps are, what shapes they have, what must be cloned.

Networks leave a dry run as they entered it: modes, weights, buffers and random state are restored.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from privdistill.exceptions import LayerNotFoundError, PrivDistillError, ShapeMismatchError
from privdistill.sides.restored import restored, set_mode
from privdistill.taps.location import HeadFinder, Location, locate_bottleneck
from privdistill.taps.names import find_layer, is_program, uncompiled
from privdistill.taps.recorder import Recorder
from privdistill.taps.tap import Layer

T = TypeVar("T")


class Trial(NamedTuple):
    """What a dry run of one network showed: the heads and features of a view, and all else."""

    heads: list[Tensor]
    features: dict[str, Tensor]
    image: Tensor
    output: Any


def find_places(
    model: nn.Module,
    taps: Mapping[str, Layer],
    image: Tensor | None,
    role: str,
    find_heads: HeadFinder,
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return each tap's layer by name, and how it was decided where the bottleneck was located."""
    if taps and is_program(model):
        raise LayerNotFoundError(
            f"The {role} is a program (torch.jit or torch.export), which runs no hooks for taps "
            f"{list(taps)}. Pass the network it was made from, or terms that read logits alone."
        )
    places, notes = {}, {}
    for tap, place in taps.items():
        if place.layer is not None:
            asked = _ask(model, place, image)
            places[tap] = replace(asked, layer=find_layer(model, asked.layer, tap=tap, role=role))
        elif image is None:
            raise LayerNotFoundError(
                f"Tap '{tap}': no layer of the {role} is named, and none can be located without an "
                "example. Pass example=torch.zeros(1, C, *spatial) to the wrapper, or name one."
            )
        else:
            found = locate(model, image, role, find_heads)
            chosen = found.select if place.select is None else place.select
            places[tap] = replace(place, layer=found.name, select=chosen)
            others = ", ".join(found.candidates[-4:]) or "none"
            notes[tap] = f"{found.how}; also there: {others}"
    return places, notes


def _ask(model: nn.Module, place: Layer, image: Tensor | None) -> Layer:
    """Ask a finder of the user's own, if the layer is one."""
    if isinstance(place.layer, str | nn.Module) or not callable(place.layer):
        return place
    # It may run the network as it likes.
    with restored(model), torch.no_grad():
        set_mode(model, training=False)
        found = place.layer(uncompiled(model), None if image is None else _placed(image, model))
    if isinstance(found, Layer):
        return replace(found, network=place.network)
    return replace(place, layer=found)


def locate(model: nn.Module, image: Tensor, role: str, find_heads: HeadFinder) -> Location:
    """Locate the bottleneck and leave the network as it was."""

    def find(network: nn.Module, view: Tensor) -> Location:
        return locate_bottleneck(network, view, find_heads, role=role)

    return attempt(model, image, role, find)


def run(model: nn.Module, image: Tensor, recorder: Recorder, *, training: bool = False) -> Trial:
    """Run a network once; mark taps that a later layer overwrites in place, to be cloned."""

    def forward(network: nn.Module, view: Tensor) -> tuple[Tensor, Any, dict[str, Tensor]]:
        version = view._version  # noqa: SLF001
        with recorder.recording() as captured:
            output = network(view)
        recorder.edits_input |= view._version != version  # noqa: SLF001
        return view, output, captured

    view, output, captured = attempt(model, image, recorder.role, forward, training=training)
    recorder.check(captured)
    recorder.cloned.update(recorder.corrupted(captured))
    return Trial([], captured, view, output)


def attempt(
    model: nn.Module,
    image: Tensor,
    role: str,
    function: Callable[[nn.Module, Tensor], T],
    *,
    training: bool = False,
) -> T:
    """Return what a function makes of network and view, without gradients or compiler.

    The input has the example's dtype, as the step's has that of the batch. Autocast is the
    caller's where network and input differ in dtype, and off otherwise.
    """
    view = _placed(image, model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), image.dtype)
    # Autocast knows no meta device.
    device = "cpu" if view.is_meta else view.device.type
    mixed = dtype != image.dtype and torch.is_autocast_enabled(device)
    # Compiled parts keep no version counters and would compile for the example's shape.
    with (
        restored(model),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        torch.autocast(device, enabled=mixed),
    ):
        set_mode(model, training=training)
        try:
            return function(uncompiled(model), view)
        except PrivDistillError:
            raise
        except Exception as error:
            # Batch norm needs more than one value per channel.
            if len(image) == 1:
                two = torch.cat((image, image))
                with suppress(ShapeMismatchError):
                    return attempt(model, two, role, function, training=training)
            raise ShapeMismatchError(
                f"The {role} failed on its view of the example, {image.dtype} "
                f"{tuple(image.shape)}, with weights of {dtype}:\n{type(error).__name__}: {error}\n"
                "Check that teacher and student are not swapped, that the modalities fit the input "
                "layers, and that the example has the size and dtype of the batches (build the "
                "wrapper under torch.autocast if steps run so). A network called as "
                "network(image, mask) goes into a module whose forward(image) makes the mask."
            ) from error


def _placed(image: Tensor, model: nn.Module) -> Tensor:
    """Copy the example, which a network may edit, to where the network is."""
    devices = [p.device for p in model.parameters()]
    # Weights that accelerate has offloaded are meta until their layer runs.
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    real = [device for device in devices if device.type != "meta" or not offloaded]
    device = min(real, key=lambda d: d.type == "meta", default=image.device)
    return torch.zeros_like(image, device=device) if image.is_meta else image.clone().to(device)
