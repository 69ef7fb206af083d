"""What the application's page says of another loss, and the public-protocol page of one's own."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from kdnet.data.subjects import Subject
from kdnet.runs.plan import load_folds

ROOT = Path(__file__).parents[2]
APPLICATION = ROOT / "examples" / "brats_kdnet"
SMALL = ["--phantoms", "6", "--phantom-size", "16", "--grid", "8,8,8", "--folds", "2"]
SMALL += ["--backbone-arguments", '{"channels": [2, 4]}', "--labelled", "null"]


def blocks(page, kind):
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def changed(text, hunk):
    lines = hunk.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
    assert old in text
    return text.replace(old, new, 1)


def test_the_change_and_the_rows_on_the_page_give_students_that_can_be_built(tmp_path):
    copy = tmp_path / "application"
    shutil.copytree(APPLICATION, copy, ignore=shutil.ignore_patterns("__pycache__"))
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
    command = [sys.executable, copy / "crossval.py", *SMALL, "--out", tmp_path / "run"]
    command += ["--rows-file", tmp_path / "mine.yaml", "--rows", "baseline,attention,mild"]
    # Every student is tried with its teacher before units are listed.
    done = subprocess.run(
        [*command, "--show", "units"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "attention/fold1-seed106" in done.stdout


def test_the_case_lists_on_the_page_are_folds(tmp_path):
    (lists,) = blocks(ROOT / "docs" / "how-to" / "public-protocol.md", "json")
    (tmp_path / "mine.json").write_text(lists, encoding="utf-8")
    assert json.loads(lists)["options"] == {"selection": "last"}
    subjects = [Subject(f"case_{letter}", {}) for letter in "abcd"]
    assert [fold.repeat for fold in load_folds(tmp_path / "mine.json", subjects)] == [0, 1]
