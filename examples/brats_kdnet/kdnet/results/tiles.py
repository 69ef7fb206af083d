"""Slices as PNG inside the page: single tiles, and sheets of tiles to leaf through."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdnet.results.slices import ShownCase, Stack

# Okabe and Ito's palette without its dark colours, which vanish on a grey image.
LABEL_COLOURS = ("#f0e442", "#56b4e9", "#d55e00", "#cc79a7", "#009e73", "#e69f00")
_OPACITY = 0.6
# Slices narrower than this keep their pixels visible when they are enlarged.
_COARSE = 120


@dataclass(frozen=True)
class Tile:
    """A picture of the figure.

    Attributes:
        title: What it shows.
        note: A second line, may be empty.
        source: PNG as a data URI.
        width: Width divided by height.
        coarse: Whether its pixels should stay visible when it is enlarged.
    """

    title: str
    note: str
    source: str
    width: float
    coarse: bool


@dataclass(frozen=True)
class Sheets:
    """The stack of one case as sheets of tiles, one sheet per panel.

    Attributes:
        modality: Name of the modality under the labels.
        numbers: Of the slices, from below, from 1.
        columns: Tiles per row of a sheet.
        width: Of a tile, pixels.
        height: Of a tile, pixels.
        ratio: Width of a tile divided by its height, as it is to be shown.
        image: Grey sheet, PNG as a data URI.
        labels: "reference" or the name of a network to a sheet of colours on nothing.
    """

    modality: str
    numbers: tuple[int, ...]
    columns: int
    width: int
    height: int
    ratio: float
    image: str
    labels: dict[str, str]

    @property
    def size(self) -> int:
        """Characters that the sheets take in the page."""
        return len(self.image) + sum(map(len, self.labels.values()))


def tiles(case: ShownCase, seen: Sequence[str], rows: Sequence[str]) -> list[Tile]:
    """The strip of one case: what the student sees, the reference, and the predictions."""
    under = next((name for name in seen if name in case.images), next(iter(case.images)))
    shown = [name for name in case.images if name in seen] or [under]
    pictures = [
        _tile(name, "seen by the student" if name in seen else "", case.images[name], case.aspect)
        for name in shown
    ]
    for who in ("reference", *rows):
        if who in case.labels:
            picture = _overlaid(case.images[under], case.labels[who])
            pictures.append(_tile(who, "", picture, case.aspect))
    return pictures


def other_tiles(case: ShownCase, seen: Sequence[str]) -> list[Tile]:
    """The modalities of one case that the strip leaves out."""
    strip = {tile.title for tile in tiles(case, seen, ())}
    return [
        _tile(name, "", grey, case.aspect)
        for name, grey in case.images.items()
        if name not in strip
    ]


def sheets(stack: Stack, aspect: float) -> Sheets:
    """Lay the slices of a stack out on sheets."""
    count, height, width = stack.image.shape
    columns = math.ceil(math.sqrt(count))
    return Sheets(
        modality=stack.modality,
        numbers=stack.numbers,
        columns=columns,
        width=width,
        height=height,
        ratio=width / (height * aspect),
        image=_uri(Image.fromarray(_laid_out(stack.image, columns))),
        labels={
            name: _uri(_coloured(_laid_out(classes, columns)))
            for name, classes in stack.labels.items()
        },
    )


def label_colour(index: int) -> str:
    """Colour of a class."""
    return LABEL_COLOURS[(index - 1) % len(LABEL_COLOURS)]


def _laid_out(slices: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Slices side by side, row after row; the last row is filled with zeros."""
    count, height, width = slices.shape
    rows = -(-count // columns)
    sheet = np.zeros((rows * columns, height, width), dtype=np.uint8)
    sheet[:count] = slices
    sheet = sheet.reshape(rows, columns, height, width).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(sheet.reshape(rows * height, columns * width))


def _coloured(classes: NDArray[np.uint8]) -> Image.Image:
    """Class indices as a picture with a palette, background transparent."""
    picture = Image.fromarray(classes, mode="P")
    colours = [0, 0, 0]
    for index in range(1, int(classes.max()) + 1):
        colours += [round(255 * part) for part in mpl.colors.to_rgb(label_colour(index))]
    picture.putpalette(colours)
    picture.info["transparency"] = 0
    return picture


def _overlaid(grey: NDArray[np.uint8], classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    picture = np.repeat(grey[..., None].astype(np.float64), 3, axis=2)
    for index in np.unique(classes[classes > 0]):
        where = classes == index
        colour = 255 * np.array(mpl.colors.to_rgb(label_colour(int(index))))
        picture[where] = (1 - _OPACITY) * picture[where] + _OPACITY * colour
    return picture.round().astype(np.uint8)


def _tile(title: str, note: str, picture: NDArray[np.uint8], aspect: float) -> Tile:
    rows, columns = picture.shape[:2]
    return Tile(
        title=title,
        note=note,
        source=_uri(Image.fromarray(np.ascontiguousarray(picture))),
        width=columns / (rows * aspect),
        coarse=columns < _COARSE,
    )


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
