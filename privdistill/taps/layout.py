"""Read features as maps: transformers lay them out as tokens or with channels last."""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import NamedTuple

from torch import Tensor

# Class and register tokens before those of the image are fewer than any map worth comparing.
_MOST_PREFIXED = 16


class Layout(NamedTuple):
    """How features are laid out.

    Attributes:
        kind: "map" `(B, C, *grid)`, "channels_last" `(B, *grid, C)` or "tokens" `(B, N, C)`.
        grid: Size of the feature map in each spatial axis.
        prefix: Number of tokens before those of the image.
    """

    kind: str
    grid: tuple[int, ...]
    prefix: int = 0


def find_layout(
    shape: Sequence[int], spatial: Sequence[int], known: Iterable[tuple[int, ...]] = ()
) -> Layout | None:
    """Tell the layout of features from their shape and the image's.

    Tokens are laid on the grid whose patches have the same side in every axis, as vision
    transformers do; the fewer tokens it leaves over the better. Axes of size one that the image
    does not have count for nothing.

    Args:
        shape: Shape of the features, batch first.
        spatial: Spatial size of the image they were computed from.
        known: Grids of the maps they were computed from, where these are known.

    Returns:
        The layout, or None if no feature map of the image has such a shape.

    Example:
        >>> find_layout((1, 768, 4, 4), (64, 64))
        Layout(kind='map', grid=(4, 4), prefix=0)
        >>> find_layout((1, 17, 768), (64, 64))
        Layout(kind='tokens', grid=(4, 4), prefix=1)
    """
    axes = len(spatial)
    shape = _without_singletons(shape, axes)
    if len(shape) == axes + 2:
        first, last = tuple(shape[2:]), tuple(shape[1:-1])
        # No encoder gives a map larger than the image; among readings that fit, the one that
        # keeps the image's proportions is meant.
        is_map = not _fits(last, spatial) or (
            _fits(first, spatial)
            and (_keeps_proportions(first, spatial) or not _keeps_proportions(last, spatial))
        )
        return Layout("map", first) if is_map else Layout("channels_last", last)
    if len(shape) == 3:
        least = shape[1] - _MOST_PREFIXED
        grids = [*((False, grid) for grid in known), *_grids(spatial, least)]
        readings = [(rough, shape[1] - prod(grid), grid) for rough, grid in grids]
        fitting = [item for item in readings if 0 <= item[1] <= _MOST_PREFIXED]
        if fitting:
            _, prefix, grid = min(fitting, key=lambda item: item[:2])
            return Layout("tokens", grid, prefix)
    return None


def as_map(features: Tensor, spatial: Sequence[int]) -> Tensor | None:
    """Return features as a map; tokens of class and registers are left out.

    Args:
        features: `(B, C, *grid)`, `(B, *grid, C)` or `(B, N, C)`, perhaps with further axes of
            size one.
        spatial: Spatial size of the image they were computed from.

    Returns:
        `(B, C, *grid)`, a view of the features, or None if they are no map of such an image.

    Example:
        >>> import torch
        >>> as_map(torch.zeros(2, 16, 768), (64, 64)).shape
        torch.Size([2, 768, 4, 4])
    """
    # A reshape of usual features would cost every step a call.
    if features.ndim > len(spatial) + 2:
        features = features.reshape(_without_singletons(features.shape, len(spatial)))
    layout = find_layout(features.shape, spatial)
    if layout is None or layout.kind == "map":
        return None if layout is None else features
    if layout.kind == "tokens":
        tokens = features[:, layout.prefix :].transpose(1, 2)
        return tokens.reshape(*tokens.shape[:2], *layout.grid)
    return features.movedim(-1, 1)


def _without_singletons(shape: Sequence[int], axes: int) -> tuple[int, ...]:
    """The shape without axes of size one beyond the image's, those of space first."""
    kept = list(shape)
    while len(kept) > axes + 2 and 1 in kept[1:]:
        kept.pop(kept.index(1, 2) if 1 in kept[2:] else 1)
    return tuple(kept)


def _fits(grid: Sequence[int], spatial: Sequence[int]) -> bool:
    return all(size <= whole for size, whole in zip(grid, spatial, strict=True))


def _keeps_proportions(grid: Sequence[int], spatial: Sequence[int]) -> bool:
    ratios = {whole / size for size, whole in zip(grid, spatial, strict=True) if size}
    return len(grid) > 1 and len(ratios) == 1


def _grids(spatial: Sequence[int], least: int) -> Iterator[tuple[bool, tuple[int, ...]]]:
    """Grids of so many square patches or more; whether these neither tile nor halve the image."""
    for patch in range(1, max(spatial) + 1):
        # A rest at the border is left out or padded.
        padded = tuple(-(-size // patch) for size in spatial)
        if prod(padded) < least:
            return
        rough = patch.bit_count() > 1 and any(size % patch for size in spatial)
        yield rough, tuple(max(1, size // patch) for size in spatial)
        yield rough, padded
