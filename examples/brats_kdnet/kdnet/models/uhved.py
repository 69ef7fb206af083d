"""U-HVED: one encoder for each modality, fused as a product of Gaussians."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kdnet.models.blocks import (
    at_least_float32,
    check_image,
    check_widths,
    draw_subset,
    encode,
    every_subset,
    find_present,
    spread,
)
from kdnet.models.hemis import HeteroModalDecoder, ModalityEncoder

# Log-variances beyond are cut off, as in the published configuration.
_LIMIT = 50.0
_SMALLEST = 1e-7


class Gaussian(NamedTuple):
    """Independent normal distributions of latent numbers."""

    mean: Tensor
    log_variance: Tensor


class Evidence(NamedTuple):
    """What each modality says of the latent numbers, ready to be added up."""

    precision: Tensor
    weighted: Tensor


def read_evidence(features: Tensor) -> Evidence:
    """Read the features of encoders as means and log-variances."""
    mean, log_variance = at_least_float32(features).chunk(2, dim=2)
    precision = 1 / (log_variance.clamp(-_LIMIT, _LIMIT).exp() + _SMALLEST)
    return Evidence(precision, precision * mean)


def multiply(evidence: Evidence, chosen: Tensor) -> Gaussian:
    """Multiply the densities of some modalities and of a standard normal prior."""
    mask = spread(chosen, evidence.precision)
    precision = 1 + torch.where(mask, evidence.precision, 0).sum(1)
    weighted = torch.where(mask, evidence.weighted, 0).sum(1)
    return Gaussian(weighted / precision, -precision.log())


def divergence(first: Gaussian, second: Gaussian) -> Tensor:
    """Compute KL(first || second), averaged over the latent numbers of a sample."""
    squares = first.log_variance.exp() + (first.mean - second.mean).square()
    ratio = squares * (-second.log_variance).exp()
    logarithms = second.log_variance - first.log_variance
    return (logarithms + ratio - 1).flatten(1).mean(1) / 2


def subset_divergence(evidence: Evidence, present: Tensor) -> Tensor:
    """Compute how far subsets of modalities are from all of them, and from the prior."""
    full = multiply(evidence, present)
    prior = Gaussian(torch.zeros_like(full.mean), torch.zeros_like(full.mean))
    between = from_prior = full.mean.new_zeros(len(present))
    proper_ones = all_of_them = torch.zeros_like(between)
    for subset in every_subset(present.shape[1]):
        chosen = torch.tensor(subset, device=present.device).expand_as(present)
        # Samples of one batch may have different modalities.
        counts = (present | ~chosen).all(1)
        proper = counts & (chosen != present).any(1)
        part = multiply(evidence, chosen)
        between = between + torch.where(proper, divergence(full, part), 0)
        from_prior = from_prior + torch.where(counts, divergence(part, prior), 0)
        proper_ones, all_of_them = proper_ones + proper, all_of_them + counts
    return between / proper_ones.clamp(min=1) + from_prior / all_of_them.clamp(min=1)


class Latent(nn.Module):
    """The fused latent map of one resolution: a random sample, or its mean."""

    def forward(self, evidence: Evidence, chosen: Tensor) -> Tensor:
        """Fuse."""
        mean, log_variance = multiply(evidence, chosen)
        if not self.training:
            return mean
        return mean + (log_variance / 2).exp() * torch.randn_like(mean)


class UHVED(nn.Module):
    """U-HVED: segments and reconstructs from whatever modalities a sample has."""

    # Source: Dorent et al. 2019, arXiv:1907.11150; widths, layers, limits and weights as in their
    # published configuration. Here all subsets that are not empty are equally likely, there the
    # size of the subset is drawn first; here the divergence starts from all modalities present, as
    # in the paper, there from the subset drawn.
    # In train mode the output is a mapping: "out", logits from a subset that the network draws;
    # "reconstruction" (B, in_channels, *spatial); "divergence" (B,); "present" (B, in_channels).

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (8, 16, 32, 64),
        *,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        check_widths("UHVED", channels, spatial_dims, even=True)
        latent = [width // 2 for width in channels]
        self.encoders = nn.ModuleList(
            ModalityEncoder(spatial_dims, channels, channels) for _ in range(in_channels)
        )
        self.fuse = Latent()
        self.bottleneck = Latent()
        self.decoder = HeteroModalDecoder(spatial_dims, channels, latent, out_channels)
        self.reconstructors = nn.ModuleList(
            HeteroModalDecoder(spatial_dims, channels, latent, 1) for _ in range(in_channels)
        )
        self.levels = len(channels)

    def forward(self, image: Tensor) -> Tensor | dict[str, Tensor]:
        """Return logits, or in train mode the mapping."""
        check_image("UHVED", image, len(self.encoders), self.levels)
        present = find_present(image)
        evidence = [read_evidence(level) for level in encode(self.encoders, image)]
        chosen = draw_subset(present) if self.training else present
        *finer, deepest = evidence
        latent = [self.fuse(level, chosen) for level in finer]
        latent.append(self.bottleneck(deepest, chosen))
        logits = cast("Tensor", self.decoder(latent))
        if not self.training:
            return logits
        apart = torch.stack([subset_divergence(level, present) for level in evidence])
        return {
            "out": logits,
            "reconstruction": torch.cat([part(latent) for part in self.reconstructors], dim=1),
            "divergence": apart.mean(0),
            "present": present,
        }
