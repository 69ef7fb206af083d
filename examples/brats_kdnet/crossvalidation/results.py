"""What all units reached together: one file of scores, the paper's tables, the report."""

from crossvalidation.folder import read_summary
from crossvalidation.plan import Plan
from evaluation.scoring import Score, read_scores, write_scores
from run_folder import RunFolder


def collect(plan: Plan) -> list[Score]:
    """Put the scores of all finished units, of this and earlier starts, into one file.

    Args:
        plan: Knows the folder.

    Returns:
        The scores, with fold and seed, in the order of rows; those of all modality subsets, where
        there are any, are written beside them.
    """
    runs = finished(plan)
    scores = [score for run in runs for score in read_scores(run.part_scores)]
    subsets = [score for run in runs if run.subsets.is_file() for score in read_scores(run.subsets)]
    write_scores(plan.root / "scores.csv", scores)
    if subsets:
        write_scores(plan.root / "subsets.csv", subsets)
    return scores


def finished(plan: Plan) -> list[RunFolder]:
    """Return the folders of all units that are done, whichever start trained them.

    Args:
        plan: Knows the folder.
    """
    summary = read_summary(plan.root)
    runs = [
        RunFolder(plan.root / f"fold{fold.number}-seed{seed}", part=row)
        for row in summary["rows"]
        for seed in summary["seeds"]
        for fold in plan.folds
    ]
    return [run for run in runs if run.part_scores.is_file()]
