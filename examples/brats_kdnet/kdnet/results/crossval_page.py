"""The page of a cross-validation: any number of networks over folds and seeds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from kdnet.evaluation.scoring import Score
from kdnet.results.comparison import other_tables, paper_tables, subset_tables
from kdnet.results.costs import costs
from kdnet.results.crossval_folder import CrossvalFolder
from kdnet.results.grids import Grid, chapters, gain_grid
from kdnet.results.page import duration, flat, left_out, read_mapping, write_page
from kdnet.results.pictures import gain_charts, pictures
from kdnet.results.results import METRIC_NAMES, headline
from kdnet.results.tables import Gain, gains
from kdnet.runs.folder import UnitFolder

# The strip has room for these; the viewer shows every network.
_IN_STRIP = 3


def write_crossval_page(root: Path, trusted: Collection[str] = ()) -> Path:
    """Write report.html into the folder of a cross-validation."""
    folder = CrossvalFolder(root, frozenset(trusted))
    return write_page(root / "report.html", "crossval.html.j2", _content(folder))


def _content(folder: CrossvalFolder) -> dict[str, Any]:
    """Everything that the template prints."""
    scores, facts = folder.scores(), folder.facts
    differences = _differences(folder, scores)
    student = [gain for gain in differences if gain.role == folder.student]
    compared = (folder.baseline, folder.student)
    remark = folder.cut_slices(scores)
    return {
        "title": folder.root.resolve().name,
        "phantom": bool(facts.get("phantom", False)),
        "data_set": facts.get("dataset", "unknown data set"),
        "protocol": facts.get("protocol", ""),
        "citation": folder.citation,
        "folds": folder.folds,
        "seeds": folder.seeds,
        "held_out": len({score.case for score in scores}),
        "compared": compared,
        "names": tuple(map(folder.label, compared)),
        "nominal": any(score.hd95_unit == "voxel" for score in scores),
        "headline": headline(student, folder.label),
        "chapters": chapters(scores, folder.label),
        "gain_grids": _gain_grids(folder, differences),
        "gain_charts": gain_charts(scores, student=folder.student, baseline=folder.baseline),
        "figure": pictures(folder.slices, folder.seen, folder.shown, in_strip=_IN_STRIP),
        "remark": remark,
        "paper_tables": paper_tables(scores, str(facts.get("protocol", ""))),
        "other_tables": other_tables(scores, folder.seen),
        "subset_tables": subset_tables(folder.subset_scores(), folder.modalities),
        "rows": [(row, folder.label(row), _trained(folder, row)) for row in folder.rows],
        "runs": _held_out(scores),
        "costs": costs(folder),
        "grades": ", ".join(f"{n} {grade}" for grade, n in facts.get("grades", {}).items()),
        "digest": facts.get("folds_sha256", ""),
        "left_out": left_out(folder.root),
        "config": folder.config,
        "environment": flat(read_mapping(folder.root / "environment.json")),
    }


def _differences(folder: CrossvalFolder, scores: Sequence[Score]) -> list[Gain]:
    """Gains of every row over the baseline of its kind."""
    found: list[Gain] = []
    for row in folder.rows:
        against = folder.baseline_of(row)
        if row != against:
            found += gains(scores, role=row, against=against)
    return found


def _gain_grids(folder: CrossvalFolder, differences: Sequence[Gain]) -> list[Grid]:
    grids = [
        gain_grid(differences, gain, METRIC_NAMES[gain], folder.label)
        for gain in dict.fromkeys(gain.metric for gain in differences if gain.n)
    ]
    return [grid for grid in grids if grid.rows]


def _trained(folder: CrossvalFolder, row: str) -> str:
    """How many networks of a row are trained, and how long one took on average."""
    done = [path for path in folder.units(row) if (path / "scores.csv").is_file()]
    seconds = [sum(UnitFolder(path).read_record().get("seconds", {}).values()) for path in done]
    spent = f", {duration(sum(seconds) / len(seconds))} each" if any(seconds) else ""
    return f"{len(done)} of {folder.folds * len(folder.seeds)}{spent}"


def _held_out(scores: Sequence[Score]) -> list[tuple[int, list[str]]]:
    """Fold and the names of the cases that it held out."""
    held: dict[int, dict[str, None]] = {}
    for score in scores:
        held.setdefault(score.fold, {})[score.case] = None
    return [(fold, list(held[fold])) for fold in sorted(held)]
