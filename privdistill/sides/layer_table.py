"""The table of layers that a person reads to choose taps."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from privdistill.exceptions import LayerNotFoundError, ShapeMismatchError
from privdistill.inputs import plain
from privdistill.sides.heads import chosen_heads
from privdistill.sides.trial import attempt, locate, settled
from privdistill.taps.layout import find_layout
from privdistill.taps.names import watched
from privdistill.text import columns, sizes


class LayerRow(NamedTuple):
    """One layer of a network.

    Attributes:
        name: Dotted name, as a `Tap` takes it.
        type: Class of the layer.
        shape: Shape of its output for the example, batch first; empty if that is no tensor.
        reduction: Input size over feature size in each spatial axis; empty if it gives no features.
        note: What else there is to say, such as the shapes in a tuple.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    reduction: tuple[float, ...]
    note: str = ""


class LayerTable(tuple[LayerRow, ...]):
    """Rows in the order in which the layers ran; prints as a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        heading = ("layer", "type", "output", "reduction", "")
        return "\n".join(columns([heading, *map(_cells, self)]))


def describe(
    model: nn.Module,
    example: Tensor,
    *,
    select_logits: Callable[[Any], Tensor | Sequence[Tensor]] | None = None,
) -> LayerTable:
    """Run a network once and list its layers, to choose taps from.

    Args:
        model: Any network; it is left as it was.
        example: An input of it, `(B, C, *spatial)`; only its shape matters.
        select_logits: As for the wrapper: where the network returns several tensors, the bottleneck
            is the one on the path to these logits.

    Returns:
        One row per layer that ran, in that order; `print` shows a table in which the bottleneck
        is marked, if one can be located.

    Raises:
        ShapeMismatchError: If the example is no image, or the network fails on it.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Upsample(16), nn.Conv2d(4, 2, 1))
        >>> describe(net, torch.zeros(1, 1, 16, 16))
          layer  type      output           reduction
          0      Conv2d    1 x 4 x 7 x 7    2.29       <- bottleneck
          1      Upsample  1 x 4 x 16 x 16  1
          2      Conv2d    1 x 2 x 16 x 16  1
    """
    if not isinstance(example, Tensor) or example.ndim < 3:
        raise ShapeMismatchError(
            f"describe: the example is {getattr(example, 'shape', example)!r}; expected a tensor "
            "(B, C, *spatial) with at least one spatial axis."
        )
    example = plain(example)
    try:
        own = partial(chosen_heads, select_logits) if select_logits else None
        select = own or settled(model, example, "network")
        bottleneck = locate(model, example, "network", select).name
    # The table is for those who have to name the layer, or choose the logits, themselves.
    except (LayerNotFoundError, ShapeMismatchError):
        bottleneck = ""
    rows = [
        _row(name, module, output, example.shape[2:], "<- bottleneck" * (name == bottleneck))
        for name, module, output in _outputs(model, example)
    ]
    return LayerTable(rows)


def _outputs(model: nn.Module, example: Tensor) -> list[tuple[str, nn.Module, Any]]:
    """Name, layer and output of all that ran, in that order."""
    found: list[tuple[str, nn.Module, Any]] = []

    def watch(name: str, _layer: nn.Module) -> Any:
        return lambda layer, _args, output: found.append((name, layer, output))

    def forward(network: nn.Module, view: Tensor) -> None:
        # What the attempt with a batch of one left behind.
        found.clear()
        with watched(network, watch):
            network(view)

    attempt(model, example, "network", forward)
    return found


def _row(name: str, module: nn.Module, output: Any, spatial: Sequence[int], note: str) -> LayerRow:
    kind = type(module).__name__
    if not isinstance(output, Tensor):
        return LayerRow(name, kind, (), (), f"{_shapes(output)} {note}".strip())
    # The same reading as of taps, so that what is shown is what is compared.
    layout = find_layout(output.shape, spatial)
    grid = () if layout is None else layout.grid
    reduction = tuple(whole / size for whole, size in zip(spatial, grid, strict=False))
    if layout is not None and layout.kind != "map":
        note = f"{layout.kind.replace('_', ' ')}, {grid} {note}".strip()
    return LayerRow(name, kind, tuple(output.shape), reduction, note)


def _shapes(output: Any) -> str:
    if isinstance(output, tuple | list):
        inner = [tuple(o.shape) if isinstance(o, Tensor) else type(o).__name__ for o in output]
        return f"{type(output).__name__} of {len(output)}: {', '.join(map(str, inner))}"
    return type(output).__name__


def _cells(row: LayerRow) -> tuple[str, ...]:
    # Equal in all axes, as it nearly always is, one number is easier to read.
    factors = [f"{factor:.3g}" for factor in row.reduction]
    reduction = factors[0] if len(set(factors)) == 1 else " x ".join(factors)
    return row.name, row.type, sizes(row.shape), reduction, row.note
