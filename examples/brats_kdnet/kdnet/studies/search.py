"""Which options of a recipe gain most, on a split of the training subjects.

The training subjects of a fold are split once more; trials train on one part and are compared on
the other. The test subjects of that fold are never read. Those of the study's other folds are among
its training subjects, so that a recipe that was chosen on one fold meets new subjects there alone.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
from rich.console import Console

from kdnet.config import Config
from kdnet.data.splits import split_subjects
from kdnet.errors import UserError
from kdnet.evaluation.scoring import gather_scores, scored_in
from kdnet.files import UnreadableError, read_json, write_text
from kdnet.rows import Row
from kdnet.runs.plan import Fold, Plan, make_plan
from kdnet.runs.preparation import prepare, rehearse_rows
from kdnet.runs.subjects import DataSet, find_data
from kdnet.runs.unit import run_unit
from kdnet.studies.design import BASELINE, TEACHER, Design, Search, count_of, plain_row

_INNER_FOLDS = 4
_RANDOM_TRIALS = 6  # before those that build on earlier ones


def search(design: Design, wanted: str, config: Config, *, trials: int, console: Console) -> Path:
    """Try options until so many trials have been made, those of earlier starts counted."""
    if wanted not in design.searches:
        known = ", ".join(design.searches) or "none"
        raise UserError(f"--search {wanted}: the study has no such search; there are: {known}.")
    space = design.searches[wanted]
    root = (config.run.out or Path("runs/study")) / f"search-{wanted}"
    config = replace(config, run=replace(config.run, out=root / "run"))
    data = find_data(config, console)
    folds = inner_folds(config, space, data)
    root.mkdir(parents=True, exist_ok=True)
    check_unchanged_search(root / "search.json", space)
    done = read_trials(root / "trials.json")
    trials = min(trials, math.prod(len(values) for values in space.space.values()))
    while (number := len(done)) < trials:
        options = ask_new(done, space)
        console.print(f"Trial {number + 1} of {trials}: {space.options | options}")
        rows, seeds = trial_rows(space, number, space.options | options)
        plan = make_plan("study", "Search", config, rows, folds, data=data, seeds=seeds)
        dice, gain = try_options(plan, console)
        if not math.isfinite(gain):
            raise UserError(f"Trial {number}: its gain is {gain}; no Dice can be told.")
        # Mean Dice on the inner test subjects, and mean paired difference to their baseline.
        done.append({"number": number, "options": options, "dice": dice, "gain": gain})
        write_text(root / "trials.json", json.dumps(done, indent=2) + "\n")
        console.print(f"  Dice {dice:.3f}, gain {100 * gain:+.1f} points")
    return root


def read_trials(path: Path) -> list[dict[str, Any]]:
    """Return the trials of earlier starts; one that a kill cut short is made again and goes on."""
    try:
        found = read_json(path) if path.is_file() else []
        return [{**trial, "gain": float(trial["gain"])} for trial in found]
    except (UnreadableError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}). Restore it, or remove it.") from error


def check_unchanged_search(path: Path, space: Search) -> None:
    """Refuse to go on with other values than a search began with."""
    now = json.dumps(asdict(space), indent=2) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != now:
        raise UserError(
            f"{path}: the search has changed since it began. Restore it in the study's file, give "
            "it another name, or remove its folder."
        )
    write_text(path, now)


def ask_new(done: Sequence[Mapping[str, Any]], space: Search) -> dict[str, Any]:
    """Choose options that have not been tried, by what the trials so far have gained."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # A sampler of its own for every trial, so that one that goes on is like one that never ended.
    sampler = optuna.samplers.TPESampler(seed=len(done), n_startup_trials=_RANDOM_TRIALS)
    memory = optuna.create_study(direction="maximize", sampler=sampler)
    # As texts, in which lists can be told apart.
    choices: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.CategoricalDistribution([json.dumps(v) for v in values])
        for name, values in space.space.items()
    }
    for trial in done:
        params = {name: json.dumps(value) for name, value in trial["options"].items()}
        memory.add_trial(
            optuna.trial.create_trial(params=params, distributions=choices, value=trial["gain"])
        )
    tried = [trial["options"] for trial in done]
    asked = {n: json.loads(text) for n, text in memory.ask(choices).params.items()}
    if asked not in tried:
        return asked
    every = (
        dict(zip(space.space, one, strict=True)) for one in itertools.product(*space.space.values())
    )
    left = [choice for choice in every if choice not in tried]
    return left[len(done) % len(left)]


def inner_folds(config: Config, space: Search, found: DataSet) -> list[Fold]:
    """Split the training subjects of the search's folds once more."""
    data, seed = config.data, config.training.seed
    folds = []
    for number, fold in enumerate(space.folds):
        outer = split_subjects(
            found.foldable, folds=data.folds, fold=fold, validation_fraction=0, seed=seed
        )
        validation, inner = data.validation_fraction, found.named(outer.train)
        split = split_subjects(
            inner, folds=_INNER_FOLDS, fold=0, validation_fraction=validation, seed=seed
        )
        folds.append(Fold(number, number, split))
    return folds


def trial_rows(
    space: Search, number: int, options: Mapping[str, Any]
) -> tuple[tuple[Row, Row, Row], dict[str, tuple[int, ...]]]:
    """Return the teacher, the baseline and a student with some options, and the seeds of each."""
    teacher, baseline = (plain_row(name, space.labelled) for name in (TEACHER, BASELINE))
    row = Row(
        name=f"trial-{number}",
        recipe="distilled",
        teacher=teacher.name,
        against=baseline.name,
        labelled=count_of(space.labelled),
        label=f"trial {number}",
        kind="trial",
        options=dict(options),
    )
    seeds = dict.fromkeys((baseline.name, row.name), space.seeds)
    return (teacher, baseline, row), seeds | {teacher.name: space.seeds[:1]}


def try_options(plan: Plan, console: Console) -> tuple[float, float]:
    """Train one choice of options and its baseline, and compare them."""
    plan = prepare(rehearse_rows(plan, plan.units(), console), plan.units(), console)
    for unit in plan.units():
        run_unit(plan, unit, console)
    scores = scored_in(gather_scores(plan.root), "grid")
    (gains_of,) = [row for row in plan.rows if row.against]
    places = ["case", "region", "fold", "seed"]
    dice = scores.pivot_table(index=places, columns="row", values="dice")
    own = dice[gains_of.name].dropna()
    return float(own.mean()), float((own - dice[str(gains_of.against)]).mean())
