"""Timing of steps that take turns in one process, and the statistics of what comes out."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor, nn

Report = Callable[[float], None]
Times = dict[str, list[float]]


class Contestant(NamedTuple):
    """A training step and the network that it trains."""

    step: Callable[[], object]
    student: nn.Module


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def silent(_share: float) -> None:
    """Report nothing."""


def check_same_work(
    contestants: Mapping[str, Contestant], *, steps: int = 3, tolerance: float = 1e-5
) -> float:
    """Train a few steps and refuse contestants that reach other weights than the first one.

    Args:
        contestants: All begin with the same weights.
        steps: How many steps each takes.
        tolerance: Largest difference of a weight.

    Returns:
        The largest difference found.

    Raises:
        ValueError: If it is above the tolerance.
    """
    weights = {}
    for name, contestant in contestants.items():
        for _ in range(steps):
            contestant.step()
        weights[name] = flattened(contestant.student)
    first, *others = weights
    apart = {name: float((weights[name] - weights[first]).abs().max()) for name in others}
    wrong = {name: gap for name, gap in apart.items() if not gap <= tolerance}
    if wrong:
        raise ValueError(
            f"After {steps} steps the weights differ from those of '{first}' by {wrong}; up to "
            f"{tolerance:g} is rounding. A comparison of times needs the same work on all sides."
        )
    return max(apart.values(), default=0.0)


def flattened(network: nn.Module) -> Tensor:
    """All weights of a network as one vector."""
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def race(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 3,
    report: Report = silent,
) -> Times:
    """Time steps in turns; who starts changes from round to round.

    Args:
        steps: By name.
        rounds: How often each is timed.
        warm_up: Rounds beforehand that do not count.
        report: Is told the share that is done.

    Returns:
        Seconds by name, one per round.
    """
    names = list(steps)
    times: Times = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            begin = time.perf_counter()
            steps[name]()
            if number >= 0:
                times[name].append(time.perf_counter() - begin)
        report(max(0, number + 1) / rounds)
    return times


def ratio(times: Times, name: str, baseline: str) -> Interval:
    """The median over rounds of the ratio within a round."""
    pairs = zip(times[name], times[baseline], strict=True)
    return median([mine / theirs for mine, theirs in pairs])


def difference(times: Times, name: str, baseline: str) -> Interval:
    """The median over rounds of the difference within a round, in microseconds."""
    pairs = zip(times[name], times[baseline], strict=True)
    return median([1e6 * (mine - theirs) for mine, theirs in pairs])


def median(values: Sequence[float], *, samples: int = 4000) -> Interval:
    """Estimate a median and its 95 % interval by resampling.

    Args:
        values: Independent measurements, one or more.
        samples: How often they are drawn anew.

    Returns:
        The median, and the 2.5th and 97.5th percentile of the medians drawn.
    """
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(data), (samples, len(data)), generator=generator)
    middle = data[chosen].quantile(0.5, dim=1)
    low, high = middle.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(data.quantile(0.5)), low, high)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> Interval:
    """Fit `cost = a * size ** exponent` by least squares on logarithms.

    Args:
        sizes: Positive, not all the same; each measurement counts, so sizes may repeat.
        costs: Positive, one per size.

    Returns:
        The exponent with the interval of the regression.
    """
    logs = [[math.log(value) for value in values] for values in (sizes, costs)]
    fit = stats.linregress(*logs)
    reach = float(stats.t.ppf(0.975, len(sizes) - 2)) * fit.stderr
    return Interval(fit.slope, fit.slope - reach, fit.slope + reach)
