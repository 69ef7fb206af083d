"""The tables of a paper on the page of a cross-validation: ours beside the published ones."""

from __future__ import annotations

from collections.abc import Sequence

from kdnet.evaluation.scoring import Score, Space
from kdnet.results.paper_tables import (
    REGIONS,
    TABLE_ONE_ROWS,
    TABLE_TWO_ROWS,
    published_table,
    subset_table,
    table_one,
    table_two,
)
from kdnet.results.text_table import TextTable

# The paper's own numbers were apparently measured at the training grid.
_SPACES: tuple[Space, ...] = ("grid", "native")


def paper_tables(scores: Sequence[Score], protocol: str) -> list[list[TextTable]]:
    """Tables 1 and 2 of the paper, as far as they have any number of ours."""
    if not {score.region for score in scores} & set(REGIONS):
        return []
    tables = [_tables_in(space, scores, protocol) for space in _SPACES]
    return [found for found in tables if found]


def _tables_in(space: Space, scores: Sequence[Score], protocol: str) -> list[TextTable]:
    run = {score.role for score in scores if score.space == space}
    found = []
    if run & set(TABLE_ONE_ROWS):
        found.append(table_one(scores, protocol, space=space).text())
    if run & (set(TABLE_TWO_ROWS) - set(TABLE_ONE_ROWS)):
        found.append(table_two(scores, protocol, space=space).text())
    return found


def other_tables(scores: Sequence[Score], seen: Sequence[str]) -> list[TextTable]:
    """What others published for a student that sees T1ce alone."""
    fits = {score.region for score in scores} >= set(REGIONS) and tuple(seen) == ("t1ce",)
    return [published_table()] if fits else []


def subset_tables(scores: Sequence[Score], modalities: Sequence[str]) -> list[TextTable]:
    """Networks that accept any subset of the modalities."""
    spaces = [space for space in reversed(_SPACES) if any(s.space == space for s in scores)]
    return [subset_table(scores, modalities=modalities, space=space).text() for space in spaces]
