"""The folder of a cross-validation, as its page reads it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kdnet.data.description import Description
from kdnet.data.layouts import find_subjects
from kdnet.errors import UserError
from kdnet.evaluation.scoring import Score, read_scores
from kdnet.files import is_name
from kdnet.results.page import read_mapping
from kdnet.results.slices import save_slices

MARKER = "crossval.json"
_MOST_FOLDS = 10_000
_BASELINE = "baseline"
_STUDENTS = ("kdnet", "student")


@dataclass(frozen=True)
class CrossvalFolder:
    """Paths and facts of a cross-validation.

    Args:
        root: The folder that crossval.py filled.
        trusted: Networks that may be imported to say what its models cost; others are left out.
    """

    root: Path
    trusted: frozenset[str] = frozenset()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What crossval.json says."""
        facts = read_mapping(self.root / MARKER)
        missing = [key for key in ("rows", "folds", "seeds") if key not in facts]
        if missing:
            raise UserError(
                f"{self.root / MARKER}: expected the keys rows, folds and seeds, found no "
                f"{', '.join(missing)}. Run crossval.py again on this folder."
            )
        self._check(facts)
        return facts

    def _check(self, facts: dict[str, Any]) -> None:
        """Names of rows become folders, and the folds are gone through one by one."""
        wanted = {
            "rows": (is_name, "names of rows"),
            "seeds": (lambda seed: type(seed) is int, "numbers"),
        }
        for key, (fits, what) in wanted.items():
            if not isinstance(facts[key], list) or not all(map(fits, facts[key])):
                raise UserError(f"{self.root / MARKER}: {key} must be a list of {what}.")
        if type(facts["folds"]) is not int or not 0 <= facts["folds"] <= _MOST_FOLDS:
            raise UserError(f"{self.root / MARKER}: folds must be 0 to {_MOST_FOLDS}.")
        for key in ("labels", "grades"):
            if not isinstance(facts.get(key, {}), dict):
                raise UserError(f"{self.root / MARKER}: {key} must be keys and values.")

    @property
    def rows(self) -> list[str]:
        """Names of the networks, in the order of the tables."""
        return [str(row) for row in self.facts["rows"]]

    @property
    def seeds(self) -> list[int]:
        """Seeds of the trainings."""
        return [int(seed) for seed in self.facts["seeds"]]

    @property
    def folds(self) -> int:
        """Number of folds."""
        return int(self.facts["folds"])

    @property
    def student(self) -> str:
        """The row of interest: KD-Net's, else the first that is neither teacher nor baseline."""
        own = [row for row in self.rows if not row.startswith(("teacher", _BASELINE))]
        students = [row for row in own if row.startswith(_STUDENTS)]
        return next(iter((*students, *own, *self.rows)), "")

    @property
    def baseline(self) -> str:
        """The row that the student is compared with."""
        return self.baseline_of(self.student)

    def baseline_of(self, row: str) -> str:
        """Find what a row is compared with: a baseline of the same kind."""
        kind = next((kind for kind in self._kinds if row.endswith(kind)), "")
        baseline = _BASELINE + kind
        return baseline if baseline in self.rows else ""

    @property
    def _kinds(self) -> list[str]:
        """Endings of rows without skip connections, of a sweep, and of the user's own baselines."""
        own = [row.removeprefix(_BASELINE) for row in self.rows if row.startswith(_BASELINE)]
        swept = [f"-{name.lower()}" for name in self.modalities]
        return sorted({"_0skips", *swept, *own} - {""}, key=len, reverse=True)

    def label(self, row: str) -> str:
        """How tables call a row."""
        return str(self.facts.get("labels", {}).get(row) or row)

    @property
    def runs(self) -> list[Path]:
        """Folders of every fold, those of the first seed first."""
        names = [f"fold{fold}-seed{seed}" for seed in self.seeds for fold in range(self.folds)]
        return [self.root / name for name in names if (self.root / name).is_dir()]

    @property
    def slices(self) -> Path:
        """The slices that the page shows."""
        return self.root / "slices.npz"

    def scores(self) -> list[Score]:
        """Read the scores of all rows, folds and seeds."""
        return read_scores(self._scores)

    def subset_scores(self) -> list[Score]:
        """Read the scores of networks on every subset of modalities; empty if there are none."""
        path = self.root / "subsets.csv"
        return read_scores(path) if path.is_file() else []

    def cut_slices(self, scores: Sequence[Score]) -> str:
        """Cut the slices of the shown cases, unless that is done and no score is newer."""
        predictions, root = self._predictions(), self._images()
        if self.slices.is_file() and self.slices.stat().st_mtime >= self._scores.stat().st_mtime:
            return _coverage(scores, predictions)
        if not predictions:
            return "The label maps were not kept, so there is no figure."
        if root is None:
            return "The images are not where config.yaml names them, so there is no figure."
        description, subjects = find_subjects(root, self._description())
        known = {subject.name: subject for subject in subjects if subject.name in predictions}
        save_slices(
            self.slices,
            known,
            description,
            predictions,
            [score for score in scores if score.case in known],
            rows=self.shown,
            student=self.student,
            baseline=self.baseline,
            modality=next(iter(self.seen), None),
        )
        return _coverage(scores, known)

    @property
    def shown(self) -> list[str]:
        """Rows in the order of the pictures: without help, with it, the teacher, all others."""
        teachers = [row for row in self.rows if row.startswith("teacher")]
        order = dict.fromkeys((self.baseline, self.student, *teachers, *self.rows))
        return [row for row in order if row in self.rows]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that all rows share."""
        path = self.root / "config.yaml"
        config = read_mapping(path)
        for key, kind in {"data_root": str, "cache_dir": str, "student_modalities": list}.items():
            if not isinstance(config.get(key), kind | None):
                raise UserError(f"{path}: {key} must be a {kind.__name__}.")
        return config

    @property
    def seen(self) -> tuple[str, ...]:
        """Modalities of the student."""
        return tuple(map(str, self.config.get("student_modalities") or ()))

    @property
    def citation(self) -> str:
        """Whom to cite where results are shown."""
        return str(self._described.get("citation", ""))

    @property
    def modalities(self) -> list[str]:
        """Modalities of the data set."""
        return list(self._described.get("modalities", {}))

    @property
    def _scores(self) -> Path:
        return self.root / "scores.csv"

    @property
    def _described(self) -> dict[str, Any]:
        return read_mapping(self.root / "description.json")

    def _predictions(self) -> dict[str, Path]:
        """Case to the folder of its label maps, of the first seed that has them."""
        found: dict[str, Path] = {}
        for run in self.runs:
            folder = run / "predictions"
            for path in sorted(folder.glob("*/*_seg.nii.gz")):
                found.setdefault(path.name.removesuffix("_seg.nii.gz"), folder)
        return found

    def _images(self) -> Path | None:
        """Root of the data set: the one that is named, else that of the phantoms."""
        named = self.config.get("data_root")
        if named is not None:
            return Path(named) if Path(named).is_dir() else None
        cache = Path(self.config.get("cache_dir") or self.root / "cache")
        return next((path.parent for path in sorted(cache.glob("*/phantom.json"))), None)

    def _description(self) -> Description | None:
        return Description.from_dict(self._described) if self._described else None


def _coverage(scores: Sequence[Score], found: Container[str]) -> str:
    """Say so if some cases could not be chosen for the figure."""
    cases = {score.case for score in scores}
    count = sum(case in found for case in cases)
    if count == len(cases):
        return ""
    return f"Chosen among the {count} of {len(cases)} cases whose label maps were found."
