"""All that is worked out from the rows of a study, in one space."""

from __future__ import annotations

from dataclasses import dataclass

from kdnet.studies.cells import RESAMPLES
from kdnet.studies.facts import Facts
from kdnet.studies.gains import Comparison, Network, NetworkDice, Pairing
from kdnet.studies.lead import LeadAndGain, lead_and_gain
from kdnet.studies.rows import Study


@dataclass(frozen=True)
class Analysis:
    """Numbers for the tables and figures of one space.

    Attributes:
        pairing: Knows rows, teachers and references.
        dice: Of all networks.
        gains: Of all students, over the reference with as many labels.
        over_most: Of the students with fewer labels, over the reference with most.
        leads: Of the comparisons in `gains` that have a teacher.
    """

    pairing: Pairing
    dice: list[NetworkDice]
    gains: list[Comparison]
    over_most: list[Comparison]
    leads: list[LeadAndGain]

    @property
    def facts(self) -> Facts:
        """What the study is about."""
        return self.pairing.facts

    def name(self, network: Network) -> str:
        """How tables call the kind of a network."""
        return self.facts.label(network.kind)

    @property
    def shown(self) -> list[LeadAndGain]:
        """Leads of the chosen recipe; of all students where no chosen recipe is stored."""
        chosen = [one for one in self.leads if self.pairing.is_chosen(one.comparison.network)]
        return chosen or self.leads


def analyse(study: Study, space: str, seed: int = 0, resamples: int = RESAMPLES) -> Analysis:
    """Work out Dice, gains and leads."""
    pairing = Pairing(study, space, seed, resamples)
    gains = pairing.compare()
    leads = [lead_and_gain(pairing, comparison) for comparison in gains]
    return Analysis(
        pairing=pairing,
        dice=pairing.dice(),
        gains=gains,
        over_most=pairing.compare("most"),
        leads=[one for one in leads if one.lead.cases],
    )
