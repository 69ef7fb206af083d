"""Pictures of the page: read back as a browser would, they are what was meant."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from kdnet.results.slices import ShownCase, Stack
from kdnet.results.tiles import LABEL_COLOURS, label_colour, other_tiles, sheets, tiles


def picture(source):
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))


def shown(rows=2, columns=3):
    grey = np.full((rows, columns), 100, dtype=np.uint8)
    classes = np.zeros((rows, columns), dtype=np.uint8)
    classes[0, 0] = 1
    return ShownCase(
        name="Case",
        why="",
        position=(1, 1),
        aspect=2.0,
        images={"flair": grey // 2, "t1ce": grey},
        labels={"reference": classes, "kdnet": classes * 0, "baseline": classes},
    )


def stack(slices=5, rows=2, columns=3):
    image = np.arange(slices * rows * columns, dtype=np.uint8).reshape(slices, rows, columns)
    classes = (image % 4).astype(np.uint8)
    return Stack("t1ce", tuple(range(1, slices + 1)), image, {"reference": classes})


def test_strip_has_the_order_of_the_rows():
    strip = tiles(shown(), ("t1ce",), ("baseline", "kdnet", "absent"))
    assert [tile.title for tile in strip] == ["t1ce", "reference", "baseline", "kdnet"]
    assert [tile.note != "" for tile in strip] == [True, False, False, False]
    assert [tile.title for tile in other_tiles(shown(), ("t1ce",))] == ["flair"]


def test_without_the_students_modality_the_first_is_under_the_labels():
    assert [tile.title for tile in tiles(shown(), (), ())] == ["flair", "reference"]


def test_labels_are_drawn_over_the_grey_values():
    reference = np.asarray(picture(tiles(shown(), ("t1ce",), ())[1].source))
    yellow = [int(LABEL_COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    assert reference[0, 0].tolist() == [round(0.4 * 100 + 0.6 * part) for part in yellow]
    assert reference[1, 1].tolist() == [100, 100, 100]


def test_tall_pixels_make_a_narrow_picture():
    assert tiles(shown(), ("t1ce",), ())[0].width == pytest.approx(3 / (2 * 2.0))


@pytest.mark.parametrize("slices", [1, 4, 5])
def test_every_slice_lies_where_the_viewer_looks_for_it(slices):
    original = stack(slices)
    sheet = sheets(original, aspect=1.0)
    grey = np.asarray(picture(sheet.image))
    colours = np.asarray(picture(sheet.labels["reference"]).convert("RGBA"))
    for index in range(slices):
        row, column = divmod(index, sheet.columns)
        tile = (
            slice(row * sheet.height, (row + 1) * sheet.height),
            slice(column * sheet.width, (column + 1) * sheet.width),
        )
        assert np.array_equal(grey[tile], original.image[index])
        labelled = original.labels["reference"][index] > 0
        assert np.array_equal(colours[tile][..., 3] == 255, labelled)
        assert np.array_equal(colours[tile][..., 3] == 0, ~labelled)


def test_sheet_without_labels_is_transparent():
    nothing = np.zeros((1, 2, 2), dtype=np.uint8)
    empty = Stack("t1ce", (1,), nothing, {"x": nothing})
    colours = picture(sheets(empty, 1.0).labels["x"]).convert("RGBA")
    assert np.asarray(colours)[..., 3].max() == 0


def test_size_is_what_the_page_will_hold():
    sheet = sheets(stack(), 1.0)
    assert sheet.size == len(sheet.image) + len(sheet.labels["reference"])


def test_colours_repeat_after_the_last():
    assert label_colour(len(LABEL_COLOURS) + 1) == label_colour(1)
