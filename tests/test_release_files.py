"""What a release and its visitors need says the same thing everywhere, and is well formed."""

import re
import tomllib
from pathlib import Path

import pytest

import privdistill

yaml = pytest.importorskip("yaml", reason="the extra brats is not installed")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
RELEASES = re.findall(r"^## \[(\d[^\]]*)\] - (\d{4}-\d{2}-\d{2})$", CHANGELOG, re.MULTILINE)
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))


def test_the_version_is_semantic():
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[0-9a-z.-]+)?", privdistill.__version__)


def test_the_citation_has_what_its_schema_requires():
    assert CITATION["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= CITATION.keys()
    assert all({"family-names", "name"} & author.keys() for author in CITATION["authors"])


def test_the_citation_is_that_of_the_package():
    assert CITATION["title"] == PROJECT["name"]
    assert CITATION["version"] == privdistill.__version__
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["abstract"].strip() == PROJECT["description"]


def test_the_changelog_says_what_the_version_holds():
    headings = re.findall(r"^## \[([^\]]+)\]", CHANGELOG, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1:] == [version for version, _ in RELEASES]
    # Before the first release there is nothing but what becomes it.
    assert not RELEASES or RELEASES[0][0] == privdistill.__version__


def test_the_citation_has_the_date_of_the_last_release():
    dated = str(CITATION["date-released"]) if "date-released" in CITATION else None
    assert dated == (RELEASES[0][1] if RELEASES else None)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_of_an_issue_has_a_head_and_questions(path):
    _, head, body = path.read_text(encoding="utf-8").split("---\n", 2)
    said = yaml.safe_load(head)
    assert said.keys() == {"name", "about", "labels"}
    assert all(isinstance(value, str) and value for value in said.values())
    assert len(re.findall(r"^\*\*.+?\*\*", body, re.MULTILINE)) >= 3
    assert body.count("```") % 2 == 0


def test_the_template_of_a_change_asks_for_targets_and_files_that_exist():
    text = (ROOT / ".github" / "pull_request_template.md").read_text(encoding="utf-8")
    targets = re.findall(r"`make ([a-z-]+)`", text)
    files = re.findall(r"`([\w/]+\.(?:txt|md))`", text)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(targets) >= 3
    assert [name for name in targets if f"\n{name}:" not in makefile] == []
    assert len(files) >= 2
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_the_hooks_fetch_nothing_and_do_what_make_check_does():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    entries = {hook["entry"].removesuffix(" --force-exclude") for hook in hooks}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    check = makefile.split("\ncheck:", 1)[1].split("\n\n", 1)[0]
    assert entries == {
        f".venv/bin/{command.removesuffix(' .')}"
        for command in re.findall(r"^\t\$\(BIN\)/(.+)$", check, re.MULTILINE)
    }
