"""The report of a run: one HTML file that needs nothing else, not even a network.

    python report.py runs/demo

It is made from the run folder alone and can be made again at any time.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from errors import UserError
from evaluation.charts import draw_chart, history_charts, label_colour, tiles
from evaluation.scoring import Score, read_scores
from evaluation.slices import load_slices
from evaluation.tables import (
    METRICS,
    ROLES,
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
from run_folder import RunFolder, write_text
from training.checkpoint import ModelMetadata, read_metadata
from training.history import read_history

_LEVEL = 0.05
_TEMPLATES = Path(__file__).resolve().parent / "templates"
_METRIC_NAMES = {
    "dice": "Dice, all cases",
    "dice_reference_present": "Dice, cases with the region in the reference",
    "hd95": "HD95",
    "nsd": "Surface Dice at 1 mm",
}


@dataclass(frozen=True)
class Row:
    """One region under one metric, as it is printed.

    Attributes:
        region: Name of the region.
        networks: Role to "mean ± sd".
        n: Cases that entered.
        gain: Mean difference of student and baseline; empty without both.
        interval: Its interval, or why there is none.
        p_value: Of the paired test, or why there is none.
        p_holm: Corrected over regions.
        verdict: "better", "worse" or "open"; decides the colour.
    """

    region: str
    networks: dict[str, str]
    n: str
    gain: str
    interval: str
    p_value: str
    p_holm: str
    verdict: str


@dataclass(frozen=True)
class Block:
    """The rows of one metric.

    Attributes:
        title: Name of the metric, with its unit.
        rows: One per region.
    """

    title: str
    rows: list[Row]


@dataclass(frozen=True)
class SpaceTable:
    """The results in one space.

    Attributes:
        title: Name of the space.
        blocks: One per metric.
        empties: One line per region about empty references and predictions.
    """

    title: str
    blocks: list[Block]
    empties: list[tuple[str, str, dict[str, str]]]


def write_report(run_folder: Path) -> Path:
    """Write report.html into a run folder.

    Args:
        run_folder: A folder that train.py filled.

    Returns:
        The file written.

    Raises:
        UserError: If the folder is not that of a run, or the run has no scores yet.
    """
    run = RunFolder(run_folder)
    if not run.config.is_file():
        raise UserError(
            f"{run_folder}: expected the folder of a run, found no {run.config.name} in it. Give "
            "the folder that train.py wrote to (--out)."
        )
    page = _environment().get_template("report.html.j2").render(**_content(run))
    target = run.root / "report.html"
    write_text(target, page)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and write the report.

    Args:
        arguments: Without the program's name; sys.argv if None.

    Returns:
        Exit status: 0, or 2 for a folder that cannot be used.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="run folder")
    try:
        path = write_report(parser.parse_args(arguments).run)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{path}\n")
    return 0


def verdict(gain: Gain) -> str:
    """Say what an interval allows to say, and no more.

    Args:
        gain: Difference of two networks.

    Returns:
        "better" or "worse" if the interval leaves out zero and the corrected test agrees,
        otherwise "open". For HD95 less is better.
    """
    # Few cases make the bootstrap interval too narrow, so it does not decide alone.
    if not gain.p_holm < _LEVEL:
        return "open"
    lower, upper = gain.interval.lower, gain.interval.upper
    if gain.metric == "hd95":
        lower, upper = -upper, -lower
    if lower > 0:
        return "better"
    return "worse" if upper < 0 else "open"


def headline(differences: Sequence[Gain]) -> list[str]:
    """The outcome in sentences, one per region, from the Dice in native space.

    Args:
        differences: All gains of the student over the baseline.

    Returns:
        Sentences without adjectives of praise.
    """
    sentences = []
    for gain in differences:
        if gain.metric != "dice" or gain.space != "native":
            continue
        mean = format_number(gain.mean, signed=True)
        if gain.interval.reason:
            reason = f"no interval: {gain.interval.reason}"
            sentences.append(f"{gain.region}: {mean}, {reason}. Nothing can be concluded.")
            continue
        said = {
            "better": "the student is better than the baseline",
            "worse": "the student is worse than the baseline",
            "open": "no difference is shown",
        }[verdict(gain)]
        tested = gain.test.reason or f"Holm-corrected p {_relation(gain.p_holm)}"
        sentences.append(f"{gain.region}: {mean} ({_interval(gain)}; {tested}), {said}.")
    return sentences


def _content(run: RunFolder) -> dict[str, Any]:
    """Everything that the template prints."""
    scores = read_scores(run.scores)
    models = {role: read_metadata(run.model(role)) for role in ROLES if run.model(role).is_file()}
    config, environment = _read(run.config), _read(run.environment)
    cases, summary = _read(run.cases), _read(run.summary)
    differences = gains(scores)
    histories = {role: read_history(run.role(role) / "history.csv") for role in ROLES}
    charts = history_charts({role: rows for role, rows in histories.items() if rows})
    return {
        "title": run.root.resolve().name,
        "phantom": any(m.phantom or m.description.phantom for m in models.values()),
        "data_set": next((m.description.name for m in models.values()), "unknown data set"),
        "citation": next((m.description.citation for m in models.values()), ""),
        "roles": [role for role in ROLES if any(score.role == role for score in scores)],
        "views": {role: ", ".join(model.modalities) for role, model in models.items()},
        "networks": {role: model.summary() for role, model in models.items()},
        "epochs": {role: model.epoch for role, model in models.items()},
        "crop": _crop(models),
        "cropped": any(model.crop is not None for model in models.values()),
        "headline": headline(differences),
        "tables": _tables(scores, differences),
        "charts": [Markup(draw_chart(title, curves)) for title, curves in charts.items()],  # noqa: S704
        "figure": _figure(run, models),
        "per_case": _per_case(scores),
        "config": config,
        "environment": _flat(environment),
        "cases": {part: names for part, names in cases.items() if isinstance(names, list)},
        "held_out": len({score.case for score in scores}),
        "seconds": _seconds(summary),
        "memory": _memory(summary),
        "fold": config.get("fold"),
        "folds": config.get("folds"),
        "seed": environment.get("seed", config.get("seed")),
    }


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON or YAML file of the run; empty if the run has not come that far."""
    if not path.is_file():
        return {}
    try:
        # JSON is a part of YAML.
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: expected YAML or JSON, which it is not ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, found {type(content).__name__}.")
    return content


def _tables(scores: Sequence[Score], differences: Sequence[Gain]) -> list[SpaceTable]:
    rows = summarise(scores)
    # Native space first: it is what a user of the label maps gets.
    spaces = [space for space in ("native", "grid") if any(row.space == space for row in rows)]
    return [
        SpaceTable(
            title=SPACE_NAMES[space],
            blocks=[
                _block(
                    metric,
                    [row for row in rows if row.space == space],
                    [gain for gain in differences if (gain.space, gain.metric) == (space, metric)],
                )
                for metric in METRICS
            ],
            empties=_empties([row for row in rows if row.space == space]),
        )
        for space in spaces
    ]


def _block(metric: Metric, rows: Sequence[Summary], differences: Sequence[Gain]) -> Block:
    unit = f" [{rows[0].hd95_unit}]" if metric == "hd95" else ""
    printed = []
    for region in dict.fromkeys(row.region for row in rows):
        moments = {row.role: getattr(row, metric) for row in rows if row.region == region}
        gain = next((gain for gain in differences if gain.region == region), None)
        printed.append(_row(region, moments, gain, digits=1 if metric == "hd95" else 3))
    return Block(_METRIC_NAMES[metric] + unit, printed)


def _row(region: str, moments: dict[str, Moments], gain: Gain | None, digits: int) -> Row:
    numbers = sorted({m.n for m in moments.values()})
    return Row(
        region=region,
        networks={
            role: f"{format_number(m.mean, digits)} ± {format_number(m.sd, digits)}"
            for role, m in moments.items()
        },
        n=" / ".join(map(str, numbers)),
        gain=format_number(gain.mean, digits, signed=True) if gain else "",
        interval=(gain.interval.reason or _interval(gain, digits)) if gain else "",
        p_value=(gain.test.reason or f"p {_relation(gain.test.p_value)}") if gain else "",
        p_holm="" if gain is None or math.isnan(gain.p_holm) else f"Holm {_relation(gain.p_holm)}",
        verdict=verdict(gain) if gain else "open",
    )


def _interval(gain: Gain, digits: int = 3) -> str:
    lower = format_number(gain.interval.lower, digits, signed=True)
    upper = format_number(gain.interval.upper, digits, signed=True)
    return f"{gain.interval.level:.0%} interval {lower} to {upper}"


def _relation(p_value: float) -> str:
    text = format_p(p_value)
    return text if text.startswith("<") else f"= {text}"


def _empties(rows: Sequence[Summary]) -> list[tuple[str, str, dict[str, str]]]:
    lines = []
    for region in dict.fromkeys(row.region for row in rows):
        chosen = [row for row in rows if row.region == region]
        first = chosen[0]
        by_role = {
            row.role: f"{row.false_alarms} predicted all the same, {row.missed} missed"
            for row in chosen
        }
        lines.append((region, f"{first.reference_empty} of {first.dice.n}", by_role))
    return lines


def _figure(run: RunFolder, models: dict[str, ModelMetadata]) -> dict[str, Any]:
    classes, cases = load_slices(run.root / "slices.npz")
    seen = models["student"].modalities if "student" in models else ()
    return {
        "legend": [(name, label_colour(index)) for index, name in enumerate(classes) if index],
        "cases": [(case, tiles(case, seen)) for case in cases],
    }


def _per_case(scores: Sequence[Score]) -> dict[str, Any]:
    native = [score for score in scores if score.space == "native"]
    columns = list(dict.fromkeys((score.region, score.role) for score in native))
    values = {(s.case, s.region, s.role): format_number(s.dice) for s in native}
    return {
        "columns": columns,
        "rows": [
            (case, [values.get((case, *column), format_number(math.nan)) for column in columns])
            for case in dict.fromkeys(score.case for score in native)
        ],
    }


def _crop(models: dict[str, ModelMetadata]) -> str:
    """How the training grid comes about, in words."""
    model = next(iter(models.values()), None)
    if model is None:
        return "a part that is not known: there is no model file"
    resampled = f" resampled to {' x '.join(map(str, model.grid))}" if model.grid else ""
    seen = f", {model.geometry}" if model.patch or model.slices else ""
    if model.crop is None:
        return f"the whole volume{resampled}{' voxels' * bool(resampled)}{seen}"
    crop = " x ".join(map(str, model.crop))
    return f"the central {crop} voxels{resampled}{seen}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}: ")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _seconds(summary: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Phase, its time, and its share of the longest phase in per cent."""
    seconds = {name: float(value) for name, value in summary.get("seconds", {}).items()}
    longest = max(seconds.values(), default=0.0) or 1.0
    lines = [(name, _duration(v), round(100 * v / longest, 1)) for name, v in seconds.items()]
    if seconds:
        lines.append(("in all", _duration(sum(seconds.values())), 0.0))
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _memory(summary: dict[str, Any]) -> dict[str, str]:
    return {
        name.replace("_", " "): f"{float(value):,.0f} MiB"
        for name, value in summary.get("peak_mib", {}).items()
    }


if __name__ == "__main__":
    sys.exit(main())
