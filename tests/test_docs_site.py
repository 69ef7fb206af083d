"""The site documents every public name once, quotes messages as they are, and lists every page."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import privdistill

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = Path(privdistill.__file__).parent
TROUBLE = (DOCS / "how-to" / "troubleshooting.md").read_text(encoding="utf-8")
HEADINGS = [found.strip("` ") for found in re.findall(r"^### (.*)$", TROUBLE, re.MULTILINE)]


def literals():
    """Every text in the library's code; of a text with values in it, the parts between them."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return "\n".join(str(node.value) for node in nodes)


SAID = literals()


def test_the_reference_holds_every_public_name_once():
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    directive = r"^\.\. auto(?:class|function|exception):: privdistill\.(\w+)$"
    named = re.findall(directive, pages, re.MULTILINE)
    assert Counter(named) == Counter(privdistill.__all__)


def test_there_are_messages_to_look_up():
    assert len(HEADINGS) >= 25
    assert len(set(HEADINGS)) == len(HEADINGS)


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_heading_is_part_of_a_message(heading):
    # Names and numbers are those of an example, the words between them are the message's.
    length = min(12, len(heading))
    assert any(heading[i : i + length] in SAID for i in range(len(heading) - length + 1))


def test_every_page_of_the_index_exists():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.MULTILINE | re.DOTALL)
    pages = [line for block in blocks for line in block.splitlines() if line[:1] not in ("", ":")]
    assert len(pages) > 10
    assert [p for p in pages if "*" not in p and not list(DOCS.glob(f"{p}.*"))] == []


def test_the_start_page_installs_shows_code_and_leads_on():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    start = index.partition("\n## ")[0]
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", start, re.MULTILINE | re.DOTALL)
    (_, install), (_, code) = blocks
    assert [language for language, _ in blocks] == ["bash", "python"]
    assert install.startswith("pip install ")
    assert len(install.splitlines()) == 1
    assert len([line for line in code.splitlines() if line]) <= 12
    assert re.search(r"^!\[.+\]\(.+\.png\)$", start, re.MULTILINE)
    cards = start.partition('<div class="cards">')[2]
    assert len(re.findall(r"^- \*\*\[.+\]\(.+\)\*\*$", cards, re.MULTILINE)) == 4


@pytest.mark.parametrize(
    "page", [*DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md")], ids=lambda page: page.name
)
def test_no_code_is_wider_than_its_column(page):
    # At 1280 px the column holds 103 characters; commands and what they print are wrapped.
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    code = "".join(block for kind, block in blocks if kind not in ("bash", "text"))
    assert [line for line in code.splitlines() if len(line) > 103] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("furo", reason="the extra docs is not installed")
    pytest.importorskip("myst_nb", reason="the extra docs is not installed")
    pytest.importorskip("sphinx_copybutton", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    built = subprocess.run(
        [*command, str(DOCS), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "reference" / "wrapper.html").is_file()
    # Formulas are in the page, and nothing is fetched that would set them.
    page = (tmp_path / "terms.html").read_text(encoding="utf-8")
    assert "<math " in page
    assert re.findall(r'<(?:script|link)[^>]+"https?:', page) == []
