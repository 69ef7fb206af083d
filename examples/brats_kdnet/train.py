"""KD-Net from data to table: teacher, baseline, student, and what the student gained.

    python examples/brats_kdnet/train.py                        phantoms, a few minutes
    python examples/brats_kdnet/train.py --data-root BraTS2021  real subjects

Source: Hu, Maillard et al. 2020, "Knowledge distillation from multi-modal to mono-modal
segmentation networks", arXiv:2106.09564.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from torch import nn

from kdnet.config import Config, parse_config
from kdnet.data.samples import samples_per_subject
from kdnet.data.splits import Split
from kdnet.evaluation.scoring import Score, read_scores, write_scores
from kdnet.models.trust import check_trusted
from kdnet.recipes.advice import explain, judge
from kdnet.results.slices import save_slices
from kdnet.results.tables import render_tables
from kdnet.rows import Row, with_part_teachers
from kdnet.runs.command import exit_status
from kdnet.runs.experiment import Experiment
from kdnet.runs.held_out import score_network
from kdnet.runs.networks import describe_network
from kdnet.runs.opening import open_experiment
from kdnet.runs.splits import find_split
from kdnet.runs.subjects import find_description
from kdnet.runs.teaching import check_unseen, rehearse, teach
from kdnet.training.checkpoint import check_compatible, read_metadata
from kdnet.training.history import read_history
from report import write_report

TEACHER = Row("teacher", role="teacher")
BASELINE = Row("baseline")
STUDENT = Row("student", recipe="distilled", teacher="teacher")


def distil(config: Config, console: Console) -> None:
    """Carry out the experiment of the paper on one fold."""
    config = with_equal_steps(config, find_split(config))
    rows = with_part_teachers((TEACHER, BASELINE, STUDENT), config)
    check_parts(rows, config)
    rehearse_all(config, rows[-1])
    with open_experiment(config, console) as experiment:
        # 2 KD-Net: first the teacher, with every modality and the reference segmentation alone.
        # 3.3 The baseline sees what the student sees, and learns like the teacher.
        # 2.3 The student learns from the frozen teacher's predictions and bottleneck as well.
        if config.objective.recipe == "auto":
            split = experiment.split
            known = explain(config.objective, len(split.train), len(split.unlabelled))
            experiment.console.print(known, highlight=False, soft_wrap=True)
        networks: dict[str, nn.Module] = {}
        for row in rows:
            if row.recipe == STUDENT.recipe and config.objective.recipe == "auto":
                show_lead(experiment)
            teachers = [networks[name] for name in row.teachers]
            networks[row.name] = teach(experiment.of_row(row, console), row, *teachers)

        if experiment.fabric.is_global_zero:
            scores = score(experiment)
            show(experiment, scores)


def with_equal_steps(config: Config, split: Split) -> Config:
    """Make all trainings as long as that of the student, which alone sees unlabelled subjects."""
    if not split.unlabelled or config.training.samples_per_epoch:
        return config
    grid = describe_network("student", config, find_description(config)).grid
    count = (len(split.train) + len(split.unlabelled)) * samples_per_subject(config.data, grid)
    return replace(config, training=replace(config.training, samples_per_epoch=count))


def check_parts(rows: Sequence[Row], config: Config) -> None:
    """Refuse more parts than there are labelled subjects before anything is trained."""
    for row in rows:
        if "leave_out" in row.options:
            find_split(row.configure(config))


def rehearse_all(config: Config, student: Row) -> None:
    """Put teacher and student together once, before anything is read, written or trained."""
    teacher = describe_network("teacher", config, find_description(config))
    if config.network.teacher_model is not None:
        path = config.network.teacher_model
        found = read_metadata(path)
        trusted = config.network.vouched(own=False)
        check_trusted(str(path), found.backbone, found.backbone_arguments, trusted)
        check_compatible(path, found, teacher)
        # Whom a fold holds out is known only when it is known who is left out; asked again then.
        if not config.data.skip_invalid:
            check_unseen(path, found, find_split(config))
        teacher = found
    rehearse(config, student, teacher)


def score(experiment: Experiment) -> list[Score]:
    """Score the three networks on the held-out subjects, or read their scores if that is done."""
    run = experiment.run
    if run.scores.is_file():
        return read_scores(run.scores)
    scores: list[Score] = []
    with experiment.watch.phase("evaluation"):
        for row in (TEACHER, BASELINE, STUDENT):
            scores += score_network(experiment, row.name)
        if experiment.config.run.predictions:
            save_slices(
                run.root / "slices.npz",
                experiment.subjects,
                experiment.description,
                run.root / "predictions",
                scores,
                modality=experiment.view("student")[0],
            )
    write_scores(run.scores, scores)
    return scores


def show_lead(experiment: Experiment) -> None:
    """Say what the teacher's lead in validation promises; nothing where nothing was validated."""
    histories = [
        read_history(experiment.run.role(row.name) / "history.csv") for row in (TEACHER, BASELINE)
    ]
    reached = [
        max(epoch["validation_dice"] for epoch in history)
        for history in histories
        if history and "validation_dice" in history[-1]
    ]
    if len(reached) == len(histories):
        experiment.console.print(judge(*reached), highlight=False, soft_wrap=True)


def show(experiment: Experiment, scores: Sequence[Score]) -> None:
    """Print the table, write the report, and say what the run took."""
    console = experiment.console
    console.print(render_tables(scores, phantom=experiment.description.phantom))
    experiment.write_summary()
    with experiment.watch.phase("report"):
        report = write_report(experiment.run.root)
    summary = experiment.write_summary()
    phases = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())
    counts = summary.get("teacher_cache")
    served = [render_cache(counts, experiment.fabric.world_size)] if counts else []
    peaks = ", ".join(f"{name} {value:.0f} MiB" for name, value in summary["peak_mib"].items())
    for line in (
        f"Time: {phases}; in all {summary['total_seconds']:.0f} s",
        *served,
        f"Peak memory: {peaks}",
        f"Report: {report}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def render_cache(counts: dict[str, int], processes: int) -> str:
    """Say how often the teacher ran and how often it was not asked."""
    asked = counts["hits"] + counts["misses"]
    return (
        f"Teacher cache: {counts['hits']} of {asked} samples served, the teacher ran for "
        f"{counts['misses']}; {counts['bytes'] / 2**20:.0f} MiB"
        + f"; {counts.get('skipped')} had no room" * bool(counts.get("skipped"))
        + (" (of the first process)" if processes > 1 else "")
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run."""
    # Names of cases and folders are shown as they are, brackets and all.
    return exit_status(lambda: distil(parse_config(arguments), Console(markup=False)))


if __name__ == "__main__":
    sys.exit(main())
