"""What a printed wrapper says of its networks, heads and taps."""

from collections.abc import Iterable, Sequence

from privdistill.sides.frozen import Frozen, Resting
from privdistill.sides.heads import head_weights
from privdistill.sides.side import Side, why_not_left_early
from privdistill.taps.names import is_compiled, uncompiled
from privdistill.taps.pairing import Pairing
from privdistill.text import columns, sizes


def network_line(side: Side, *, compiled: bool) -> str:
    """Say what a network is and how far it runs, perhaps in a compiled wrapper."""
    network = uncompiled(side.network)
    parts = [type(network).__name__]
    if is_compiled(side.network.modules()):
        parts.append("compiled")
    # Quantised layers and tensors have no common base class, but telling modules.
    kinds = {type(part).__module__ for part in (*network.modules(), *network.parameters())}
    if any("quantiz" in kind or "torchao" in kind for kind in kinds):
        parts.append("quantised")
    if isinstance(side.run, Resting):
        parts.append("frozen" if isinstance(side.run, Frozen) else "average of the student")
    elif side.role != "student":
        parts.append("trained too")
    if not side.reads_logits:
        parts.append(_how_far(side, compiled=compiled))
    return f"  {side.role}: {', '.join(parts)}"


def _how_far(side: Side, *, compiled: bool) -> str:
    if not side.places:
        return "does not run, as no term reads it"
    why = why_not_left_early(side)
    # Known to the wrapper alone, as it was compiled after its sides were built.
    if compiled:
        why = "the wrapper is compiled, and a graph cannot be left half-way"
    if why:
        return f"runs to its end, as {why}"
    return "stops at its last tap, as no term reads its logits"


def head_lines(given: Sequence[float] | None, head_sizes: Sequence[str]) -> list[str]:
    """Say what each head weighs under deep supervision."""
    # One head has no weight to speak of.
    if len(head_sizes) < 2:
        return []
    weights = head_weights(given, len(head_sizes))
    listed = [f"{weight:.3g} ({size})" for weight, size in zip(weights, head_sizes, strict=True)]
    return [f"  deep supervision, weight of each head: {', '.join(listed)}"]


def tap_lines(taps: Iterable[str], sides: Sequence[Side], pairing: Pairing) -> list[str]:
    """The table of taps, a row for each network, and how bottlenecks were located."""
    rows = []
    for tap in taps:
        tapped = [side for side in sides if tap in side.places]
        adapter = pairing.describe(tap, *(side.shapes.get(tap, ()) for side in tapped))
        for name, cell, side in zip((tap, ""), (adapter, ""), tapped, strict=False):
            shape = sizes(side.shapes[tap][1:]) if tap in side.shapes else "not run yet"
            rows.append((name, side.role, str(side.places[tap]), shape, cell))
    table = columns([("tap", "network", "layer", "shape", "adapter"), *rows]) if rows else []
    notes = [f"  {side.role} {tap}: {note}" for side in sides for tap, note in side.notes.items()]
    return [*table, *notes]
