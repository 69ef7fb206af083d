"""Does a student gain more where the teacher leads by more?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdnet.results.significance import Interval
from kdnet.studies.cells import Cells, mean_interval, slope, slope_interval
from kdnet.studies.gains import Comparison, Pairing

PARTS = 4


@dataclass(frozen=True)
class Slope:
    """Rise of the gain with the teacher's lead.

    Attributes:
        value: Points of gain per point of lead; NaN where it cannot be told.
        interval: Over cases and seeds.
    """

    value: float
    interval: Interval


@dataclass(frozen=True)
class Quartile:
    """A quarter of the cases, by the teacher's lead.

    Attributes:
        lowest: Lowest lead of its cases.
        highest: Highest lead of its cases.
        gain: Gain of its cases.
        interval: Of the mean gain.
    """

    lowest: float
    highest: float
    gain: Cells
    interval: Interval


@dataclass(frozen=True)
class LeadAndGain:
    """A comparison beside the teacher's lead, in the cells that have both.

    Attributes:
        comparison: Which.
        lead: Dice of the teacher minus that of the reference, both averaged over seeds.
        gain: Of the same cases and units.
        slope: Of gain on lead. Both share the reference: its luck alone lets gain rise with lead.
        apart: The same with the lead over references of other seeds, which share no training with
            the gain; what makes a case easy for all seeds is still in both.
        quartiles: By lead, lowest first; empty below four cases.
    """

    comparison: Comparison
    lead: Cells
    gain: Cells
    slope: Slope
    apart: Slope
    quartiles: list[Quartile]


def lead_and_gain(pairing: Pairing, comparison: Comparison) -> LeadAndGain:
    """Put the teacher's lead beside the gain."""
    lead, gain = _both(pairing, comparison, other_seeds=False)
    return LeadAndGain(
        comparison=comparison,
        lead=lead,
        gain=gain,
        slope=_slope(pairing, lead, gain),
        apart=_slope(pairing, *_both(pairing, comparison, other_seeds=True)),
        quartiles=_quartiles(pairing, lead, gain),
    )


def _both(pairing: Pairing, comparison: Comparison, *, other_seeds: bool) -> tuple[Cells, Cells]:
    leads = pairing.lead(comparison, other_seeds=other_seeds)
    gains = {place: gain for place, gain in comparison.cells.found().items() if place in leads}
    return Cells.of(leads), Cells.of(gains)


def _slope(pairing: Pairing, lead: Cells, gain: Cells) -> Slope:
    interval = slope_interval(lead, gain, pairing.seed, resamples=pairing.resamples)
    return Slope(slope(lead, gain), interval)


def _quartiles(pairing: Pairing, lead: Cells, gain: Cells) -> list[Quartile]:
    leads = lead.case_means
    if len(leads) < PARTS:
        return []
    found = []
    # Cases are sorted by name, so that equal leads are dealt the same way each time.
    for part in np.array_split(np.argsort(leads, kind="stable"), PARTS):
        cases = {gain.cases[index] for index in part.tolist()}
        cells = Cells.of({at: value for at, value in gain.found().items() if at[0] in cases})
        interval = mean_interval(cells, pairing.seed, resamples=pairing.resamples)
        found.append(Quartile(float(leads[part[0]]), float(leads[part[-1]]), cells, interval))
    return found
