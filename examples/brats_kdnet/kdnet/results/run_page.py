"""The page of one run: teacher, baseline and student on one fold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from kdnet.evaluation.scoring import read_scores
from kdnet.results.charts import draw_chart, history_charts
from kdnet.results.page import duration, flat, left_out, read_mapping, write_page
from kdnet.results.pictures import gain_charts, pictures
from kdnet.results.results import case_table, headline, space_tables
from kdnet.results.tables import ROLES, gains
from kdnet.runs.run_folder import RunFolder
from kdnet.training.checkpoint import ModelMetadata, read_metadata
from kdnet.training.history import read_history

# The strip compares from left to right: without help, with it, and where the help came from.
_SHOWN = ("baseline", "student", "teacher")


def write_run_page(folder: Path) -> Path:
    """Write report.html into a run folder."""
    run = RunFolder(folder)
    return write_page(run.root / "report.html", "run.html.j2", _content(run))


def _content(run: RunFolder) -> dict[str, Any]:
    """Everything that the template prints."""
    scores = read_scores(run.scores)
    models = {role: read_metadata(run.model(role)) for role in ROLES if run.model(role).is_file()}
    config, environment = read_mapping(run.config), read_mapping(run.environment)
    cases, summary = read_mapping(run.cases), run.read_summary()
    differences = gains(scores)
    seen = models["student"].modalities if "student" in models else ()
    return {
        "title": run.root.resolve().name,
        "phantom": any(m.phantom or m.description.phantom for m in models.values()),
        "data_set": next((m.description.name for m in models.values()), "unknown data set"),
        "citation": next((m.description.citation for m in models.values()), ""),
        "roles": [role for role in ROLES if any(score.role == role for score in scores)],
        "views": {role: ", ".join(model.modalities) for role, model in models.items()},
        "networks": {role: model.summary() for role, model in models.items()},
        "epochs": {role: model.epoch for role, model in models.items()},
        "crop": crop_in_words(next(iter(models.values()), None)),
        "cropped": any(model.crop is not None for model in models.values()),
        "headline": headline(differences),
        "tables": space_tables(scores, differences),
        "nominal": any(score.hd95_unit == "voxel" for score in scores),
        "charts": _learning_curves(run),
        "gain_charts": gain_charts(scores, student="student", baseline="baseline"),
        "compared": ("baseline", "student"),
        "remark": "",
        "figure": pictures(run.root / "slices.npz", seen, _SHOWN),
        "per_case": case_table(scores),
        "left_out": left_out(run.root),
        "config": config,
        "environment": flat(environment),
        "cases": {part: names for part, names in cases.items() if isinstance(names, list)},
        "held_out": len({score.case for score in scores}),
        "seconds": _seconds(summary),
        "memory": _memory(summary),
        "fold": config.get("fold"),
        "folds": config.get("folds"),
        "seed": environment.get("seed", config.get("seed")),
    }


def crop_in_words(model: ModelMetadata | None) -> str:
    """Say how the training grid comes about."""
    if model is None:
        return "a part that is not known: there is no model file"
    resampled = f" resampled to {' x '.join(map(str, model.grid))} voxels" if model.grid else ""
    seen = f", in {model.geometry}" if model.patch or model.slices else ""
    if model.crop is None:
        return f"the whole volume{resampled}{seen}"
    crop = " x ".join(map(str, model.crop))
    return f"the central {crop} voxels{resampled}{seen}"


def _learning_curves(run: RunFolder) -> list[Markup]:
    histories = {role: read_history(run.role(role) / "history.csv") for role in ROLES}
    charts = history_charts({role: rows for role, rows in histories.items() if rows})
    return [Markup(draw_chart(title, curves)) for title, curves in charts.items()]  # noqa: S704


def _seconds(summary: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Phase, its time, and its share of the longest phase in per cent."""
    seconds = {name: float(value) for name, value in summary.get("seconds", {}).items()}
    longest = max(seconds.values(), default=0.0) or 1.0
    lines = [(name, duration(v), round(100 * v / longest, 1)) for name, v in seconds.items()]
    if seconds:
        lines.append(("in all", duration(sum(seconds.values())), 0.0))
    return lines


def _memory(summary: dict[str, Any]) -> dict[str, str]:
    return {
        name.replace("_", " "): f"{float(value):,.0f} MiB"
        for name, value in summary.get("peak_mib", {}).items()
    }
