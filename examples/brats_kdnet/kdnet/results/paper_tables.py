"""The tables of a paper: ours beside the published ones, gains, subsets of modalities.

Each function returns plain rows; their `text()` makes a `TextTable` for the terminal, for Markdown
or for a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from kdnet.errors import UserError
from kdnet.evaluation.scoring import Postprocessing, Score, Space
from kdnet.results.published import (
    T1CE_ONLY,
    TABLE_ONE,
    TABLE_TWO,
    PublishedRow,
    published,
    published_row,
)
from kdnet.results.tables import (
    POSTPROCESSING_NAMES,
    SPACE_NAMES,
    Gain,
    Metric,
    Moments,
    Summary,
    format_number,
    format_p,
    gains,
    summarise,
)
from kdnet.results.text_table import TextTable

NOT_RUN = "not run"
_PAIRED_NOTE = (
    "Mean paired difference over cases, seeds of a case averaged first; bootstrap interval over "
    "cases; two-sided Wilcoxon signed-rank test, corrected over the regions of a network by Holm, "
    "not over the networks."
)
_SUBSET_NOTE = (
    "Dice in per cent, mean over cases. The mean over subsets is given where none is missing."
)
REGIONS = ("ET", "TC", "WT")

_ABLATION = ("baseline", "gt_kl", "gt_kd", "kdnet", "teacher")
TABLE_ONE_ROWS = ("baseline", "teacher", "uhved", "hemis", "kdnet")
TABLE_TWO_ROWS = (*_ABLATION, *(f"{name}_0skips" for name in _ABLATION))
LABELS = {
    "baseline": "baseline (GT)",
    "teacher": "teacher, every modality (GT)",
    "uhved": "U-HVED",
    "hemis": "U-HeMIS",
    "gt_kl": "GT + KL",
    "gt_kd": "GT + KD",
    "kdnet": "KD-Net (GT + KL + KD)",
}


@dataclass(frozen=True)
class Cell:
    """Dice of one network in one region, per cent.

    Attributes:
        folds_mean: Mean of the means of the folds.
        folds_sd: Standard deviation of the means of the folds; NaN with one fold.
        mean: Mean over cases.
        sd: Standard deviation over cases.
        n: Cases.
    """

    folds_mean: float
    folds_sd: float
    mean: float
    sd: float
    n: int


@dataclass(frozen=True)
class PaperRow:
    """One network of a table of the paper.

    Attributes:
        row: Name of the row.
        label: How the table calls it.
        ours: Region to our numbers; None if the row was not run.
        published: The published numbers with their protocol and source, or None.
    """

    row: str
    label: str
    ours: dict[str, Cell] | None
    published: PublishedRow | None


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper with our numbers beside the published ones.

    Attributes:
        title: What it is, where it was measured.
        rows: In the paper's order.
        protocol: How our numbers were measured, in words.
    """

    title: str
    rows: list[PaperRow]
    protocol: str

    def text(self) -> TextTable:
        """Return up to three lines per network: ours over folds and over cases, and published."""
        protocols = _Numbered([f"ours: {self.protocol}"])
        lines: list[list[str]] = []
        for row in self.rows:
            lines += _our_lines(row)
            if row.published is not None:
                lines.append(_published_line(row.label, row.published, protocols))
        return TextTable(
            title=self.title,
            columns=["network", "numbers", "protocol", *REGIONS],
            rows=lines,
            notes=["Dice in per cent, mean ± sd.", *protocols.notes()],
            words=3,
        )


@dataclass(frozen=True)
class PairedTable:
    """Every network against one of them.

    Attributes:
        title: What it is, where it was measured.
        against: The network that all are compared with.
        rows: One gain per network and region.
    """

    title: str
    against: str
    rows: list[Gain]

    def text(self) -> TextTable:
        """Return one line per network and region."""
        return TextTable(
            title=self.title,
            columns=["network", "region", "gain", "95 % interval", "p", "p (Holm)", "cases"],
            rows=[_gain_line(gain) for gain in self.rows],
            notes=[_PAIRED_NOTE],
            words=2,
        )


@dataclass(frozen=True)
class SubsetRow:
    """One subset of modalities.

    Attributes:
        subset: Its modalities.
        values: Network to region to mean Dice over cases, per cent; networks that were not scored
            with this subset are left out.
    """

    subset: tuple[str, ...]
    values: dict[str, dict[str, float]]


@dataclass(frozen=True)
class SubsetTable:
    """Networks that accept any subset of the modalities, for each subset.

    Attributes:
        title: What it is, where it was measured.
        networks: Names of the rows.
        regions: Names of the regions.
        rows: From single modalities to all of them.
    """

    title: str
    networks: tuple[str, ...]
    regions: tuple[str, ...]
    rows: list[SubsetRow]

    def mean(self, network: str, region: str) -> float:
        """Return the mean over all subsets, as papers give it; NaN if one is missing."""
        values = [row.values.get(network, {}).get(region, math.nan) for row in self.rows]
        return sum(values) / len(values) if values else math.nan

    def text(self) -> TextTable:
        """Return one line per subset, and their mean."""
        places = [(network, region) for network in self.networks for region in self.regions]
        lines = [
            ["+".join(row.subset), *(_subset_cell(row, *place) for place in places)]
            for row in self.rows
        ]
        mean = f"mean of {len(self.rows)}"
        lines.append([mean, *(format_number(self.mean(*place), 2) for place in places)])
        return TextTable(
            title=self.title,
            columns=["modalities", *(f"{network}, {region}" for network, region in places)],
            rows=lines,
            notes=[_SUBSET_NOTE],
        )


def table_one(
    scores: Sequence[Score],
    protocol: str,
    *,
    space: Space = "native",
    postprocessing: Postprocessing = "off",
) -> PaperTable:
    """Table 1 of the paper: comparison with the teacher and with methods for missing modalities."""
    # Source: Hu, Maillard et al. 2020, arXiv:2106.09564, Table 1.
    where = _where(space, postprocessing)
    rows = _paper_rows(TABLE_ONE, TABLE_ONE_ROWS, scores, space, postprocessing)
    return PaperTable(f"{TABLE_ONE}, comparison, {where}", rows, protocol)


def table_two(
    scores: Sequence[Score],
    protocol: str,
    *,
    space: Space = "native",
    postprocessing: Postprocessing = "off",
) -> PaperTable:
    """Table 2 of the paper: each term of the objective, with four skip connections and none."""
    # Source: Hu, Maillard et al. 2020, arXiv:2106.09564, Table 2.
    where = _where(space, postprocessing)
    rows = _paper_rows(TABLE_TWO, TABLE_TWO_ROWS, scores, space, postprocessing)
    return PaperTable(f"{TABLE_TWO}, ablation, {where}", rows, protocol)


def paired_table(
    scores: Sequence[Score],
    against: str = "baseline",
    *,
    roles: Sequence[str] | None = None,
    space: Space = "native",
    metric: Metric = "dice",
    postprocessing: Postprocessing = "off",
    seed: int = 0,
) -> PairedTable:
    """Compare every network with one of them, case by case."""
    chosen = [
        score for score in scores if (score.space, score.postprocessing) == (space, postprocessing)
    ]
    scored = list(dict.fromkeys(score.role for score in chosen))
    if against not in scored:
        raise UserError(
            f"Paired table against '{against}': expected it among the scored networks, found "
            f"{', '.join(scored) or 'none'} ({_where(space, postprocessing)})."
        )
    found: list[Gain] = []
    for role in scored if roles is None else roles:
        if role != against:
            options = {"role": role, "against": against}
            rows = gains(chosen, **options, seed=seed, postprocessing=postprocessing)
            found += [gain for gain in rows if gain.metric == metric]
    where = _where(space, postprocessing)
    return PairedTable(f"Gain over {against}, {_UNITS[metric]}, {where}", against, found)


def subset_table(
    scores: Sequence[Score],
    *,
    modalities: Sequence[str] = ("flair", "t1", "t1ce", "t2"),
    space: Space = "native",
    postprocessing: Postprocessing = "off",
) -> SubsetTable:
    """Mean Dice for every subset of the modalities; fifteen subsets of four."""
    rows = [row for row in summarise(scores, postprocessing=postprocessing) if row.space == space]
    known = set(modalities)
    strange = sorted({row.modalities for row in rows if not _seen(row) or _seen(row) - known})
    if strange:
        raise UserError(
            f"Table of subsets: expected networks that saw some of {', '.join(modalities)}, found "
            f"{', '.join(repr(text) for text in strange)}. Give the modalities of the data set."
        )
    sizes = range(1, len(modalities) + 1)
    subsets = [subset for size in sizes for subset in combinations(modalities, size)]
    return SubsetTable(
        title=f"Subsets of modalities, {_where(space, postprocessing)}",
        networks=tuple(dict.fromkeys(row.role for row in rows)),
        regions=tuple(dict.fromkeys(row.region for row in rows)),
        rows=[_subset_row(subset, rows) for subset in subsets],
    )


def published_table(table: str = T1CE_ONLY) -> TextTable:
    """What others published, with their protocols."""
    protocols = _Numbered([])
    return TextTable(
        title=f"{table}, published numbers",
        columns=["method", "numbers", "protocol", *REGIONS],
        rows=[_published_line(row.row, row, protocols) for row in published(table)],
        notes=[
            "Dice in per cent. Only numbers of one protocol can be compared.",
            *protocols.notes(),
        ],
        words=3,
    )


class _Numbered:
    """Long texts that a table refers to by number."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = list(texts)

    def number(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"({self.texts.index(text) + 1})"

    def notes(self) -> list[str]:
        return [f"({number}) {text}." for number, text in enumerate(self.texts, 1)]


_UNITS: dict[Metric, str] = {
    "dice": "Dice in points of 100",
    "dice_reference_present": "Dice in points of 100, cases with the region in the reference",
    "hd95": "HD95",
    "nsd": "surface Dice at 1 mm in points of 100",
}


def _where(space: Space, postprocessing: Postprocessing) -> str:
    return f"{SPACE_NAMES[space]}, {POSTPROCESSING_NAMES[postprocessing]}"


def _paper_rows(
    table: str,
    names: Sequence[str],
    scores: Sequence[Score],
    space: Space,
    postprocessing: Postprocessing,
) -> list[PaperRow]:
    chosen = [score for score in scores if score.space == space and score.role in names]
    summaries = summarise(chosen, postprocessing=postprocessing)
    return [
        PaperRow(name, _label(name), _cells(name, summaries), published_row(table, name))
        for name in names
    ]


def _label(name: str) -> str:
    plain = name.removesuffix("_0skips")
    return LABELS[plain] + (", 0 skips" if plain != name else "")


def _cells(name: str, summaries: Sequence[Summary]) -> dict[str, Cell] | None:
    rows = [row for row in summaries if row.role == name]
    views = list(dict.fromkeys(row.modalities for row in rows))
    if len(views) > 1:
        raise UserError(
            f"Row '{name}' has scores for the modalities {' and '.join(views)}; a table of the "
            "paper shows one subset. Leave out the scores of the others."
        )
    return {row.region: _cell(row.dice) for row in rows} or None


def _cell(dice: Moments) -> Cell:
    return Cell(
        folds_mean=100 * dice.folds_mean,
        folds_sd=100 * dice.folds_sd,
        mean=100 * dice.mean,
        sd=100 * dice.sd,
        n=dice.n,
    )


def _our_lines(row: PaperRow) -> list[list[str]]:
    if row.ours is None:
        return [[row.label, NOT_RUN, "", *("" for _ in REGIONS)]]
    cells = [row.ours.get(region) for region in REGIONS]
    cases = max(cell.n for cell in row.ours.values())
    folds = [_mean_sd(cell.folds_mean, cell.folds_sd) if cell else "" for cell in cells]
    whole = [_mean_sd(cell.mean, cell.sd) if cell else "" for cell in cells]
    return [
        [row.label, "ours, over folds", "(1)", *folds],
        [row.label, f"ours, over {cases} cases", "(1)", *whole],
    ]


def _published_line(label: str, row: PublishedRow, protocols: _Numbered) -> list[str]:
    number = protocols.number(f"{row.source}: {row.protocol}")
    pairs = [row.regions[region] for region in REGIONS]
    cells = [_mean_sd(mean, sd) if sd is not None else f"{mean:.2f}" for mean, sd in pairs]
    over = ", over folds" if any(sd is not None for _, sd in pairs) else ""
    return [label, f"published{over}", number, *cells]


def _mean_sd(mean: float, sd: float) -> str:
    return f"{format_number(mean, 2)} ± {format_number(sd, 2)}"


def _gain_line(gain: Gain) -> list[str]:
    scale = 1 if gain.metric == "hd95" else 100
    interval, test = gain.interval, gain.test
    ends = [format_number(scale * end, 2, signed=True) for end in (interval.lower, interval.upper)]
    return [
        gain.role,
        gain.region,
        format_number(scale * gain.mean, 2, signed=True),
        interval.reason or " to ".join(ends),
        test.reason or format_p(test.p_value),
        format_p(gain.p_holm),
        str(gain.n),
    ]


def _seen(row: Summary) -> set[str]:
    return set(filter(None, row.modalities.split("+")))


def _subset_row(subset: tuple[str, ...], rows: Sequence[Summary]) -> SubsetRow:
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        if _seen(row) == set(subset):
            values.setdefault(row.role, {})[row.region] = 100 * row.dice.mean
    return SubsetRow(subset, values)


def _subset_cell(row: SubsetRow, network: str, region: str) -> str:
    if network not in row.values:
        return NOT_RUN
    return format_number(row.values[network].get(region, math.nan), 2)
