import pytest
import torch

from kdnet.errors import UserError
from kdnet.models import build_network
from kdnet.models.synthesis import SynthesisNetwork

SMALL = {"channels": [4, 8]}


def test_no_gradient_passes_from_the_segmentation_to_the_generator():
    network = SynthesisNetwork(1, 2, segmenter_arguments=SMALL)
    network(torch.randn(1, 1, 8, 8, 8)).square().mean().backward()
    assert all(weights.grad is None for weights in network.generator.parameters())
    assert all(weights.grad is not None for weights in network.segmenter.parameters())


def test_the_segmenter_sees_view_and_synthesis():
    network, seen = SynthesisNetwork(1, 2, synthesised=2, segmenter_arguments=SMALL).eval(), []
    network.segmenter.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.randn(1, 1, 8, 8, 8)
    assert network(image).shape == (1, 2, 8, 8, 8)
    assert torch.equal(seen[0], torch.cat((image, network.generator(image)), dim=1))


def test_arguments_that_make_no_sense_are_named():
    with pytest.raises(UserError, match="synthesised is 1 or more, not 0"):
        build_network("synthesis", {"synthesised": 0}, in_channels=1, out_channels=4)
    with pytest.raises(UserError, match="'width'"):
        build_network(
            "synthesis", {"segmenter_arguments": {"width": 3}}, in_channels=1, out_channels=4
        )
    with pytest.raises(UserError, match="Unknown network 'gan'"):
        build_network("synthesis", {"segmenter": "gan"}, in_channels=1, out_channels=4)
