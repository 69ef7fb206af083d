"""What all units reached together: one file of scores, the tables in the terminal, the page."""

from pathlib import Path

import pandas as pd
from rich.console import Console

from kdnet.errors import UserError
from kdnet.evaluation.lesions import score_folder
from kdnet.evaluation.scoring import gather_scores, read_scores, scored_in, write_scores
from kdnet.results.page import write_report
from kdnet.results.stats import gains
from kdnet.results.stored import Results, read_folder
from kdnet.results.tables import (
    Table,
    gain_table,
    nothing_found,
    results_table,
    tables_beside_published,
)
from kdnet.runs.plan import Plan


def collect(plan: Plan) -> bool:
    """Put the scores of all finished units, of this and earlier starts, into one file."""
    for unit in plan.units():
        path = plan.folder(unit).scores
        missing = (
            sorted({*unit.fold.split.test} - {*read_scores(path)["case"]}) if path.is_file() else ()
        )
        if missing:
            raise UserError(
                f"{path} lacks {len(missing)} of the held-out subjects, such as {missing[0]}. "
                "Delete it and give the same command: the unit is scored again, not trained."
            )
    gather_scores(plan.root, "subsets.csv")
    return not gather_scores(plan.root).empty


def collect_lesions(plan: Plan) -> Path:
    """Score the single lesions of all label maps that were kept."""
    parts = [
        score_folder(
            plan.folder(unit).predictions,
            plan.data.named(unit.fold.split.test),
            plan.data.description,
            row=unit.row.name,
            fold=unit.fold.number,
            seed=unit.seed,
        )
        for unit in plan.units()
        if plan.folder(unit).scores.is_file()
    ]
    path = plan.root / "lesions.csv"
    write_scores(path, pd.concat(parts, ignore_index=True))
    return path


def show_results(plan: Plan, console: Console) -> None:
    """Collect the scores, show the main tables, write the page, and say what the units took."""
    if not collect(plan):
        console.print("No unit is done, so there are no results yet.")
        return
    results = read_folder(plan.root)
    if results.facts.kind != "study":
        for table in _main_tables(results):
            phantom = "PHANTOM: " * results.facts.phantom
            console.print(f"{phantom}{table.text()}", soft_wrap=True)
        for sentence in nothing_found(results.scores, results.label):
            console.print(sentence, soft_wrap=True)
    report = write_report(plan.root, plan.trusted)
    records = [plan.folder(unit).read_record() for unit in plan.units()]
    total = sum(sum(record.get("seconds", {}).values()) for record in records)
    for path in (plan.root / "tables.md", report):
        console.print(f"Written: {path}", soft_wrap=True)
    console.print(f"In all {total:.0f} s of training and scoring.")


def _main_tables(results: Results) -> list[Table]:
    scores, label = results.scores, results.label
    own = [results_table(scores, label), gain_table(gains(scored_in(scores)), label)]
    return [table for table in (*tables_beside_published(results), *own) if len(table.frame)]
