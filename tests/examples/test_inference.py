"""Whole volumes from a network that sees parts: by hand for windows, slice by slice for planes."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from kdnet.evaluation.inference import predict_volume, volume_predictor

PATCH = (4, 4, 4)


def ramp(part):
    """Logits that depend on the place in the window, so that weights show."""
    places = torch.arange(part[0, 0].numel()).reshape(part.shape[2:]).float()
    return torch.stack([part[:, 0] + places, -part[:, 0] * places], dim=1)


def gaussian(size):
    centre, sigma = (size - 1) / 2, size / 8
    return np.exp(-((np.arange(size) - centre) ** 2) / (2 * sigma**2))


def by_hand(image, size):
    """Windows of four voxels, two apart, weighted by the product of three Gaussians."""
    # MONAI lets no weight fall below a thousandth.
    weight = np.maximum(np.einsum("i,j,k->ijk", *[gaussian(4)] * 3), 1e-3)
    total, norm = np.zeros((2, *size)), np.zeros(size)
    for start in itertools.product(*(range(0, n - 3, 2) for n in size)):
        place = tuple(slice(at, at + 4) for at in start)
        logits = ramp(image[(slice(None), slice(None), *place)])[0].numpy()
        total[(slice(None), *place)] += logits * weight
        norm[place] += weight
    return total / norm


def test_windows_overlap_by_a_half_and_are_weighted_by_a_gaussian():
    image = torch.rand(1, 1, 6, 8, 4, generator=torch.Generator().manual_seed(0))
    logits = predict_volume(ramp, image, patch=PATCH)
    np.testing.assert_allclose(logits[0].numpy(), by_hand(image, (6, 8, 4)), rtol=1e-4)


@pytest.mark.parametrize("size", [(9, 7, 5), (3, 4, 12), (2, 2, 2)])
def test_any_size_comes_back(size):
    constant = torch.tensor([1.0, -2.0]).reshape(1, 2, 1, 1, 1)
    logits = predict_volume(
        lambda part: constant.expand(1, 2, *part.shape[2:]), torch.ones(1, 1, *size), patch=PATCH
    )
    assert logits.shape == (1, 2, *size)
    assert torch.allclose(logits, constant.expand_as(logits))


@pytest.mark.parametrize(
    ("parts", "shape"),
    [
        ({"patch": PATCH, "slices": None}, (3, *PATCH)),
        ({"patch": None, "slices": "coronal"}, (3, 20, 6)),
        ({"patch": None, "slices": None}, (3, 20, 11, 6)),
    ],
)
def test_a_network_sees_a_window_a_slice_or_the_whole(parts, shape):
    seen = set()

    def predict(part):
        seen.add(tuple(part.shape[1:]))
        return part

    predict_volume(predict, torch.ones(1, 3, 20, 11, 6), **parts)
    assert seen == {shape}


def test_what_the_network_returns_is_left_as_it_is():
    kept = torch.ones(1, 2, *PATCH)
    predict_volume(lambda part: kept, torch.ones(1, 1, 6, 6, 6), patch=PATCH)
    assert torch.equal(kept, torch.ones(1, 2, *PATCH))


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_slices_are_predicted_one_by_one_and_stacked(plane):
    image = torch.rand(1, 2, 11, 12, 13)
    logits = predict_volume(lambda part: part.flip(1) * 2, image, slices=plane)
    assert torch.equal(logits, image.flip(1) * 2)


def test_a_network_is_scored_by_the_logits_that_it_was_trained_by():
    class Refining(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv3d(1, 2, 1), nn.Conv3d(2, 2, 1)

        def forward(self, x):
            coarse = self.first(x)
            return coarse, self.last(coarse) + coarse

    network, image = Refining(), torch.randn(1, 1, 4, 4, 4)
    example = torch.zeros(1, 1, *PATCH)
    predict = volume_predictor(network, torch.device("cpu"), example, patch=None, slices=None)
    assert torch.equal(predict(image), network(image)[1])
