"""Turning, scaling and cropping of volumes that are looked at."""

import numpy as np
import pytest

from kdnet.results.viewing import Turn, fullest_slice, head_window, shown_slices, to_grey


def labelled(*slices, depth=20):
    volume = np.zeros((4, 4, depth), dtype=np.uint8)
    for place, index in enumerate(slices):
        volume[: place + 1, 0, index] = 1
    return volume


def test_axes_run_left_back_and_up():
    # Under RAS the first voxel is right-most, hind-most and lowest.
    turn = Turn(np.diag([1.0, 2.0, 3.0, 1.0]))
    volume = np.zeros((2, 3, 4))
    volume[0, 2, 3] = 1  # left-most under RAS is index 1; this one is right, front, top
    assert tuple(np.argwhere(turn(volume))[0]) == (1, 0, 3)
    assert turn.spacing((1.0, 2.0, 3.0)) == [1.0, 2.0, 3.0]


def test_grey_spans_the_percentiles_and_keeps_the_background_black():
    volume = np.arange(-1, 1000).reshape(-1, 1, 1).astype(float)
    grey = to_grey(volume)
    assert grey[1] == 0
    assert grey[-1] == 255
    assert grey[500] == pytest.approx(127, abs=3)
    assert not to_grey(np.zeros((2, 2, 2))).any()


def test_fullest_slice_is_that_of_the_reference():
    assert fullest_slice([labelled(3, 7), labelled(1, 2)], 20) == 7
    assert fullest_slice([labelled(), labelled(1, 2)], 20) == 2
    assert fullest_slice([labelled()], 20) == 10


def test_window_holds_the_head_with_a_margin():
    volume = np.zeros((30, 40, 2), dtype=np.uint8)
    volume[10:12, 20:25, 1] = 9
    assert head_window([volume]) == (slice(16, 29), slice(6, 16))
    assert head_window([np.zeros_like(volume)]) == (slice(None), slice(None))


def test_slices_of_the_viewer_hold_all_tumour_and_a_margin():
    assert shown_slices([labelled(8), labelled(10)], 20, limit=40) == list(range(6, 13))
    assert shown_slices([labelled()], 20, limit=40) == list(range(20))


@pytest.mark.parametrize("limit", [2, 3, 7, 10])
def test_thinned_slices_are_even_and_meet_the_fullest(limit):
    labels = [labelled(2, 5, 13, 17)]
    chosen = shown_slices(labels, 20, limit)
    assert len(chosen) <= limit
    assert 17 in chosen
    assert len(set(np.diff(chosen))) <= 1
