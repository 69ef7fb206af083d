"""Synthesise what the student lacks, then segment: the paper's first negative result."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdnet.models import build_network, with_known


class SynthesisNetwork(nn.Module):
    """Make the privileged modalities from the view, and segment view and synthesis together."""

    # Source: Hu et al. 2020, arXiv:2106.09564, section 3.3, "Observations": FLAIR, for instance, is
    # synthesised from T1ce and segmented together with it; the result was worse than the baseline.
    # The paper names neither networks nor losses; these are ours.

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        synthesised: int = 1,
        segmenter: str = "kdnet",
        segmenter_arguments: Mapping[str, Any] | None = None,
        spatial_dims: int = 3,
        exclusive: bool = False,
    ) -> None:
        super().__init__()
        if synthesised < 1:
            raise ValueError(f"SynthesisNetwork: synthesised is 1 or more, not {synthesised}.")
        given = dict(segmenter_arguments or {})
        if spatial_dims == 2:
            given = with_known(segmenter, given, spatial_dims=2)
        self.synthesised = synthesised
        # Of one kind, as the paper names none for either; but intensities are not rare.
        making = {name: value for name, value in given.items() if name != "prior"}
        self.generator = build_network(
            segmenter, making, in_channels=in_channels, out_channels=synthesised
        )
        if exclusive:
            given = with_known(segmenter, given, exclusive=True)
        self.segmenter = build_network(
            segmenter, given, in_channels=in_channels + synthesised, out_channels=out_channels
        )

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        # Detached: the generator learns from the real image alone, as in the paper.
        synthesis = self.generator(image).detach()
        return cast("Tensor", self.segmenter(torch.cat((image, synthesis), dim=1)))
