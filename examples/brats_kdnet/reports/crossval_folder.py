"""The folder of a cross-validation, as its page reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.layouts import find_subjects
from data.description import Description, load_description
from errors import UserError
from evaluation.scoring import Score, read_scores
from evaluation.slices import save_slices
from reports.page import read_mapping

MARKER = "crossval.json"
_BASELINE = "baseline"
_STUDENTS = ("kdnet", "student")


@dataclass(frozen=True)
class CrossvalFolder:
    """Paths and facts of a cross-validation.

    Args:
        root: The folder that crossval.py filled.
    """

    root: Path

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
        return facts

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
    def baseline(self) -> str:
        """The row that the others are compared with."""
        return _BASELINE

    @property
    def student(self) -> str:
        """The row of interest: KD-Net's, else the first that is neither teacher nor baseline."""
        others = [row for row in self.rows if row.partition("_")[0] not in {"teacher", _BASELINE}]
        return next((row for row in (*_STUDENTS, *others) if row in self.rows), "student")

    @property
    def runs(self) -> list[Path]:
        """Run folders of every fold, those of the first seed first."""
        names = [f"fold{fold}-seed{seed}" for seed in self.seeds for fold in range(self.folds)]
        return [self.root / name for name in names if (self.root / name).is_dir()]

    @property
    def slices(self) -> Path:
        """The slices that the page shows."""
        return self.root / "slices.npz"

    def scores(self, name: str = "scores.csv") -> list[Score]:
        """Read the scores of all rows, folds and seeds."""
        return read_scores(self.root / name)

    def cut_slices(self, scores: Sequence[Score]) -> str:
        """Cut the slices of the shown cases, unless that is done and no score is newer.

        Args:
            scores: Decide which cases are shown.

        Returns:
            Why there are none; empty if there are.

        Raises:
            UserError: If an image or a label map cannot be read.
        """
        if self.slices.is_file() and self.slices.stat().st_mtime >= self._scored_at():
            return ""
        predictions = self._predictions()
        if not predictions:
            return "The label maps were not kept, so there is no figure."
        root = self._images()
        if root is None:
            return "The images are not where config.yaml names them, so there is no figure."
        named = self._description(root)
        description, subjects = find_subjects(root, named)
        known = {subject.name: subject for subject in subjects if subject.name in predictions}
        save_slices(
            self.slices,
            known,
            description,
            predictions,
            [score for score in scores if score.case in known],
            rows=[self.baseline, self.student, *self.rows],
            student=self.student,
            baseline=self.baseline,
            modality=self.seen[0] if self.seen else None,
        )
        return ""

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that all folds share."""
        first = self.runs[0] / "config.yaml" if self.runs else self.root
        return read_mapping(self.root / "config.yaml") or read_mapping(first)

    @property
    def seen(self) -> tuple[str, ...]:
        """Modalities of the student."""
        return tuple(map(str, self.config.get("student_modalities") or ()))

    def _scored_at(self) -> float:
        path = self.root / "scores.csv"
        return path.stat().st_mtime if path.is_file() else 0.0

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
        cache = self.config.get("cache_dir")
        caches = [Path(cache)] if cache else [folder / "cache" for folder in (self.root, *self.runs)]
        markers = (path for folder in caches for path in sorted(folder.glob("phantoms-*/phantom.json")))
        return next((marker.parent for marker in markers), None)

    def _description(self, root: Path) -> Description | None:
        named = self.config.get("description")
        return load_description(Path(named)) if named else None
