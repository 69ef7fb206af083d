"""The lower bounds of pyproject.toml are what `make test-oldest` installs."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: Tools of contributors, which no user installs, have the versions of constraints.txt there, too.
USED = PROJECT["dependencies"] + [
    text for name in EXTRAS.keys() - {"dev", "docs"} for text in EXTRAS[name]
]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def bound(requirement):
    name, lower = re.fullmatch(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", requirement).groups()
    return canonical(name), lower


def pins():
    lines = (ROOT / "oldest.txt").read_text(encoding="utf-8").splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version for name, version in found.items()}


def test_every_lower_bound_is_the_version_that_was_tried():
    lower = dict(map(bound, USED))
    assert {name: pins().get(name) for name in lower} == lower
