"""What the trials of a search reached, stored beside the rows of a study and shown as a table."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdnet.errors import UserError
from kdnet.files import UnreadableError, read_json, write_text
from kdnet.results.text_table import TextTable

SEARCH, TRIALS = "search.json", "trials.json"
_PREFIX = "search-"


@dataclass(frozen=True)
class Trial:
    """One choice of options and what it reached.

    Attributes:
        number: From 0.
        options: What was chosen.
        dice: Mean Dice on the inner test subjects, at the training grid.
        gain: Mean paired difference to the baseline of the same subjects, seed and steps.
    """

    number: int
    options: dict[str, Any]
    dice: float
    gain: float


@dataclass(frozen=True)
class Tried:
    """A search and its trials, as they are stored.

    Attributes:
        name: Of the search.
        settings: What all trials share: labelled, seeds, folds, options.
        trials: In any order.
    """

    name: str
    settings: Mapping[str, Any]
    trials: list[Trial]


def search_folder(root: Path, name: str) -> Path:
    """Return the folder of a search in that of its study."""
    return root / f"{_PREFIX}{name}"


def write_trials(folder: Path, trials: Iterable[Trial]) -> None:
    """Write what all trials reached, the best first."""
    content = [vars(trial) for trial in best_first(trials)]
    write_text(folder / TRIALS, json.dumps(content, indent=2) + "\n")


def best_first(trials: Iterable[Trial]) -> list[Trial]:
    """Sort trials by their gain, equal ones by their number."""
    return sorted(trials, key=lambda trial: (-trial.gain, trial.number))


def read_search(folder: Path) -> Tried:
    """Read a search and its trials."""
    try:
        settings = read_json(folder / SEARCH)
        trials = [Trial(**trial) for trial in read_json(folder / TRIALS)]
        # Damage that shows when lines are made is found here, where the file can be named.
        tried = Tried(folder.name.removeprefix(_PREFIX), dict(settings), best_first(trials))
        trials_table(tried)
        return tried
    except (UnreadableError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder}: {SEARCH} and {TRIALS} are not those of a search ({error}). Fetch them "
            "again, or remove the folder."
        ) from error


def read_searches(root: Path) -> list[Tried]:
    """Read the searches that are stored in the folder of a study."""
    files = sorted(root.glob(f"{_PREFIX}*/{TRIALS}"))
    return [read_search(path.parent) for path in files]


def trials_table(tried: Tried) -> TextTable:
    """Show what all trials of a search reached, the best first."""
    settings = tried.settings
    shared = said(settings.get("options", {}))
    seeds = ", ".join(map(str, settings.get("seeds", ())))
    note = (
        f"Labelled subjects: {settings.get('labelled')}; seeds {seeds}; training subjects of fold "
        f"{', '.join(map(str, settings.get('folds', ())))}, split once more. Gain: in points, over "
        f"the baseline of the same subjects, seed and steps. All trials: {shared or 'no options'}."
    )
    return TextTable(
        title=f"Trials of the search {tried.name}, training grid",
        columns=["options", "trial", "Dice", "gain"],
        rows=[_line(trial) for trial in best_first(tried.trials)],
        notes=[note],
    )


def said(options: Mapping[str, Any]) -> str:
    """Say options in one line."""
    return ", ".join(f"{name} {'none' if v is None else v}" for name, v in options.items())


def _line(trial: Trial) -> list[str]:
    gain = f"{100 * trial.gain:+.1f}".replace("-", "\N{MINUS SIGN}")
    return [said(trial.options), str(trial.number), f"{trial.dice:.3f}", gain]
