"""Tables of texts for the terminal, Markdown and the page, all made with pandas."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from kdnet.errors import printable
from kdnet.evaluation.scoring import scored_in
from kdnet.files import read_yaml
from kdnet.results.stats import Gain, Interval, all_cells, cells, interval
from kdnet.results.stored import Results, optional_mapping

SPACES = {"native": "native space", "grid": "training grid"}
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
_TREATMENTS = {"off": "no post-processing", "on": "small regions removed"}
_DASH = "\N{EN DASH}"
_NOT_RUN = "not run"
_T1CE = "BraTS 2018, T1ce alone"

#: A term in the text of an objective: its weight, its name, and the bracket or option behind it.
_TERM = re.compile(r"(?:([\d.e+-]+) \* )?\b([A-Z]\w*)\((\)|\w+=)?")

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
        cls, title: str, lines: Iterable[Mapping[str, str]], *notes: str, words: int = 1
    ) -> Table:
        """Make a table of lines, each of cells by their columns."""
        return cls(title, pd.DataFrame([*lines], dtype=object), notes, words)

    def text(self) -> str:
        """Return the table for the terminal, which obeys nothing that a name holds."""
        body = self._grid("simple", printable)
        return "\n".join([printable(self.title), "", body, *map(printable, self.notes)]) + "\n"

    def markdown(self) -> str:
        """Return the table as GitHub's Markdown, its notes as paragraphs."""
        notes = "".join(f"\n\n{as_markdown(note)}" for note in self.notes)
        body = self._grid("pipe", lambda cell: as_markdown(cell).replace("|", "\\|"))
        return f"**{as_markdown(self.title)}**\n\n{body}{notes}\n"

    def html(self) -> Markup:
        """Return the table as HTML; pandas escapes what the cells hold."""
        with pd.option_context("display.max_colwidth", None):
            text = self.frame.to_html(index=False, border=0, justify="left")
        return Markup(text)  # noqa: S704

    def _grid(self, form: str, written: Callable[[str], str]) -> str:
        sides = ["left" if n < self.words else "right" for n in range(self.frame.shape[1])]
        return str(
            self.frame.map(written).to_markdown(
                index=False,
                tablefmt=form,
                headers=[*map(written, self.frame.columns)],
                disable_numparse=True,
                colalign=sides,
            )
        )


def results_table(
    scores: pd.DataFrame, label: Label, *, space: str = "native", postprocessing: str = "off"
) -> Table:
    """Mean, spread and interval of every network and region."""
    here = scored_in(scores, space, postprocessing)
    lines = [
        {"network": label(row), "region": region, **_results(own)}
        for (row, region), own in here.groupby(["row", "region"], sort=False)
    ]
    note = (
        "± is the sd over cases; a case with several seeds enters once, with its mean. The sd of "
        "folds is that of the means of the folds, the sd of seeds that of the means of the seeds. "
        f"Surface Dice at 1 mm. {EMPTY_RULE}"
    )
    title = f"Results, {SPACES[space]}, {_TREATMENTS[postprocessing]}"
    return Table.of(title, lines, note, words=2)


def empty_table(scores: pd.DataFrame, label: Label) -> Table:
    """How often a region is empty in native space, and what the networks make of it."""
    lines = []
    for (row, region), own in scored_in(scores).groupby(["row", "region"], sort=False):
        empty, blank = own["reference_voxels"] == 0, own["predicted_voxels"] == 0
        counts = (own["case"][which].nunique() for which in (empty, empty & ~blank, ~empty & blank))
        reference, alarms, missed = map(str, counts)
        lines.append(
            {
                "network": label(row),
                "region": region,
                "reference empty": f"{reference} of {own['case'].nunique()}",
                "predicted all the same": alarms,
                "missed": missed,
            }
        )
    note = (
        "A case counts once, if any seed does it. Predicted all the same: the reference is empty, "
        "the prediction is not. Missed: the reference is not empty, the prediction is."
    )
    return Table.of("Empty regions, native space", lines, note, words=2)


def gain_table(gains: Sequence[Gain], label: Label) -> Table:
    """Every network over the one it is compared with, in native space."""
    metric = gains[0].metric if gains else "dice"
    digits = 1 if metric == "hd95" else 3
    lines = [
        {
            "networks": f"{label(gain.row)} \N{MINUS SIGN} {label(gain.against)}",
            "region": gain.region,
            "gain": number(gain.mean, digits, signed="+"),
            "95 % interval": gain.interval.reason or ends(gain.interval, digits, signed="+"),
            "p": gain.reason or p_value(gain.p),
            "p (Holm)": p_value(gain.p_holm),
            "verdict": gain.verdict,
            "cases": str(len(gain.cells)),
        }
        for gain in gains
    ]
    note = (
        "Mean paired difference over cases; interval by a percentile bootstrap over patients and "
        "seeds (10,000 resamples); two-sided Wilcoxon signed-rank test on the patients' means, "
        "zero differences dropped, corrected over the regions of a network by Holm, not over the "
        "networks. Better or worse: the interval leaves out zero and the corrected p is below 0.05."
        + " Less is better."
        * (metric == "hd95")
    )
    title = f"Gain in {SCORES[metric]}, {SPACES['native']}, {_TREATMENTS['off']}"
    return Table.of(title, lines, note, words=2)


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
        outcome = "no difference is shown" if gain.verdict == "open" else both
        p = p_value(gain.p_holm)
        tested = gain.reason or f"Holm-corrected p {p if p.startswith('<') else f'= {p}'}"
        shown = ends(gain.interval, signed="+")
        sentences.append(f"{gain.region}: {mean} (95 % interval {shown}; {tested}), {outcome}.")
    return sentences


def nothing_found(scores: pd.DataFrame, label: Label) -> list[str]:
    """Name every network that finds a region nowhere, over which a gain is easily had."""
    present = scored_in(scores)
    present = present[present["reference_voxels"] > 0]
    best = present.groupby(["row", "region"], sort=False)["dice"].max().reset_index()
    missed = best[best["dice"] == 0].groupby("row", sort=False)["region"]
    return [
        f"{label(row)} finds {' and '.join(regions)} in no case: a gain over it says little. Train "
        "all networks longer, or let them begin with a prior, as kdnet can."
        for row, regions in missed
    ]


def subset_table(
    scores: pd.DataFrame, label: Label, modalities: Sequence[str], space: str
) -> Table:
    """Mean Dice for every subset of the modalities; fifteen subsets of four."""
    here = scored_in(scores, space)
    sizes = range(1, len(modalities) + 1)
    asked = [subset for size in sizes for subset in combinations(modalities, size)]
    seen = here["modalities"].map(lambda text: frozenset(text.split("+")))
    columns = {"modalities": [*map("+".join, asked), f"mean of {len(asked)}"]}
    for (row, region), own in here.groupby(["row", "region"], sort=False):
        means = {view: 100 * cells(lines).mean(axis=1).mean() for view, lines in own.groupby(seen)}
        found = [means.get(frozenset(subset), math.nan) for subset in asked]
        shown = [_NOT_RUN if math.isnan(value) else number(value, 2) for value in found]
        columns[f"{label(row)}, {region}"] = [*shown, number(sum(found) / len(found), 2)]
    note = "Dice in per cent, mean over cases; the mean over subsets where none is missing."
    frame = pd.DataFrame(columns, dtype=object)
    return Table(f"Subsets of modalities, {SPACES[space]}", frame, (note,))


@lru_cache(maxsize=1)
def published() -> dict[str, Any]:
    """What others published: protocols, and rows by table."""
    content: dict[str, Any] = read_yaml(Path(__file__).with_name("published.yaml"))
    return content


def paper_table(which: str, results: Results) -> Table | None:
    """Table 1 or 2 of the paper with ours at the training grid beside it; None without ours.

    Source: Hu, Maillard et al. 2020, arXiv:2106.09564.
    """
    here = scored_in(results.scores, "grid")
    rows = published()["tables"][which]
    ours = [_row_of(results, row) for row in rows]
    if not {*ours} & {*here["row"]} or not {*REGIONS} & {*here["region"]}:
        return None
    protocols = [f"ours: {results.facts.protocol}"]
    lines = []
    for row, name in zip(rows, ours, strict=True):
        lines += _our_lines(row["label"], here[here["row"] == name])
        lines.append(_published_line(row, protocols))
    return _with_protocols(f"{which} of the paper, {SPACES['grid']}", lines, protocols)


def protocol_table(results: Results) -> Table | None:
    """Rows that see T1ce alone beside those published under the same protocol, in native space."""
    name, table = results.facts.case_lists, published()["tables"][_T1CE]
    rows = [row for row in table if row["protocol"] == name]
    scores = results.scores
    ours = scores[(scores["space"] == "native") & (scores["modalities"] == "t1ce")]
    if not rows or ours.empty or not {*REGIONS} <= {*ours["region"]}:
        return None
    protocols, lines = [f"ours: {results.facts.protocol}"], []
    for (row, treatment), own in ours.groupby(["row", "postprocessing"], sort=False):
        lines += _our_lines(f"{results.label(row)}, {_TREATMENTS[treatment]}", own)
    lines += [_published_line(row, protocols) for row in rows]
    return _with_protocols(f"{name}, {SPACES['native']}", lines, protocols)


def tables_beside_published(results: Results) -> list[Table]:
    """Return the tables in which published numbers stand beside ours."""
    papers = [paper_table(which, results) for which in ("Table 1", "Table 2")]
    return [table for table in (protocol_table(results), *papers) if table is not None]


def published_table(which: str = _T1CE) -> Table:
    """What others published, with their protocols."""
    protocols: list[str] = []
    lines = [_published_line(row, protocols) for row in published()["tables"][which]]
    return _with_protocols(f"{which}, published numbers", lines, protocols)


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


def spread(values: pd.Series[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    return f"{number(values.mean(), digits)} ± {number(values.std(), digits)}"


def as_markdown(text: str) -> str:
    """Texts come from files; Markdown would take their HTML for its own."""
    return html.escape(printable(text), quote=False)


def _results(own: pd.DataFrame) -> dict[str, str]:
    """Cells of one network and region."""
    tables = all_cells(own)
    dice, present, hd95, nsd = (table.mean(axis=1) for table in tables)
    folds, seeds = (own.groupby(by)["dice"].mean() for by in ("fold", "seed"))
    low, middle, high = map(number, dice.quantile([0.25, 0.5, 0.75]))
    return {
        "Dice": spread(dice),
        "median (quartiles)": f"{middle} ({low} to {high})",
        "95 % interval": ends(interval(tables[0])),
        "sd of folds": number(folds.std()),
        "sd of seeds": number(seeds.std()),
        "Dice, reference present (n)": f"{spread(present)} ({len(present)})",
        "HD95": f"{spread(hd95, 1)} {own['hd95_unit'].iloc[0]}",
        "surface Dice": spread(nsd) if len(nsd) else _DASH,
        "n": str(len(dice)),
    }


def _row_of(results: Results, wanted: Mapping[str, Any]) -> str:
    """The row that is trained as a published one says, whatever its name; may be empty."""
    config = results.config
    # Others have the recipe of KD-Net, and are not the KD-Net that was published: objectives of the
    # field, those without one of its terms, and students that start from the teacher's weights.
    other = (
        config.get("objective", "kdnet") != "kdnet"
        or config.get("start") == "teacher"
        or not (config.get("imitation", 1) and config.get("latent_weight", 1))
    )
    for name, row in results.rows.items():
        counts = [row.labelled, row.unlabelled, *map(config.get, ("labelled", "unlabelled"))]
        shared_out = any(count is not None for count in counts)
        same = (row.recipe, row.role, row.options) == (
            wanted.get("recipe", "supervised"),
            wanted.get("role", "student"),
            wanted.get("options", {}),
        )
        theirs = same and not shared_out and not (other and row.recipe == "distilled")
        if theirs and all(map(_learned_as_published, results.units(name))):
            return name
    return ""


def _learned_as_published(unit: Path) -> bool:
    """Whether a unit's objective is that of equation (5) with its own weights, or a part of it."""
    experiment = optional_mapping(unit / "unit.json").get("experiment", {})
    row, config = experiment.get("row", {}), experiment.get("config", {})
    # Other recipes have terms of their own, and are compared with other papers.
    if row.get("recipe") not in {"supervised", "distilled"}:
        return True
    distilled = row["recipe"] == "distilled"
    imitation, latent = (config[name] * distilled for name in ("imitation", "latent_weight"))
    weights = {"SoftTargetDiceBCE": imitation, "GroundTruth": 1 - imitation, "LatentKL": latent}
    expected = [(name, round(weight, 6)) for name, weight in weights.items() if weight]
    found = _TERM.findall(experiment["objective"])
    # A loss of the user's own stands in the brackets without the name of an option.
    options = all(end for _, _, end in found)
    return options and [(n, round(float(w or 1), 6)) for w, n, _ in found] == expected


def _our_lines(label: str, own: pd.DataFrame) -> list[dict[str, str]]:
    if own.empty:
        return []
    ours = {"network": label, "numbers": "ours, over folds", "protocol": "(1)"}
    found = {region: own[own["region"] == region] for region in REGIONS}
    folds = {r: spread(100 * part.groupby("fold")["dice"].mean(), 2) for r, part in found.items()}
    cases = {r: 100 * cells(part).mean(axis=1) for r, part in found.items()}
    whole = {region: spread(values, 2) for region, values in cases.items()}
    count = max(map(len, cases.values()))
    return [ours | folds, ours | {"numbers": f"ours, over {count} cases"} | whole]


def _published_line(row: Mapping[str, Any], protocols: list[str]) -> dict[str, str]:
    text = f"{row['source']}: {published()['protocols'][row['protocol']]}"
    if text not in protocols:
        protocols.append(text)
    pairs = {region: row[region] for region in REGIONS}
    over = ", over folds" * any(isinstance(pair, list) for pair in pairs.values())
    head = {
        "network": row["label"],
        "numbers": f"published{over}",
        "protocol": f"({protocols.index(text) + 1})",
    }
    return head | {
        region: " ± ".join(
            number(value, 2) for value in (pair if isinstance(pair, list) else [pair])
        )
        for region, pair in pairs.items()
    }


def _with_protocols(
    title: str, lines: Sequence[Mapping[str, str]], protocols: Sequence[str]
) -> Table:
    first = "Dice in per cent, mean ± sd. Only numbers of one protocol can be compared."
    notes = [f"({place}) {text}." for place, text in enumerate(protocols, 1)]
    return Table.of(title, lines, first, *notes, words=3)
