"""One forward pass before training: where the taps are, what shapes they have, what must be cloned.

Networks leave a dry run as they entered it: modes, weights, buffers and random state are restored.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from privdistill.exceptions import LayerNotFoundError, PrivDistillError, ShapeMismatchError
from privdistill.probabilities import check_logits
from privdistill.step import Select, find_heads
from privdistill.taps.heads import settle_heads
from privdistill.taps.location import Location, locate_bottleneck
from privdistill.taps.names import find_layer, is_program, uncompiled
from privdistill.taps.recorder import Recorder
from privdistill.taps.tap import Layer

T = TypeVar("T")


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
        LayerNotFoundError: If a layer does not exist, the network has no hooks, or no bottleneck
            can be told.
    """
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
            found = locate(model, image, role, select)
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
    inner = uncompiled(model)

    def find(view: Tensor) -> Location:
        return locate_bottleneck(inner, view, select, role=role)

    return attempt(model, image, role, find)


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
    inner = uncompiled(model)

    def find(view: Tensor) -> Select:
        return settle_heads(inner, view, training=training, asked=asked, role=role)

    return attempt(model, image, role, find)


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
    inner = uncompiled(model)

    def forward(view: Tensor) -> tuple[Tensor, Any, dict[str, Tensor]]:
        version = view._version  # noqa: SLF001
        with recorder.recording() as captured:
            output = inner(view)
        recorder.edits_input |= view._version != version  # noqa: SLF001
        return view, output, captured

    view, output, captured = attempt(model, image, recorder.role, forward, training=training)
    recorder.check(captured)
    recorder.cloned.update(recorder.corrupted(captured))
    heads = [] if select is None else select(output, image.ndim - 2)
    return Trial(heads, captured, view, output)


def check_heads(
    model: nn.Module, heads: list[Tensor], select: Select, image: Tensor, role: str
) -> None:
    """Refuse heads that are probabilities.

    Args:
        model: The network.
        heads: Its heads for the example, in eval mode.
        select: Finds them in what the network returns.
        image: Its view of the example.
        role: What messages call the network.

    Raises:
        ObjectiveError: If they are.
    """
    inner = uncompiled(model)

    def again(noise: Tensor) -> list[Tensor]:
        return attempt(model, noise, role, lambda view: select(inner(view), image.ndim - 2))

    check_logits(heads, again, image, role)


def attempt(
    model: nn.Module,
    image: Tensor,
    role: str,
    function: Callable[[Tensor], T],
    *,
    training: bool = False,
) -> T:
    """Try what a network does, without gradients or compiler, and leave it as it was.

    The input has the example's dtype, as the step's has that of the batch. Autocast is the
    caller's where network and input differ in dtype, and off otherwise.

    Args:
        model: The network.
        image: Its view of the example; two such samples where a norm refuses one.
        role: What messages call the network.
        function: What is tried, a function of the network's input.
        training: Try it in train mode instead of eval mode.

    Returns:
        What the function returned.

    Raises:
        ShapeMismatchError: If the network fails; says which one, and on what.
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
            return function(view)
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


def set_mode(model: nn.Module, *, training: bool) -> None:
    """Put a network into train or eval mode; exported programs have flags alone.

    Args:
        model: The network.
        training: Train mode, or eval mode.
    """
    try:
        model.train(training)
    except NotImplementedError:
        for module in model.modules():
            module.training = training


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
    """Restore a network's modes, weights and buffers, and the random state, on leaving.

    Args:
        model: The network.

    Yields:
        Nothing.
    """
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    values = [(t, t.clone()) for t in chain(model.parameters(), model.buffers()) if _writable(t)]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with modes_kept(model), torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for module, name, buffer in buffers:
            # A forward pass may have replaced the tensor instead of writing into it.
            setattr(module, name, buffer)
        for tensor, value in values:
            # Through `data`, so that nothing that holds the weights takes them for changed.
            tensor.data.copy_(value)


def _writable(tensor: Tensor) -> bool:
    """Whether a forward pass can write into a tensor: not if it is expanded, sharded or packed."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and not (tensor.is_meta or tensor.is_inference() or 0 in tensor.stride())
