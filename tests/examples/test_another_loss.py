"""What the application's page says of another loss, and the public-protocol page of one's own."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from quick import TINY

from kdnet.data.subjects import Subject
from kdnet.runs.plan import load_folds

ROOT = Path(__file__).parents[2]
APPLICATION = ROOT / "examples" / "brats_kdnet"
SMALL = [*TINY, "--phantoms", "6", "--phantom-size", "16", "--folds", "2", "--labelled", "null"]


def blocks(page, kind):
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def changed(text, hunk):
    lines = hunk.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
    assert old in text
    return text.replace(old, new, 1)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The application once more, for this test imported from there."""
    copied = tmp_path / "application"
    shutil.copytree(APPLICATION, copied, ignore=shutil.ignore_patterns("__pycache__"))
    names = {"kdnet", *(path.stem for path in APPLICATION.glob("*.py"))}

    def forget():
        loaded = [name for name in sys.modules if name.partition(".")[0] in names]
        return {name: sys.modules.pop(name) for name in loaded}

    before = forget()
    monkeypatch.syspath_prepend(copied)
    yield copied
    forget()
    sys.modules.update(before)


def test_the_change_and_the_rows_on_the_page_give_students_that_can_be_built(
    copy, tmp_path, capsys
):
    (diff,) = blocks(APPLICATION / "README.md", "diff")
    changes = re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, re.DOTALL | re.MULTILINE)
    assert len(changes) == 2
    for file, hunks in changes:
        text = (copy / file).read_text(encoding="utf-8")
        for hunk in hunks.split("@@\n"):
            text = changed(text, hunk)
        (copy / file).write_text(text, encoding="utf-8")
    (rows,) = blocks(APPLICATION / "README.md", "yaml")
    (tmp_path / "mine.yaml").write_text(rows, encoding="utf-8")
    arguments = [*SMALL, "--out", str(tmp_path / "run"), "--rows-file", str(tmp_path / "mine.yaml")]
    # Every student is tried with its teacher before units are listed.
    more = ["--rows", "baseline,attention,mild", "--show", "units"]
    assert importlib.import_module("crossval").main([*arguments, *more]) == 0
    assert "attention/fold1-seed106" in capsys.readouterr().out


def test_the_case_lists_on_the_page_are_folds(tmp_path):
    (lists,) = blocks(ROOT / "docs" / "how-to" / "public-protocol.md", "json")
    (tmp_path / "mine.json").write_text(lists, encoding="utf-8")
    assert json.loads(lists)["options"] == {"selection": "last"}
    subjects = [Subject(f"case_{letter}", {}) for letter in "abcd"]
    assert [fold.repeat for fold in load_folds(tmp_path / "mine.json", subjects)] == [0, 1]
