"""What all units reached together: one file of scores, the tables, the report."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from kdnet.runs.folder import read_summary
from kdnet.runs.plan import Plan
from kdnet.data.description import Description
from kdnet.data.layouts import Subject
from kdnet.data.splits import Split
from kdnet.errors import UserError
from kdnet.evaluation.lesions import LesionScore, score_folder, write_lesions
from kdnet.results.paper_tables import paired_table
from kdnet.results.results_table import results_table
from kdnet.evaluation.scoring import Score, read_scores, write_scores
from kdnet.results.text_table import TextTable
from report import write_report
from kdnet.results.comparison import other_tables, paper_tables, subset_tables
from kdnet.results.costs import costs
from kdnet.results.crossval_folder import CrossvalFolder
from kdnet.runs.run_folder import RunFolder
from kdnet.files import write_text


def collect(plan: Plan) -> list[Score]:
    """Put the scores of all finished units, of this and earlier starts, into one file."""
    runs = finished(plan)
    scores = [score for run in runs for score in complete_scores(run)]
    subsets = [score for run in runs if run.subsets.is_file() for score in read_scores(run.subsets)]
    write_scores(plan.root / "scores.csv", scores)
    if subsets:
        write_scores(plan.root / "subsets.csv", subsets)
    return scores


def complete_scores(run: RunFolder) -> list[Score]:
    """Read the scores of a unit."""
    scores = read_scores(run.part_scores)
    missing = sorted({*Split.read(run.cases).test} - {score.case for score in scores})
    if missing:
        raise UserError(
            f"{run.part_scores} lacks {len(missing)} of the held-out subjects, such as "
            f"{missing[0]}. Delete it and give the same command: the unit is scored again, not "
            "trained."
        )
    return scores


def collect_lesions(plan: Plan, subjects: Sequence[Subject], description: Description) -> Path:
    """Score the single lesions of all label maps that were kept."""
    files = {subject.name: subject for subject in subjects}
    lesions: list[LesionScore] = []
    for run in finished(plan):
        first = read_scores(run.part_scores)[0]
        lesions += score_folder(
            run.predictions(run.part),
            [files[name] for name in Split.read(run.cases).test],
            description,
            role=run.part,
            modalities=first.modalities,
            fold=first.fold,
            seed=first.seed,
        )
    path = plan.root / "lesions.csv"
    write_lesions(path, lesions)
    return path


def finished(plan: Plan) -> list[RunFolder]:
    """Return the folders of all units that are done, whichever start trained them."""
    summary = read_summary(plan.root)
    runs = [
        RunFolder(plan.root / f"fold{fold.number}-seed{seed}", part=row)
        for row in summary["rows"]
        for seed in summary["seeds"]
        for fold in plan.folds
    ]
    return [run for run in runs if run.part_scores.is_file()]


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
    console.print(f"Written: {plan.root / 'tables.md'}", highlight=False, soft_wrap=True)
    console.print(
        f"Written: {write_report(plan.root, plan.trusted)}", highlight=False, soft_wrap=True
    )


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
