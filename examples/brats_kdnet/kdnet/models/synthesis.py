"""Synthesise what the student lacks, then segment: the paper's first negative result."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdnet.models import build_network, in_two_dimensions


class SynthesisNetwork(nn.Module):
    """Make the privileged modalities from the view, and segment view and synthesis together.

    The segmentation loss does not reach the generator: what it makes is detached. `generator`
    gives the synthesised modalities, in train and in eval mode, where a tap compares them with the
    real ones.

    Args:
        in_channels: Modalities that the network sees.
        out_channels: Classes (softmax) or regions (sigmoid).
        synthesised: Number of modalities that are made; the application sets it to that of the
            privileged ones, unless given.
        segmenter: Name or import path of the network that segments, as for `build_network`.
        segmenter_arguments: Arguments of its class.
        generator: Name or import path of the network that synthesises; that of the segmenter, with
            its arguments, unless given.
        generator_arguments: Arguments of its class.
        spatial_dims: 2 or 3; with 2, both networks are told so where their classes know it.

    Shape:
        (B, in_channels, *spatial) to logits (B, out_channels, *spatial).

    Raises:
        ValueError: If nothing is to be synthesised.
        UserError: If one of the networks cannot be built.

    Source:
        Hu et al. 2020, arXiv:2106.09564, section 3.3, "Observations": FLAIR, for instance, is
        synthesised from T1ce and segmented together with it; the result was worse than the
        baseline. The paper names neither networks nor losses; these are ours.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        synthesised: int = 1,
        segmenter: str = "kdnet",
        segmenter_arguments: Mapping[str, Any] | None = None,
        generator: str | None = None,
        generator_arguments: Mapping[str, Any] | None = None,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        if synthesised < 1:
            raise ValueError(f"SynthesisNetwork: synthesised is 1 or more, not {synthesised}.")
        inherited = segmenter_arguments if generator is None else None
        self.synthesised = synthesised
        self.generator = _build(
            generator or segmenter,
            inherited if generator_arguments is None else generator_arguments,
            in_channels=in_channels,
            out_channels=synthesised,
            spatial_dims=spatial_dims,
        )
        self.segmenter = _build(
            segmenter,
            segmenter_arguments,
            in_channels=in_channels + synthesised,
            out_channels=out_channels,
            spatial_dims=spatial_dims,
        )

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits.

        Args:
            image: (B, in_channels, *spatial).

        Returns:
            Logits, (B, out_channels, *spatial).
        """
        synthesis = self.generator(image).detach()
        return cast("Tensor", self.segmenter(torch.cat((image, synthesis), dim=1)))


def _build(
    name: str,
    arguments: Mapping[str, Any] | None,
    *,
    in_channels: int,
    out_channels: int,
    spatial_dims: int,
) -> nn.Module:
    """Build one of the two networks for the number of axes."""
    given = arguments or {}
    if spatial_dims == 2:
        given = in_two_dimensions(name, given)
    return build_network(name, given, in_channels=in_channels, out_channels=out_channels)
