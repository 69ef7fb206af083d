"""What the losses share: probabilities, mixtures, sizes and directions, as functions of tensors.

Everything is computed in float32 (float64 where the input is float64) whatever autocast says, and
stays finite for logits of +-1e4 and for infinite ones.
"""

import math
import sys
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from privdistill.exceptions import ObjectiveError, ShapeMismatchError

Activation = Literal["softmax", "sigmoid"]
Normalisation = Literal["softmax", "softmax_channel", "softmax_spatial", "l1"]
Reduction = Literal["sum", "mean"]
Binarisation = Literal["argmax", "positive", "soft"]

#: What an infinite logit counts as: a probability of exactly 0 or 1, whose logarithm is a number.
LARGEST = torch.finfo(torch.float16).max
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def at_least_float32(values: Tensor) -> Tensor:
    """Return half-precision and integer tensors as float32, others unchanged."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def finite(logits: Tensor) -> Tensor:
    """Return logits in float32 at least, infinite ones as float16's largest numbers; NaN stays."""
    # A class that is ruled out (-inf) then costs nothing where a probability of zero must, as
    # 0 log 0 = 0; a logit that overflowed in float16 is the last number it could hold.
    logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    if known_finite(logits):
        return logits
    return torch.nan_to_num(logits, nan=math.nan, posinf=LARGEST, neginf=-LARGEST)


def known_finite(*several: Tensor) -> bool:
    """Say whether logits are finite; False also where a look at them is not cheap."""
    # A GPU would have to wait, and a compiler has no values.
    for logits in several:
        if not logits.is_cpu or torch.compiler.is_compiling():
            return False
        # One reading costs less than a copy and its gradient. Half precision would overflow.
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        if not math.isfinite(logits.sum(dtype=dtype).item()):
            return False
    return True


def probabilities(logits: Tensor, activation: Activation, *, temperature: float = 1.0) -> Tensor:
    """Sigmoid or softmax of tempered logits.

    Args:
        logits: `(B, C, *spatial)`.
        activation: "softmax" over channels, or "sigmoid" per channel.
        temperature: Divides the logits, dimensionless, > 0.

    Returns:
        Probabilities in float32, `(B, C, *spatial)`.

    Example:
        >>> probabilities(torch.zeros(1, 4, 1), "softmax", temperature=5.0).flatten()
        tensor([0.2500, 0.2500, 0.2500, 0.2500])

    Source:
        Hu et al. 2020, arXiv:2106.09564, eq. (1).
    """
    tempered = finite(logits) / temperature
    return tempered.softmax(dim=1) if activation == "softmax" else tempered.sigmoid()


def mix_logits(
    members: Sequence[tuple[Tensor, float | Tensor]],
    activation: Activation,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Logits whose tempered probabilities are the mean of several networks' tempered ones.

    Args:
        members: Logits `(B, C, *spatial)` and weight of each network, one number or one for each
            sample, `(B,)`; weights sum to one.
        activation: "softmax" or "sigmoid".
        temperature: T, dimensionless, > 0.

    Returns:
        `(B, C, *spatial)` in float32; with `probabilities(..., temperature=T)` they give
        `sum_k w_k sigma(l_k / T)`.

    Example:
        >>> members = [(torch.tensor([[[2.0], [0.0]]]), 0.5), (torch.tensor([[[0.0], [2.0]]]), 0.5)]
        >>> probabilities(mix_logits(members, "softmax"), "softmax").flatten()
        tensor([0.5000, 0.5000])

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    # In log space: shares of 1e-30 and probabilities of 1e-30 both count.
    tempered = [finite(logits) / temperature for logits, _ in members]
    shares = [_log(weight, logits.ndim) for logits, weight in members]

    def mean(logs: list[Tensor]) -> Tensor:
        stacked = torch.stack([log + share for log, share in zip(logs, shares, strict=True)])
        return stacked.logsumexp(0)

    if activation == "softmax":
        return temperature * mean([logits.log_softmax(1) for logits in tempered])
    # The logit of the mean, from the logarithms of both of its sides.
    positive = mean([F.logsigmoid(logits) for logits in tempered])
    negative = mean([F.logsigmoid(-logits) for logits in tempered])
    return temperature * (positive - negative)


def _log(weight: float | Tensor, axes: int) -> float | Tensor:
    """Logarithm of a network's weight; that of a sample it does not count for is minus infinity."""
    if isinstance(weight, Tensor):
        return at_least_float32(weight).log().reshape(-1, *[1] * (axes - 1))
    # A share may be too small beside another one for any number but zero.
    return math.log(max(weight, sys.float_info.min))


def resize(values: Tensor, size: Sequence[int]) -> Tensor:
    """Resample logits to another resolution: linearly to a finer one, by means to a coarser one.

    Args:
        values: `(B, C, *spatial)`.
        size: Spatial size wanted.

    Returns:
        `(B, C, *size)` in float32; the values themselves where nothing is to be done.

    Example:
        >>> resize(torch.tensor([[[1.0, 3.0, 5.0, 7.0]]]), (2,))
        tensor([[[2., 6.]]])
    """
    if tuple(values.shape[2:]) == tuple(size):
        return values
    values = at_least_float32(values)
    if any(new > old for new, old in zip(size, values.shape[2:], strict=True)):
        return F.interpolate(values, size=tuple(size), mode=_LINEAR[len(size)], align_corners=False)
    return F.interpolate(values, size=tuple(size), mode="area")


def binarise(logits: Tensor, rule: Literal["argmax", "positive"]) -> Tensor:
    """The binary prediction behind logits: one-hot argmax, or logit > 0.

    Both do not depend on a temperature. A threshold of 0.5 on softened probabilities does, and
    gives an empty target where four classes share the probability at T = 5.

    Args:
        logits: `(B, C, *spatial)`.
        rule: "argmax", the one class with the largest logit; or "positive", every logit > 0.

    Returns:
        Zeros and ones, `(B, C, *spatial)`; of equal logits the first is the largest.

    Example:
        >>> binarise(torch.tensor([[[1.0], [3.0]]]), "argmax").flatten()
        tensor([0., 1.])
    """
    return (logits > 0).float() if rule == "positive" else largest(finite(logits.detach()))


def largest(logits: Tensor) -> Tensor:
    """The one-hot argmax over channels, of finite logits without a graph; ties go to the first."""
    # By rows, as an argmax is slow.
    hard = (logits - logits.amax(1, keepdim=True)).sign_().add_(1)
    left = torch.ones_like(hard[:, :1])
    for row in hard.chunk(hard.shape[1], dim=1):
        left.sub_(row.mul_(left))
    return hard


def standardised(values: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    """Values less their mean, over their standard deviation: `(v - m) / sqrt(var + 1e-5)`."""
    centred = values - values.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + 1e-5).rsqrt()


def unit(values: Tensor, axes: int | tuple[int, ...], floor: Tensor | float = 1e-12) -> Tensor:
    """Vectors along `axes` over their L2 norm; zero up to a squared length of `floor`."""
    energy = values.square().sum(axes, keepdim=True)
    # A slope of 1e6 at dead features would drown that of all others.
    return values * ((energy > floor) * energy.clamp_min(floor).rsqrt())


def full_precision(values: Tensor) -> torch.autocast:
    """A context in which products and convolutions keep their inputs' precision."""
    # There is no autocast for the meta device, and nothing to switch off.
    return torch.autocast("cpu" if values.is_meta else values.device.type, enabled=False)


def check_logits(logits: Tensor, activation: Activation, owner: str) -> None:
    """Refuse logits that are no map, and a softmax over one channel, which is 1 everywhere."""
    if logits.ndim < 3 or 0 in logits.shape:
        raise ShapeMismatchError(
            f"{owner}: the logits are {tuple(logits.shape)}; expected (B, C, *spatial) with at "
            "least one spatial axis and no empty one. If the batch is empty, leave the step out."
        )
    if activation not in ("softmax", "sigmoid"):
        raise ObjectiveError(
            f"{owner}: `activation` must be 'softmax' or 'sigmoid'; got {activation!r}."
        )
    if activation == "softmax" and logits.shape[1] == 1:
        raise ObjectiveError(
            f"{owner}: a softmax over 1 channel is constant. Pass activation='sigmoid', or give "
            "the network a background channel."
        )


def logit_pair(
    student: Tensor, teacher: Tensor, activation: Activation, owner: str
) -> tuple[Tensor, Tensor]:
    """Check logits that are to be compared, and cut the teacher's off their graph."""
    if student.shape != teacher.shape:
        raise ShapeMismatchError(
            f"{owner}: the student's logits are {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}. Both networks must predict the same classes at the same "
            "resolution."
        )
    check_logits(student, activation, owner)
    return student, teacher.detach()


def feature_pair(
    student: Tensor, teacher: Tensor, owner: str, *, equal_channels: bool = True
) -> tuple[Tensor, Tensor]:
    """Check features that are to be compared; in float32 at least, the teacher's without graph."""
    shape, other = student.shape, teacher.shape
    if student.ndim < 3 or 0 in shape:
        raise ShapeMismatchError(
            f"{owner} gives {tuple(shape)}; expected (B, C, *spatial) with at least one spatial "
            "axis and no empty one."
        )
    if shape != other and (equal_channels or shape[:1] + shape[2:] != other[:1] + other[2:]):
        allowed = "they must be equal" if equal_channels else "only channels may differ"
        raise ShapeMismatchError(
            f"{owner} gives {tuple(shape)} for the student and {tuple(other)} for the teacher; "
            f"{allowed}. Let the wrapper build an adapter: Tap(..., adapter='auto')."
        )
    if student.dtype not in (torch.float32, torch.float64):
        student = student.float()
    # Matrix products of both need one dtype, and a float64 teacher must not cast the student.
    return student, teacher.detach().to(student.dtype)
