"""Which options of a recipe gain most, on a split of the training subjects.

The training subjects of a fold are split once more; trials train on one part and are compared on
the other. The test subjects of that fold are never read. Those of the study's other folds are among
its training subjects, so that a recipe that was chosen on one fold meets new subjects there alone.
"""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
from rich.console import Console

from kdnet.configuration.config import Config
from kdnet.data.splits import Split, split_subjects
from kdnet.errors import UserError
from kdnet.evaluation.scoring import read_scores
from kdnet.files import write_text
from kdnet.recipes.rows import Row
from kdnet.runs.folder import open_plan
from kdnet.runs.folds import Fold, save_folds
from kdnet.runs.plan import CrossvalOptions, Plan, Unit
from kdnet.runs.run_folder import RunFolder
from kdnet.runs.soundness import usable
from kdnet.runs.subjects import read_subjects
from kdnet.runs.unit import run_unit
from kdnet.studies.design import BASELINE, TEACHER, Design, Search, plain_row
from kdnet.studies.trials import SEARCH, Trial, Tried, read_search, search_folder, write_trials

_INNER_FOLDS = 4


def search(design: Design, wanted: str, config: Config, *, trials: int, console: Console) -> Tried:
    """Try options until so many trials have been made, those of earlier starts counted."""
    space = find_search(design, wanted)
    root = search_folder(RunFolder(config.run.out or Path("runs/study")).root, wanted)
    config = replace(config, run=replace(config.run, out=root / "units"))
    folds = inner_folds(config, space, console)
    root.mkdir(parents=True, exist_ok=True)
    save_folds(root / "inner-folds.json", folds)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_unchanged_search(root / SEARCH, space)
    memory = optuna.create_study(
        storage=f"sqlite:///{root / 'trials.sqlite'}",
        study_name=wanted,
        direction="maximize",
        load_if_exists=True,
    )
    trials = min(trials, math.prod(len(values) for values in space.space.values()))
    while (number := len(finished(memory))) < trials:
        # A start of its own for every trial, so that one that goes on is like one that never ended.
        memory.sampler = optuna.samplers.TPESampler(
            seed=space.seed + number, n_startup_trials=space.random_trials
        )
        trial = ask_new(memory, space)
        options = {name: json.loads(value) for name, value in trial.params.items()}
        chosen = space.options | options
        console.print(f"Trial {number + 1} of {trials}: {chosen}", highlight=False)
        dice, gain = try_options(config, space, trial.number, chosen, console)
        if not math.isfinite(gain):
            raise UserError(f"Trial {trial.number}: its gain is {gain}; no Dice can be told.")
        trial.set_user_attr("dice", dice)
        memory.tell(trial, gain)
        write_trials(root, map(trial_of, finished(memory)))
        console.print(f"  Dice {dice:.3f}, gain {100 * gain:+.1f} points", highlight=False)
    write_trials(root, map(trial_of, finished(memory)))
    return read_search(root)


def check_unchanged_search(path: Path, space: Search) -> None:
    """Refuse to go on with other values than a search began with."""
    now = json.dumps(asdict(space), indent=2) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != now:
        raise UserError(
            f"{path}: the search has changed since it began. Restore it in the study's file, give "
            "it another name, or remove its folder."
        )
    write_text(path, now)


def ask_new(memory: optuna.Study, space: Search) -> optuna.Trial:
    """Ask for a choice that has not been tried."""
    tried = [trial.params for trial in finished(memory)]
    while True:
        trial = memory.ask()
        for name, values in space.encoded:
            trial.suggest_categorical(name, values)
        if trial.params not in tried:
            return trial
        memory.tell(trial, state=optuna.trial.TrialState.PRUNED)
        left = [
            choice
            for values in itertools.product(*(texts for _, texts in space.encoded))
            if (choice := dict(zip(space.space, values, strict=True))) not in tried
        ]
        memory.enqueue_trial(left[trial.number % len(left)])


def find_search(design: Design, wanted: str) -> Search:
    """Return a search by its name."""
    if wanted not in design.searches:
        known = ", ".join(design.searches) or "none"
        raise UserError(f"--search {wanted}: the study has no such search; there are: {known}.")
    return design.searches[wanted]


def inner_folds(config: Config, space: Search, console: Console) -> list[Fold]:
    """Split the training subjects of the search's folds once more."""
    beyond = [fold for fold in space.folds if fold >= config.data.folds]
    if beyond:
        raise UserError(
            f"The search is on fold {beyond[0]}, but the study has {config.data.folds} folds, "
            "counted from 0. Change folds of the search in the study's file."
        )
    run = RunFolder(config.run.out or Path())
    description, subjects = read_subjects(config, run, console)
    subjects, _ = usable(config, run, description, subjects, console)
    data, seed = config.data, config.training.seed
    folds = []
    for number, outer in enumerate(space.folds):
        split = split_subjects(
            subjects, folds=data.folds, fold=outer, validation_fraction=0, seed=seed
        )
        rest = [subject for subject in subjects if subject.name in {*split.train}]
        inner = split_subjects(
            rest,
            folds=_INNER_FOLDS,
            fold=0,
            validation_fraction=data.validation_fraction,
            seed=seed,
        )
        folds.append(Fold(number, number, Split(inner.train, inner.validation, inner.test)))
    return folds


def try_options(
    config: Config, space: Search, number: int, options: Mapping[str, Any], console: Console
) -> tuple[float, float]:
    """Train one choice of options and its baseline, and compare them."""
    teacher, baseline = (plain_row(name, space.labelled) for name in (TEACHER, BASELINE))
    row = replace(
        plain_row(TEACHER, space.labelled),
        name=f"trial-{number}",
        recipe="distilled",
        role="student",
        teacher=teacher.name,
        label=f"trial {number}",
        options=dict(options) | ({} if space.labelled == "all" else {"labelled": space.labelled}),
    )
    plan = open_plan(
        config,
        CrossvalOptions(folds_file=config.run.out and config.run.out.parent / "inner-folds.json"),
        console,
        rows=(teacher, baseline, row),
        own_seeds=dict.fromkeys((baseline.name, row.name), space.seeds)
        | {teacher.name: space.seeds[:1]},
    )
    for unit in plan.units():
        run_unit(plan, unit, console)
    mine, theirs = (dice_of(plan, name) for name in (row, baseline))
    gains = [mine[place] - theirs[place] for place in mine]
    return sum(mine.values()) / len(mine), sum(gains) / len(gains)


def dice_of(plan: Plan, row: Row) -> dict[tuple[str, str, int, int], float]:
    """Return the Dice of a row at the training grid, by case, region, fold and seed."""
    units: list[Unit] = [unit for unit in plan.units() if unit.row.name == row.name]
    return {
        (score.case, score.region, unit.fold.number, unit.seed): score.dice
        for unit in units
        for score in read_scores(plan.folder(unit).part_scores)
        if score.space == "grid" and score.postprocessing == "off"
    }


def finished(memory: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that have a result."""
    return memory.get_trials(states=(optuna.trial.TrialState.COMPLETE,))


def trial_of(frozen: optuna.trial.FrozenTrial) -> Trial:
    """Read a finished trial."""
    options = {name: json.loads(value) for name, value in frozen.params.items()}
    return Trial(frozen.number, options, frozen.user_attrs["dice"], float(frozen.values[0]))
