"""Commands in the documentation name programs, options, targets and extras that there are."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from crossval import CROSSVAL
from kdnet.config import parse_config, parse_for
from study import STUDY

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    {ROOT / "README.md", ROOT / "CONTRIBUTING.md"}
    | {*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")}
)
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: Programs of others and of the shell; their options are not ours to check.
OTHERS = {
    *("cd", "source", "mkdir", "cp", "echo", "export", "unset", "for", "done", "sbatch", "git"),
    *("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict"),
    *("nnUNetv2_evaluate_folder", "cat"),
}
WHOLE = {"train": parse_config, "crossval": CROSSVAL, "study": STUDY}


def commands(page):
    """Commands of a page, one line each, without comments and settings of variables."""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"\w+=\$\(", line):  # what a command of the shell prints
                continue
            words = shlex.split(line, comments=True)
            while words and re.match(r"\w+=", words[0]):
                words = words[1:]
            while "&&" in words:
                yield words[: words.index("&&")]
                words = words[words.index("&&") + 1 :]
            if words:
                yield words


EVERY = [
    pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)[:60]}")
    for page in PAGES
    for words in commands(page)
]


def problem(words):
    """What is wrong with a command; None if nothing is."""
    program, *rest = words
    if program in OTHERS:
        return None
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [word for word in rest if "=" not in word]
        return None if all(f"\n{name}:" in makefile for name in targets) else "no such target"
    if program == "pip":
        return missing_extra(rest)
    if "python" in Path(program).name or program == "torchrun":
        return problem_of_python(rest)
    return f"unknown program {program}"


def missing_extra(words):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [name for word in words for name in re.findall(r"\[(.*?)\]", word)]
    unknown = {part for names in asked for part in names.split(",")} - {*known}
    return f"no extras {unknown}" if unknown else None


def problem_of_python(words):
    """Look at the options of a program of ours."""
    if words[0] == "-m":
        name = words[1] if words[1].startswith("privdistill") else words[1].partition(".")[0]
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        return None if found else f"no module {words[1]}"
    at = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        return "no program"
    name, options = Path(words[at]).stem, words[at + 1 :]
    if name == "distil":  # the page's own
        return None
    # Pages begin beside the checkout, in it, or in the application's folder.
    inside = Path(words[at].removeprefix("privdistill/"))
    places = [ROOT / inside, ROOT / "examples" / "brats_kdnet" / inside]
    path = next((place for place in places if place.is_file()), None)
    return "no such file" if path is None else unknown_options(path, options)


def unknown_options(path, options):
    leaving = {"--help", "--help-all", "--print_config"}
    options = [option for option in options if option not in leaving]
    if path.stem in WHOLE:
        parse = WHOLE[path.stem]
        given = [*options, "--out", "runs/of-this-test"]
        _ = parse(given) if callable(parse) else parse_for(parse, given)
        return None
    source = path.read_text()
    names = [word.partition("=")[0].strip("-") for word in options if word.startswith("--")]
    # Options are written out, or are the names of a function's or a class's arguments.
    spelt = {name: rf'"--{name}"|\b{name.replace("-", "_")}: ' for name in names}
    unknown = [name for name, form in spelt.items() if not re.search(form, source)]
    return f"no options {unknown}" if unknown else None


@pytest.mark.parametrize("words", EVERY)
def test_a_command_can_be_given(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert problem(words) is None


@pytest.mark.parametrize(
    "line",
    [
        "python examples/brats_kdnet/predict.py --modle x",
        "python examples/brats_kdnet/none.py",
        "make test nothing",
        "python -m privdistill.integrations.gone",
        "python3 examples/brats_kdnet/predict.py --modle x",
        "pip install './privdistill[nothing]'",
        "rm -rf /",
    ],
)
def test_a_command_that_cannot_be_given_is_found(line):
    assert problem(shlex.split(line))
