"""Tables of texts for the terminal, Markdown and the page, all made with pandas."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from kdnet.errors import UserError, printable
from kdnet.files import read_yaml
from kdnet.results.stats import METRICS, Gain, Interval, Moments, cells, interval, moments

SPACES = {"native": "native space", "grid": "training grid"}
TREATMENTS = {"off": "no post-processing", "on": "small regions removed"}
SCORES = {
    "dice": "Dice",
    "dice_reference_present": "Dice, cases with the region in the reference",
    "hd95": "HD95",
    "nsd": "surface Dice at 1 mm",
}
REGIONS = ("ET", "TC", "WT")
EMPTY_RULE = (
    "Both masks empty: Dice and surface Dice 1, HD95 0; exactly one empty: Dice and surface Dice "
    "0, HD95 the diagonal of the image."
)
_DASH = "\N{EN DASH}"
_NOT_RUN = "not run"

Label = Callable[[str], str]


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: Above it.
        frame: The cells, as they are printed.
        notes: Sentences below it.
        words: Number of columns, from the left, that hold words; the others hold numbers.
    """

    title: str
    frame: pd.DataFrame
    notes: tuple[str, ...] = ()
    words: int = 1

    @classmethod
    def of(
        cls,
        title: str,
        columns: Sequence[str],
        lines: Sequence[Sequence[str]],
        notes: Iterable[str] = (),
        words: int = 1,
    ) -> Table:
        """Make a table of lines of cells."""
        return cls(title, pd.DataFrame(lines, columns=[*columns], dtype=object), (*notes,), words)

    def text(self) -> str:
        """Return the table for the terminal, which obeys nothing that a name holds."""
        body = self._grid("simple", printable, once=True)
        return "\n".join([printable(self.title), "", body, *map(printable, self.notes)]) + "\n"

    def markdown(self) -> str:
        """Return the table as GitHub's Markdown, its notes as paragraphs."""
        notes = "".join(f"\n\n{as_markdown(note)}" for note in self.notes)
        body = self._grid("pipe", lambda cell: as_markdown(cell).replace("|", "\\|"))
        return f"**{as_markdown(self.title)}**\n\n{body}{notes}\n"

    def html(self, style: str = "wide") -> Markup:
        """Return the table as HTML; pandas escapes what the cells hold."""
        frame = _without_repeats(self.frame)
        with pd.option_context("display.max_colwidth", None):
            text = frame.to_html(index=False, border=0, classes=[style], justify="left")
        return Markup(text)  # noqa: S704

    def _grid(self, form: str, written: Callable[[str], str], *, once: bool = False) -> str:
        frame = (_without_repeats(self.frame) if once else self.frame).map(written)
        sides = ["left" if n < self.words else "right" for n in range(frame.shape[1])]
        head = [*map(written, frame.columns)]
        return str(
            frame.to_markdown(
                index=False, tablefmt=form, headers=head, disable_numparse=True, colalign=sides
            )
        )


def results_table(
    scores: pd.DataFrame, label: Label, *, space: str = "native", postprocessing: str = "off"
) -> Table | None:
    """Mean, spread and interval of every network and region; None where nothing was scored."""
    here = _here(scores, space, postprocessing)
    lines = [
        _result_line(label(row), region, own)
        for (row, region), own in here.groupby(["row", "region"], sort=False)
    ]
    columns = ["network", "region", "Dice", "median (quartiles)", "95 % interval", "sd of folds"]
    columns += ["sd of seeds", "Dice, reference present (n)", "HD95", "surface Dice", "n"]
    note = (
        "± is the sd over cases; a case with several seeds enters once, with its mean. The sd of "
        "folds is that of the means of the folds, the sd of seeds that of the means of the seeds. "
        f"Surface Dice at 1 mm. {EMPTY_RULE}"
    )
    where = f"{SPACES[space]}, {TREATMENTS[postprocessing]}"
    return Table.of(f"Results, {where}", columns, lines, [note], words=2) if lines else None


def empty_table(scores: pd.DataFrame, label: Label) -> Table:
    """How often a region is empty in native space, and what the networks make of it."""
    lines = []
    for (row, region), own in _here(scores).groupby(["row", "region"], sort=False):
        empty, blank = own["reference_voxels"] == 0, own["predicted_voxels"] == 0
        counts = (own["case"][which].nunique() for which in (empty, empty & ~blank, ~empty & blank))
        total = own["case"].nunique()
        reference, alarms, missed = map(str, counts)
        lines.append([label(row), region, f"{reference} of {total}", alarms, missed])
    columns = ["network", "region", "reference empty", "predicted all the same", "missed"]
    note = (
        "A case counts once, if any seed does it. Predicted all the same: the reference is empty, "
        "the prediction is not. Missed: the reference is not empty, the prediction is."
    )
    return Table.of("Empty regions, native space", columns, lines, [note], words=2)


def gain_table(gains: Sequence[Gain], label: Label, *, space: str = "native") -> Table | None:
    """Every network over the one it is compared with; None without pairs."""
    if not gains:
        return None
    metric = gains[0].metric
    digits = 1 if metric == "hd95" else 3
    lines = [
        [
            f"{label(gain.row)} \N{MINUS SIGN} {label(gain.against)}",
            gain.region,
            number(gain.mean, digits, signed="+"),
            gain.interval.reason or ends(gain.interval, digits, signed="+"),
            gain.reason or p_value(gain.p),
            p_value(gain.p_holm),
            gain.verdict,
            str(len(gain.cells)),
        ]
        for gain in gains
    ]
    columns = ["networks", "region", "gain", "95 % interval", "p", "p (Holm)", "verdict", "cases"]
    note = (
        "Mean paired difference over cases; interval by a percentile bootstrap over cases and "
        "seeds (10,000 resamples); two-sided Wilcoxon signed-rank test on the cases' means, zero "
        "differences dropped, corrected over the regions of a network by Holm, not over the "
        "networks. Better or worse: the interval leaves out zero and the corrected p is below 0.05."
        + " Less is better."
        * (metric == "hd95")
    )
    title = f"Gain in {SCORES[metric]}, {SPACES[space]}, {TREATMENTS['off']}"
    return Table.of(title, columns, lines, [note], words=2)


def headline(gains: Sequence[Gain], label: Label) -> list[str]:
    """The outcome in a sentence for each region, which says no more than it may."""
    sentences = []
    for gain in gains:
        mean = number(gain.mean, signed="+")
        if gain.interval.reason:
            reason = f"{gain.region}: {mean}, no interval: {gain.interval.reason}."
            sentences.append(f"{reason} Nothing can be concluded.")
            continue
        both = f"{label(gain.row)} is {gain.verdict} than {label(gain.against)}"
        said = "no difference is shown" if gain.verdict == "open" else both
        p = p_value(gain.p_holm)
        tested = gain.reason or f"Holm-corrected p {p if p.startswith('<') else f'= {p}'}"
        shown = ends(gain.interval, signed="+")
        sentences.append(f"{gain.region}: {mean} (95 % interval {shown}; {tested}), {said}.")
    return sentences


def case_table(scores: pd.DataFrame, label: Label) -> Table:
    """The native Dice of every case, the mean over its seeds."""
    here = _here(scores)
    table = here.pivot_table(index="case", columns=["region", "row"], values="dice", sort=False)
    columns = ["case", *(f"{region}, {label(row)}" for region, row in table.columns)]
    lines = [[str(case), *map(number, values)] for case, *values in table.itertuples()]
    return Table.of("Dice of every held-out case, native space", columns, lines)


def subset_table(
    scores: pd.DataFrame, label: Label, modalities: Sequence[str], space: str
) -> Table:
    """Mean Dice for every subset of the modalities; fifteen subsets of four."""
    here = _here(scores, space)
    asked = [
        subset for size in range(len(modalities)) for subset in combinations(modalities, size + 1)
    ]
    seen = here["modalities"].map(lambda text: frozenset(text.split("+")))
    strange = {*seen} - {*map(frozenset, asked)}
    if strange:
        raise UserError(
            f"subsets.csv: expected networks that saw some of {', '.join(modalities)}, found "
            f"{'+'.join(sorted(min(strange, key=sorted)))}."
        )
    places = here[["row", "region"]].drop_duplicates().itertuples(index=False)
    columns = {}
    for row, region in places:
        own = here[(here["row"] == row) & (here["region"] == region)]
        means = {view: 100 * cells(lines).mean(axis=1).mean() for view, lines in own.groupby(seen)}
        found = [means.get(frozenset(subset), math.nan) for subset in asked]
        shown = [_NOT_RUN if math.isnan(value) else number(value, 2) for value in found]
        columns[f"{label(row)}, {region}"] = [*shown, number(sum(found) / len(found), 2)]
    first = [*map("+".join, asked), f"mean of {len(asked)}"]
    note = "Dice in per cent, mean over cases; the mean over subsets where none is missing."
    frame = pd.DataFrame({"modalities": first} | columns, dtype=object)
    return Table(f"Subsets of modalities, {SPACES[space]}", frame, (note,))


@lru_cache(maxsize=1)
def published() -> dict[str, Any]:
    """What others published: protocols, and rows by table."""
    content: dict[str, Any] = read_yaml(Path(__file__).with_name("published.yaml"))
    return content


def paper_table(
    which: str, scores: pd.DataFrame, protocol: str, *, space: str = "grid"
) -> Table | None:
    """Table 1 or 2 of the paper with our numbers beside the published ones; None without ours.

    Source: Hu, Maillard et al. 2020, arXiv:2106.09564.
    """
    here = _here(scores, space)
    rows = published()["tables"][which]
    if not {row["row"] for row in rows} & {*here["row"]} or not {*REGIONS} & {*here["region"]}:
        return None
    protocols = [f"ours: {protocol}"]
    lines = []
    for row in rows:
        own = here[here["row"] == row["row"]]
        found = [own[own["region"] == region] for region in REGIONS]
        lines += _our_lines(row["label"], [moments(one, "dice") for one in found])
        lines.append(_published_line(row, protocols))
    return _with_protocols(f"{which} of the paper, {SPACES[space]}", "network", lines, protocols)


def published_table(which: str = "BraTS 2018, T1ce alone") -> Table:
    """What others published, with their protocols."""
    protocols: list[str] = []
    lines = [_published_line(row, protocols) for row in published()["tables"][which]]
    return _with_protocols(f"{which}, published numbers", "method", lines, protocols)


def number(value: float, digits: int = 3, *, signed: str = "") -> str:
    """A number for a table; a dash for NaN.

    >>> number(0.12345), number(float("nan")), number(-0.5, 1, signed="+")
    ('0.123', '–', '−0.5')
    """
    if math.isnan(value):
        return _DASH
    text = f"{value:{signed}.{digits}f}"
    if float(text) == 0:
        text = text.replace("-", "").replace("+", "")
    return text.replace("-", "\N{MINUS SIGN}")


def p_value(value: float) -> str:
    """A p value for a table."""
    return "< 0.001" if value < 0.001 else number(value)


def ends(found: Interval, digits: int = 3, *, signed: str = "") -> str:
    """Both ends of an interval."""
    if found.reason:
        return "none"
    return " to ".join(number(end, digits, signed=signed) for end in (found.lower, found.upper))


def spread(mean: float, sd: float, digits: int = 3) -> str:
    """Mean and standard deviation."""
    return f"{number(mean, digits)} ± {number(sd, digits)}"


def as_markdown(text: str) -> str:
    """Texts come from files; Markdown would take their HTML for its own."""
    return html.escape(printable(text), quote=False)


def _here(scores: pd.DataFrame, space: str = "native", postprocessing: str = "off") -> pd.DataFrame:
    return scores[(scores["space"] == space) & (scores["postprocessing"] == postprocessing)]


def _result_line(name: str, region: str, own: pd.DataFrame) -> list[str]:
    dice, present, hd95, nsd = (moments(own, metric) for metric in METRICS)
    low, middle, high = map(number, dice.quartiles)
    return [
        name,
        region,
        spread(dice.mean, dice.sd),
        f"{middle} ({low} to {high})",
        ends(interval(cells(own))),
        number(dice.folds_sd),
        number(dice.seeds_sd),
        f"{spread(present.mean, present.sd)} ({present.n})",
        f"{spread(hd95.mean, hd95.sd, 1)} {own['hd95_unit'].iloc[0]}",
        spread(nsd.mean, nsd.sd) if nsd.n else _DASH,
        str(dice.n),
    ]


def _our_lines(label: str, found: Sequence[Moments]) -> list[list[str]]:
    cases = max(one.n for one in found)
    if not cases:
        return [[label, _NOT_RUN, "", *("" for _ in REGIONS)]]
    folds = [spread(100 * one.folds_mean, 100 * one.folds_sd, 2) for one in found]
    whole = [spread(100 * one.mean, 100 * one.sd, 2) for one in found]
    return [
        [label, "ours, over folds", "(1)", *folds],
        [label, f"ours, over {cases} cases", "(1)", *whole],
    ]


def _published_line(row: dict[str, Any], protocols: list[str]) -> list[str]:
    text = f"{row['source']}: {published()['protocols'][row['protocol']]}"
    if text not in protocols:
        protocols.append(text)
    pairs = [row[region] for region in REGIONS]
    shown = [spread(p[0], p[1], 2) if isinstance(p, list) else number(p, 2) for p in pairs]
    over = ", over folds" if any(isinstance(pair, list) for pair in pairs) else ""
    return [row["label"], f"published{over}", f"({protocols.index(text) + 1})", *shown]


def _with_protocols(
    title: str, first: str, lines: list[list[str]], protocols: Sequence[str]
) -> Table:
    notes = [f"({place}) {text}." for place, text in enumerate(protocols, 1)]
    notes.insert(0, "Dice in per cent, mean ± sd. Only numbers of one protocol can be compared.")
    return Table.of(title, [first, "numbers", "protocol", *REGIONS], lines, notes, words=3)


def _without_repeats(frame: pd.DataFrame) -> pd.DataFrame:
    """Equal cells of the first column that follow each other are shown once."""
    first = frame.iloc[:, 0]
    shown = first.where(first != first.shift(), "")
    return pd.concat([shown, frame.iloc[:, 1:]], axis=1)
