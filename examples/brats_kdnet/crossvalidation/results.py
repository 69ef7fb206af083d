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
        The scores, with fold and seed, in the order of rows.
    """
    summary = read_summary(plan.root)
    scores: list[Score] = []
    for row in summary["rows"]:
        for seed in summary["seeds"]:
            for fold in plan.folds:
                run = RunFolder(plan.root / f"fold{fold.number}-seed{seed}", part=row)
                if run.part_scores.is_file():
                    scores += read_scores(run.part_scores)
    write_scores(plan.root / "scores.csv", scores)
    return scores
