"""Build the sides of a wrapper: hooks on, teachers frozen, everything tried out once."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from privdistill.losses.functional import Activation
from privdistill.losses.objective import Objective
from privdistill.sides.heads import check_heads, head_weights, steps_by_head
from privdistill.sides.restored import restored
from privdistill.sides.side import Side
from privdistill.sides.teachers import Teacher, held, roles_of
from privdistill.taps.location import HeadFinder
from privdistill.taps.pairing import Pairing
from privdistill.taps.tap import Tap, as_layer, brief
from privdistill.text import sizes


def attach(
    networks: Sequence[nn.Module],
    teacher: Teacher | None,
    taps: dict[str, Tap],
    views: Mapping[str, Tensor],
    *,
    objective: Objective,
    select: HeadFinder | None,
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
            side = Side(
                network,
                layers,
                views.get(kind),
                role=role,
                select=select,
                reads_logits=not index or objective.needs_teacher_logits,
                read=objective.taps,
            )
            sides.append(side)
            if index:
                side.run = held(teacher, network)
            for tap, layer in side.places.items():
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
    student, *teachers = sides
    asked = len(weights or ()) > 1
    own = student.try_out(views["student"], asked=asked)
    # Train mode may take other paths than eval mode: auxiliary heads, in-place dropout.
    training = student.try_out(views["student"], training=True, asked=asked)
    head_weights(weights, len(training.heads), training=True)
    found = [teacher.try_out(views["teacher"]) for teacher in teachers]
    features = {tap: value for one in found for tap, value in one.features.items()}
    teacher_heads = [one.heads for one in found if one.heads]
    # Before adapters: logits that do not fit are the mistake to hear of first.
    check_heads(own.heads[0], [heads[0] for heads in teacher_heads])
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
    objective.build(*steps_by_head(common, own.heads[:1], teacher_heads, shares))
    return [sizes(head.shape[2:]) for head in training.heads]


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
