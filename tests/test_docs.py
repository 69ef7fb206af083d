"""Code blocks in the documentation run as they stand, top to bottom, page by page."""

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "examples").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:]*)(?:#([^)]*))?\)")
FENCED = re.compile(r"^(```+|:::+).*?^\1$", re.MULTILINE | re.DOTALL)
INCLUDED = re.compile(r"^```\{include\} (\S+)$", re.MULTILINE)
HEADING = re.compile(r"^#{1,6} +(.*?)[ #]*$", re.MULTILINE)
# What pages need beyond the application's packages.
NEEDS = {
    "plain-loop.md": ("accelerate",),
    "lightning.md": ("lightning",),
    "monai.md": ("monai", "ignite"),
    "nnunet.md": ("nnunetv2",),
    "export.md": ("safetensors", "onnx", "onnxscript", "onnxruntime"),
    "tracking.md": ("lightning",),
}
# No extra brings these: a block that imports one runs where it is installed.
ABSENT = {name for name in ("wandb", "mlflow") if find_spec(name) is None}


# Lightning's advice, and what exporters and engines say of their own parts.
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    for package in NEEDS.get(page.name, ()):
        pytest.importorskip(package, reason="its extra is not installed")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if any(f"import {name}\n" in block for name in ABSENT):
            continue
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    missing = []
    for _, target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            missing.append(f"{target}#{anchor}")
    assert missing == []


def anchors(page):
    """Of all headings, as GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    found = Counter()
    text = page.read_text(encoding="utf-8")
    # The site shows a page of the repository as one of its own.
    parts = [text, *((page.parent / name).read_text("utf-8") for name in INCLUDED.findall(text))]
    for heading in HEADING.findall(FENCED.sub("", "\n".join(parts))):
        plain = LINK.sub(r"\1", heading).lower()
        found[re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")] += 1
    return {name + f"-{n}" * (n > 0) for name, count in found.items() for n in range(count)}


def test_anchors_follow_the_rule_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b_c`, d - e!\n## [Link](x.md) 2\n```bash\n# not one\n```\n## Link 2\n")
    assert anchors(page) == {"a-b_c-d---e", "link-2", "link-2-1"}
