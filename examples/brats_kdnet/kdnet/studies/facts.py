"""What a study is about: study.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kdnet.errors import UserError
from kdnet.files import write_text
from kdnet.results.page import read_mapping

FACTS = "study.json"
TEACHER = "teacher"


@dataclass(frozen=True)
class Facts:
    """What study.json says.

    Attributes:
        name: As in the column `study`.
        dataset: Name of the data set.
        protocol: One sentence.
        labels: Kind to its name in tables, in the order of the tables.
        reference: The kind that gains are measured against.
        chosen: The kind of the chosen recipe; a mapping from a row's name without its kind
            (20-of-56) to a kind where settings differ.
        phantom: Whether the subjects are synthetic.
        commands: That filled rows.csv.
    """

    name: str
    dataset: str
    protocol: str
    labels: Mapping[str, str]
    reference: str = "baseline"
    chosen: str | Mapping[str, str] = "chosen"
    phantom: bool = False
    commands: Sequence[str] = field(default_factory=list)

    def label(self, kind: str) -> str:
        """How tables call a kind."""
        return self.labels.get(kind) or kind

    def is_chosen(self, row: str, kind: str) -> bool:
        """Say whether a row is the chosen recipe of its setting."""
        if isinstance(self.chosen, str):
            return kind == self.chosen
        return kind == self.chosen.get(row.removesuffix(f"_{kind}"))

    def is_student(self, kind: str) -> bool:
        """Say whether a kind is compared: neither the reference nor a teacher."""
        return kind not in {self.reference, TEACHER}

    def rank(self, kind: str) -> tuple[int, int, str]:
        """Sort kinds: the reference, the students as in `labels`, teachers."""
        group = {self.reference: 0, TEACHER: 2}.get(kind, 1)
        order = list(self.labels)
        return group, order.index(kind) if kind in order else len(order), kind


def write_facts(path: Path, facts: Facts) -> None:
    """Write study.json."""
    write_text(path, json.dumps(asdict(facts), indent=2) + "\n")


def read_facts(path: Path) -> Facts:
    """Read study.json."""
    if not path.is_file():
        raise UserError(f"{path}: expected what the rows beside it are about, found no such file.")
    content = read_mapping(path)
    missing = [name for name in ("name", "dataset", "protocol", "labels") if name not in content]
    if missing:
        raise UserError(f"{path}: expected the keys {listed(_FORMS)}; {listed(missing)} missing.")
    strange = [name for name in content if name not in _FORMS]
    if strange:
        raise UserError(f"{path}: expected the keys {listed(_FORMS)}; found {listed(strange)}.")
    for name, value in content.items():
        form, fits = _FORMS[name]
        if not fits(value):
            raise UserError(f"{path}: {name} is {value!r}; expected {form}.")
    return Facts(**content)


def listed(names: Iterable[str]) -> str:
    """Names with commas between them, for messages."""
    return ", ".join(names)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_text, (*value, *value.values())))


_FORMS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "name": ("a text", _is_text),
    "dataset": ("a text", _is_text),
    "protocol": ("a sentence", _is_text),
    "labels": ("kinds and their names", _is_texts),
    "reference": ("a kind", _is_text),
    "chosen": (
        "a kind, or settings and their kinds",
        lambda value: _is_text(value) or _is_texts(value),
    ),
    "phantom": ("true or false", lambda value: isinstance(value, bool)),
    "commands": (
        "a list of commands",
        lambda value: isinstance(value, list) and all(map(_is_text, value)),
    ),
}
