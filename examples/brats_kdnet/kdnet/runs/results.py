"""What all units reached together: one file of scores, the tables, the report."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from kdnet.errors import UserError
from kdnet.evaluation.lesions import LesionScore, score_folder, write_lesions
from kdnet.evaluation.scoring import Score, read_scores, write_scores
from kdnet.results.comparison import other_tables, paper_tables, subset_tables
from kdnet.results.costs import costs
from kdnet.results.crossval_folder import CrossvalFolder
from kdnet.results.paper_tables import paired_table
from kdnet.results.results_table import results_table
from kdnet.results.tables import render_tables
from kdnet.results.text_table import TextTable
from kdnet.runs.folder import UnitFolder
from kdnet.runs.plan import Fold, Plan
from kdnet.writing import write_text
from report import write_report


def finished(plan: Plan) -> list[tuple[UnitFolder, str, Fold]]:
    """Return the folders of all units that are done, whichever start trained them."""
    summary = plan.files.read_plan()
    found = [
        (plan.files.unit(f"{row['name']}/fold{fold.number}-seed{seed}"), str(row["name"]), fold)
        for row in summary["rows"]
        for seed in summary["seeds"]
        for fold in plan.folds
    ]
    return [one for one in found if one[0].scores.is_file()]


def collect(plan: Plan) -> list[Score]:
    """Put the scores of all finished units, of this and earlier starts, into one file."""
    units = finished(plan)
    scores = [score for folder, _, fold in units for score in complete_scores(folder, fold)]
    write_scores(plan.root / "scores.csv", scores)
    subsets = [s for folder, *_ in units if folder.subsets.is_file() for s in read_scores(folder.subsets)]
    if subsets:
        write_scores(plan.root / "subsets.csv", subsets)
    return scores


def complete_scores(folder: UnitFolder, fold: Fold) -> list[Score]:
    """Read the scores of a unit."""
    scores = read_scores(folder.scores)
    missing = sorted({*fold.split.test} - {score.case for score in scores})
    if missing:
        raise UserError(
            f"{folder.scores} lacks {len(missing)} of the held-out subjects, such as "
            f"{missing[0]}. Delete it and give the same command: the unit is scored again, not "
            "trained."
        )
    return scores


def collect_lesions(plan: Plan) -> Path:
    """Score the single lesions of all label maps that were kept."""
    lesions: list[LesionScore] = []
    for folder, row, fold in finished(plan):
        first = read_scores(folder.scores)[0]
        lesions += score_folder(
            folder.predictions,
            plan.data.named(fold.split.test),
            plan.data.description,
            role=row,
            modalities=first.modalities,
            fold=first.fold,
            seed=first.seed,
        )
    path = plan.root / "lesions.csv"
    write_lesions(path, lesions)
    return path


def show_run(plan: Plan, console: Console) -> None:
    """Print the table of one fold, write the report, and say what the units took."""
    console.print(render_tables(collect(plan), phantom=plan.data.description.phantom))
    report = write_report(plan.root, plan.trusted)
    total = 0.0
    for unit in plan.units():
        record = plan.folder(unit).read_record()
        seconds, peak = record.get("seconds", {}), record.get("peak_mib", {})
        total += sum(seconds.values())
        parts = [f"{name} {value:.0f} s" for name, value in seconds.items()]
        parts += [f"peak {name} {value:.0f} MiB" for name, value in peak.items()]
        counts = record.get("teacher_cache")
        if counts:
            asked = counts["hits"] + counts["misses"]
            parts.append(f"teacher cache served {counts['hits']} of {asked} samples")
        console.print(f"{unit.row.name}: {', '.join(parts)}", highlight=False, soft_wrap=True)
    console.print(f"In all {total:.0f} s. Report: {report}", highlight=False, soft_wrap=True)


def show_results(plan: Plan, console: Console) -> None:
    """Collect the scores, show the main tables, and write all of them and the report."""
    scores = collect(plan)
    if not scores:
        console.print("No unit is done, so there are no results yet.", highlight=False)
        return
    folder = CrossvalFolder(plan.root, plan.trusted)
    papers = paper_tables(scores, folder.facts["protocol"])
    gained = list(gain_tables(folder, scores))
    # The paper's own numbers were apparently measured at the grid, whose tables come first.
    for table in (*(papers[0] if papers else ()), *gained):
        console.print(table.rich())
    written = [table for part in papers for table in part]
    written += [*gained, *further_tables(folder, scores)]
    heading = f"# {folder.facts['protocol']}\n\n"
    text = heading + "\n".join(table.markdown() for table in written)
    write_text(plan.root / "tables.md", text)
    for path in (plan.root / "tables.md", write_report(plan.root, plan.trusted)):
        console.print(f"Written: {path}", highlight=False, soft_wrap=True)


def gain_tables(folder: CrossvalFolder, scores: Sequence[Score]) -> Iterator[TextTable]:
    """Every row against the baseline of its kind, in native Dice."""
    scored = list(dict.fromkeys(score.role for score in scores))
    kinds: dict[str, list[str]] = {}
    for row in scored:
        if folder.baseline_of(row) not in {row, ""}:
            kinds.setdefault(folder.baseline_of(row), []).append(row)
    for baseline, rows in kinds.items():
        if baseline in scored:
            yield paired_table(scores, baseline, roles=rows).text()


def further_tables(folder: CrossvalFolder, scores: Sequence[Score]) -> Iterator[TextTable]:
    """All results in both spaces, subsets of modalities, and costs."""
    labels = {row: folder.label(row) for row in folder.rows}
    yield from other_tables(scores, folder.seen)
    yield results_table(scores, space="native", labels=labels)
    cleaned = results_table(scores, space="native", postprocessing="on", labels=labels)
    if cleaned.rows:
        yield cleaned
    yield results_table(scores, space="grid", labels=labels)
    subsets = folder.subset_scores()
    if subsets:
        yield from subset_tables(subsets, folder.modalities)
    yield costs(folder)
