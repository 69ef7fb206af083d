"""A U-Net around encoders of timm: any size, any encoder with levels, exact refusals."""

import pytest
import torch

from kdnet.models import TimmUNet, build_network

NARROW = (16, 8, 8, 4, 4)


@pytest.mark.parametrize("encoder", ["resnet18", "efficientnet_b0", "convnext_atto"])
@pytest.mark.parametrize("size", [(64, 64), (50, 71)])
def test_logits_have_the_size_of_the_slice(encoder, size):
    network = TimmUNet(2, 3, encoder=encoder, decoder_channels=NARROW).eval()
    assert network(torch.zeros(1, 2, *size)).shape == (1, 3, *size)


def test_the_bottleneck_is_the_last_output_of_the_encoder():
    network = TimmUNet(1, 3, decoder_channels=NARROW).eval()
    seen = []
    network.bottleneck.register_forward_hook(lambda *call: seen.append(call[2].shape))
    network(torch.zeros(1, 1, 64, 96))
    assert seen == [(1, 512, 2, 3)]


def test_modalities_are_the_channels_of_the_first_convolution():
    network = build_network(
        "timm_unet", {"decoder_channels": NARROW}, in_channels=4, out_channels=2
    )
    first = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
    assert first.in_channels == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "resnet19x"}, "encoder 'resnet19x' cannot be used"),
        ({"decoder_channels": (8, 8)}, r"has 5 levels, which need as many decoder_channels"),
        ({"decoder_channels": (8, 8, 8, 8, 0)}, "all positive"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TimmUNet(1, 2, **options)


def test_slices_that_leave_one_pixel_are_refused_in_training():
    network = TimmUNet(1, 2, decoder_channels=NARROW)
    with pytest.raises(ValueError, match="more than 32 pixels along one axis"):
        network(torch.zeros(2, 1, 32, 20))
    assert network(torch.rand(2, 1, 33, 20)).shape == (2, 2, 33, 20)
