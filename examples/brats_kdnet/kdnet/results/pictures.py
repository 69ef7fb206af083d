"""Everything on a page that is looked at: the strip of cases, the viewer, the charts of gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kdnet.evaluation.scoring import Score
from kdnet.results.charts import draw_gains, draw_pairs, pairs_of
from kdnet.results.slices import ShownCase, load_slices
from kdnet.results.tiles import Tile, label_colour, other_tiles, sheets, tiles

# Characters; with strip, charts and tables a page stays below 6 MB, which mail still carries.
VIEWER_BUDGET = 4_500_000


@dataclass(frozen=True)
class Strip:
    """One case as a row of pictures.

    Attributes:
        case: Name, reason and position.
        tiles: What the student sees, the reference, the predictions.
        others: The modalities that the student does not see.
    """

    case: ShownCase
    tiles: list[Tile]
    others: list[Tile]


def pictures(
    path: Path, seen: Sequence[str], rows: Sequence[str], *, in_strip: int = 3
) -> dict[str, Any]:
    """The part of a page about single cases."""
    classes, cases = load_slices(path)
    shown, left_out = viewer_cases(cases, rows)
    return {
        "legend": [(name, label_colour(index)) for index, name in enumerate(classes) if index],
        "strips": [Strip(c, tiles(c, seen, rows[:in_strip]), other_tiles(c, seen)) for c in cases],
        "viewer": shown,
        "left_out": left_out,
    }


def viewer_cases(
    cases: Sequence[ShownCase], rows: Sequence[str], budget: int = VIEWER_BUDGET
) -> tuple[list[dict[str, Any]], list[str]]:
    """What the viewer's script reads."""
    shown, left_out = [], []
    for case in cases:
        if case.stack is None:
            continue
        sheet = sheets(case.stack, case.aspect)
        if sheet.size > budget:
            left_out.append(case.name)
            continue
        budget -= sheet.size
        order = [name for name in ("reference", *rows) if name in sheet.labels]
        shown.append(
            {
                "name": case.name,
                "why": case.why,
                "total": case.position[1],
                "start": sheet.numbers.index(case.position[0]),
                "numbers": sheet.numbers,
                "columns": sheet.columns,
                "width": sheet.width,
                "height": sheet.height,
                "ratio": round(sheet.ratio, 4),
                "modality": sheet.modality,
                "image": sheet.image,
                "labels": [(name, sheet.labels[name]) for name in order],
            }
        )
    return shown, left_out


def gain_charts(scores: Sequence[Score], *, student: str, baseline: str) -> dict[str, list[Markup]]:
    """Charts of what each case gains."""
    paired = pairs_of(scores, student=student, baseline=baseline)
    return {
        "pairs": [Markup(draw_pairs(region)) for region in paired],  # noqa: S704
        "gains": [Markup(draw_gains(region)) for region in paired],  # noqa: S704
    }
