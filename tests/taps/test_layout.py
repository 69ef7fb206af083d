import pytest
import torch

from privdistill.taps.layout import Layout, as_map, find_layout


@pytest.mark.parametrize(
    ("shape", "spatial", "found"),
    [
        ((2, 8, 4, 4), (16, 16), Layout("map", (4, 4))),
        ((2, 96, 4, 8, 2), (16, 32, 8), Layout("map", (4, 8, 2))),
        ((2, 4, 4, 96), (16, 16), Layout("channels_last", (4, 4))),
        ((2, 16, 16, 24), (64, 64), Layout("channels_last", (16, 16))),
        ((2, 24, 16, 16), (64, 64), Layout("map", (16, 16))),
        ((2, 16, 96), (16, 16), Layout("tokens", (4, 4))),
        ((2, 17, 96), (16, 16), Layout("tokens", (4, 4), 1)),
        ((2, 73, 96), (128, 128), Layout("tokens", (8, 8), 9)),
        ((2, 20, 96), (16, 16), Layout("tokens", (4, 4), 4)),
        # Patches of 16 voxels, some that leave a rest of 8, and of 14, which leave one of 2.
        ((2, 19, 96), (64, 64), Layout("tokens", (4, 4), 3)),
        ((2, 25, 96), (64, 64), Layout("tokens", (4, 4), 9)),
        ((2, 25, 96), (72, 72), Layout("tokens", (5, 5))),
        ((2, 82, 96), (128, 128), Layout("tokens", (9, 9), 1)),
        ((2, 32, 96), (32, 32, 16), Layout("tokens", (4, 4, 2))),
        ((2, 8, 50), (100,), Layout("map", (50,))),
        ((2, 50, 128), (100,), Layout("channels_last", (50,))),
        ((2, 8, 1, 4, 4), (16, 16), Layout("map", (4, 4))),
        ((2, 1, 4, 4, 96), (16, 16), Layout("channels_last", (4, 4))),
        ((2, 8, 5, 4, 4), (16, 16), None),
        ((2, 96), (16, 16), None),
        ((2, 130, 96), (16, 16), None),
    ],
)
def test_layouts_are_told_apart(shape, spatial, found):
    assert find_layout(shape, spatial) == found


def test_a_grid_that_tokens_are_known_to_come_from_counts_like_one_that_tiles_the_image():
    assert find_layout((2, 25, 96), (64, 64), [(5, 5)]) == Layout("tokens", (5, 5))
    assert find_layout((2, 25, 96), (64, 64), [(4, 4)]) == Layout("tokens", (4, 4), 9)


def test_tokens_keep_their_place_and_class_tokens_go():
    grid = torch.arange(12.0).reshape(1, 2, 2, 3)
    tokens = torch.cat((torch.full((1, 1, 2), -1.0), grid.flatten(2).transpose(1, 2)), dim=1)
    assert torch.equal(as_map(tokens, (4, 6)), grid)


def test_channels_last_are_moved_and_maps_stay():
    features = torch.randn(1, 2, 2, 64)
    assert torch.equal(as_map(features, (8, 8)), features.permute(0, 3, 1, 2))
    grid = torch.randn(1, 64, 2, 2)
    assert as_map(grid, (8, 8)) is grid
    assert as_map(torch.zeros(1, 64), (8, 8)) is None


def test_an_axis_of_size_one_is_left_out_of_the_map():
    features = torch.randn(2, 8, 1, 4, 4)
    assert torch.equal(as_map(features, (16, 16)), features[:, :, 0])
    assert torch.equal(as_map(features.movedim(1, -1), (16, 16)), features[:, :, 0])
