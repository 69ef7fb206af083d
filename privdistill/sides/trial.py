"""Build the sides of a wrapper, and run everything once before training.

The dry run tells where taps are, what shapes they have, what must be cloned and which outputs are
logits. Networks leave it as they entered it: modes, weights, buffers and random state are restored.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from privdistill.exceptions import LayerNotFoundError, PrivDistillError, ShapeMismatchError
from privdistill.losses.functional import Activation
from privdistill.losses.objective import Objective
from privdistill.sides import heads, probabilities
from privdistill.sides.restored import restored, set_mode
from privdistill.sides.side import Side, check_view, hint
from privdistill.sides.teachers import JointTeacher, Teacher, held, is_offloaded, roles_of
from privdistill.taps.flow import FlowRecorder
from privdistill.taps.location import HeadFinder, Location, locate_bottleneck
from privdistill.taps.names import find_layer, is_program, uncompiled
from privdistill.taps.pairing import Pairing
from privdistill.taps.tap import Layer, Tap, as_layer, brief
from privdistill.text import sizes

T = TypeVar("T")


class Trial(NamedTuple):
    """What a dry run of one network showed."""

    heads: list[Tensor]
    features: dict[str, Tensor]
    image: Tensor
    output: Any


def attach(
    networks: Sequence[nn.Module],
    teacher: Teacher | None,
    taps: dict[str, Tap],
    views: Mapping[str, Tensor],
    *,
    objective: Objective,
    select: HeadFinder,
    weights: int,
) -> list[Side]:
    """Put hooks on the student and the teachers, freeze these, and name located layers in taps."""
    sides: list[Side] = []
    # A build that fails half-way must leave no hook and no frozen teacher behind.
    try:
        roles = ["student", *roles_of(networks[1:])]
        for index, (network, role) in enumerate(zip(networks, roles, strict=True)):
            kind = "teacher" if index else "student"
            layers = {name: as_layer(getattr(tap, kind)) for name, tap in taps.items()}
            if index:
                layers = {n: layer for n, layer in layers.items() if layer.network == index - 1}
            view = views.get(kind)
            reads, chosen = not index or objective.needs_teacher_logits, select
            if view is not None:
                check_view(view, role)
            if reads and select is heads.find_heads:
                trained = not index or isinstance(teacher, JointTeacher)
                chosen = settled(network, view, role, weights=weights, training=trained)
            places, notes = find_places(network, layers, view, role, chosen)
            side = Side(
                network,
                places,
                role=role,
                select=chosen,
                reads_logits=reads,
                read=objective.taps,
                example=None if view is None else tuple(view.shape),
            )
            side.notes = notes
            sides.append(side)
            if index:
                side.run = held(teacher, network)
            for tap, layer in places.items():
                # By name from here on: a layer kept here would drag its network into every copy.
                kept: dict[str, Any] = {kind: brief(layer)}
                taps[tap] = replace(taps[tap], **kept)
    except BaseException:
        give_back(sides)
        raise
    return sides


def try_out(
    sides: Sequence[Side],
    views: Mapping[str, Tensor],
    pairing: Pairing,
    objective: Objective,
    *,
    activation: Activation,
    weights: Sequence[float] | None,
    shares: Sequence[float],
) -> list[str]:
    """Run all networks once, if there is an example, and build adapters and what terms need.

    Returns the sizes of the student's heads.
    """
    if not views:
        pairing.fit({}, {})
        return []
    # The student first: of two networks that fail, its message is the one to read.
    student, *teachers = sides
    sigmoid = _takes_sigmoid(objective, activation)
    own = run(student, views["student"], sigmoid=sigmoid)
    # Train mode may take other paths than eval mode: auxiliary heads, in-place dropout.
    training = run(student, views["student"], training=True)
    heads.head_weights(weights, len(training.heads), training=True)
    found = [run(teacher, views["teacher"], sigmoid=sigmoid) for teacher in teachers]
    # What one network needs two samples for can be compared with two of the others alone.
    if len({len(one.image) for one in (own, training, *found)}) > 1:
        views = {kind: torch.cat((view, view)) for kind, view in views.items()}
        return try_out(
            sides, views, pairing, objective,
            activation=activation, weights=weights, shares=shares,
        )  # fmt: skip
    features = {tap: value for one in found for tap, value in one.features.items()}
    teacher_heads = [one.heads for one in found if one.heads]
    # Before adapters: logits that do not fit are the mistake to hear of first.
    finest = {t.role: f.heads[0] for t, f in zip(teachers, found, strict=True) if f.heads}
    heads.check_heads(own.heads[0], finest)
    pairing.fit(own.features, features)
    # An adapter of the user's own may have batch statistics.
    with torch.no_grad(), restored(pairing.adapters):
        pairs = pairing(own.features, features)
    common = {
        "image": own.image,
        "taps": pairs,
        "activation": activation,
        # Branches that exist only in training are what a term may want to build upon.
        "student_output": training.output,
    }
    objective.build(*heads.steps_by_head(common, own.heads[:1], teacher_heads, shares))
    return [sizes(head.shape[2:]) for head in training.heads]


def _takes_sigmoid(objective: Objective, activation: Activation) -> bool:
    """Whether any term takes a sigmoid of logits; its own option wins."""
    computed = [term for weight, term in objective.named_terms.values() if weight.factor]
    own = [getattr(term, "activation", None) for term in computed if not term.taps]
    return "sigmoid" in (option or activation for option in own)


def channels_of(objective: Objective) -> dict[str, bool]:
    """For each tap that terms read, whether any compares its features channel by channel."""
    terms = [term for weight, term in objective.named_terms.values() if weight.factor]
    return {
        tap: any(term.equal_channels for term in terms if tap in term.taps)
        for tap in objective.taps
    }


def give_back(sides: Sequence[Side]) -> None:
    """Give all networks back as they came."""
    # Backwards, so that of teachers that share a layer the first remembers how it came.
    for side in reversed(sides):
        side.release()


def find_places(
    model: nn.Module,
    taps: Mapping[str, Layer],
    image: Tensor | None,
    role: str,
    find_heads: HeadFinder,
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return each tap's layer by name, and how it was decided where the bottleneck was located."""
    # Its layers have names, so a hook could be put on them, and would never run.
    blocked = [tap for tap, p in taps.items() if is_program(model, parts=p.layer is None)]
    if blocked:
        raise LayerNotFoundError(
            f"The {role} is a program (torch.jit or torch.export), or holds one, which runs no "
            f"hooks for taps {blocked}. Pass the network it was made from, name a layer outside of "
            "it, or use terms that read logits alone."
        )
    places, notes = {}, {}
    for tap, place in taps.items():
        if place.layer is not None:
            asked = _ask(model, place, image, f"Tap '{tap}': the finder for the {role}")
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


def _ask(model: nn.Module, place: Layer, image: Tensor | None, whose: str) -> Layer:
    """Ask a finder of the user's own, if the layer is one."""
    if isinstance(place.layer, str | nn.Module) or not callable(place.layer):
        return place
    # It may run the network as it likes.
    with restored(model), torch.no_grad():
        set_mode(model, training=False)
        try:
            found = place.layer(uncompiled(model), None if image is None else _placed(image, model))
        except Exception as error:
            raise LayerNotFoundError(f"{whose} failed: {type(error).__name__}: {error}") from error
    if isinstance(found, Layer):
        return replace(found, network=place.network)
    return replace(place, layer=found)


def settled(
    model: nn.Module, image: Tensor | None, role: str, *, weights: int = 0, training: bool = False
) -> HeadFinder:
    """Decide which outputs are logits, and leave the network as it was."""
    if image is None:
        return partial(heads.undisputed_heads, weights)
    settle = partial(heads.settle_heads, weights, role, training=training)
    return attempt(model, image, role, settle)


def locate(model: nn.Module, image: Tensor, role: str, find_heads: HeadFinder) -> Location:
    """Locate the bottleneck and leave the network as it was."""
    find = partial(locate_bottleneck, find_heads=find_heads, role=role)
    return attempt(model, image, role, find)


def run(side: Side, view: Tensor, *, training: bool = False, sigmoid: bool = False) -> Trial:
    """Run a network once; note shapes and layouts, and what a later layer overwrites."""
    recorder, axes = side.recorder, view.ndim - 2

    def forward(network: nn.Module, image: Tensor) -> tuple[Tensor, Any, dict[str, Tensor]]:
        version = image._version  # noqa: SLF001
        with recorder.recording() as captured:
            output = network(image)
        recorder.edits_input |= image._version != version  # noqa: SLF001
        return image, output, captured

    image, output, captured = attempt(side.network, view, side.role, forward, training=training)
    recorder.check(captured)
    recorder.cloned.update(recorder.corrupted(captured))
    features = dict(captured)
    side.lay_out(features, view)
    # What is a map already need not be asked in every step.
    side.to_lay_out = [tap for tap in side.to_lay_out if features[tap] is not captured[tap]]
    if not training:
        side.shapes = {tap: tuple(value.shape) for tap, value in features.items()}
        if side.to_lay_out:
            _check_grids(side, view, features)
    if not side.reads_logits:
        return Trial([], features, image, output)
    logits = side.select(output, axes)
    how: dict[str, Any] = {"select": side.select, "role": side.role}
    # Logits may lie in [0, 1] by chance; large random values would drive them out of it.
    if not training and any(map(probabilities.in_unit_interval, logits)):
        noise = 100 * torch.randn(view.shape, generator=torch.Generator().manual_seed(0))
        look = partial(probabilities.check_logits, **how)
        attempt(side.network, noise.to(view), side.role, look)
    if sigmoid and probabilities.may_be_logarithms(logits[0]):
        attempt(side.network, view, side.role, partial(probabilities.check_no_logarithms, **how))
    return Trial(logits, features, image, output)


def _check_grids(side: Side, view: Tensor, features: Mapping[str, Tensor]) -> None:
    """Refuse features whose shape, all that a step knows, tells another grid than they lie on."""

    def find_grids(network: nn.Module, image: Tensor) -> dict[str, tuple[int, ...]]:
        flow = FlowRecorder(image)
        with flow, side.recorder.recording() as captured:
            network(image)
        return {tap: node.grid for tap in side.to_lay_out for node in flow.nodes(captured[tap])}

    for tap, grid in attempt(side.network, view, side.role, find_grids).items():
        read = tuple(features[tap].shape[2:])
        if grid != read:
            raise ShapeMismatchError(
                f"Tap '{tap}': layer '{side.places[tap]}' of the {side.role} gives features on a "
                f"grid of {sizes(grid) or 'no map'}; by their shape, all that a step knows, they "
                f"would be read as {sizes(read)}. Choose another layer, or bring them into the "
                "form (B, C, *spatial) with Layer(..., select=function)."
            )


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
                "layers, that the image is large enough for every downsampling, and that the "
                "example has the size and dtype of the batches (build the wrapper under "
                f"torch.autocast if steps run so).{hint(error)}"
            ) from error


def _placed(image: Tensor, model: nn.Module) -> Tensor:
    """Copy the example, which a network may edit, to where the network is."""
    devices = [p.device for p in model.parameters()]
    offloaded = is_offloaded(model)
    real = [device for device in devices if device.type != "meta" or not offloaded]
    device = min(real, key=lambda d: d.type == "meta", default=image.device)
    return torch.zeros_like(image, device=device) if image.is_meta else image.clone().to(device)
