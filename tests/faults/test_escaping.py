"""What a file calls a subject, a row or a data set is shown by the pages and never obeyed."""

import html
import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml

from invented_runs import write_plan
from kdnet.data.description import load_description
from kdnet.evaluation.scoring import read_scores, write_scores
from kdnet.results.page import write_report
from kdnet.results.slices import cut_slices
from kdnet.results.stored import read_folder
from page_links import read_links

TEXT = """<hostile onmouseover=alert(1)>"'</script></style><script>alert(2)</script>{{ 7*7 }}"""
PROBLEM = {"subject": TEXT, "file": f"/data/{TEXT}", "reason": TEXT}


class Elements(HTMLParser):
    """Every element of a page, with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[tuple[str, str | None]]]] = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, attributes))


def hostile(case: str) -> str:
    return f"{case}{TEXT}"


def rename(folder) -> None:
    """Give every case and configuration of a folder a hostile name, as a stranger could."""
    scores = read_scores(folder / "scores.csv")
    write_scores(folder / "scores.csv", scores.assign(case=scores["case"].map(hostile)))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {TEXT: TEXT, "note": [TEXT]}))
    environment = {"versions": {TEXT: TEXT}, "seed": TEXT}
    (folder / "environment.json").write_text(json.dumps(environment))
    skipped = {"subjects": [TEXT], "problems": [PROBLEM]}
    (folder / "skipped.json").write_text(json.dumps(skipped))
    lists = [{"train": [TEXT], "test": [hostile("Case_0")], TEXT: [TEXT], "number": TEXT}]
    (folder / "folds.json").write_text(json.dumps({"folds": lists}))
    for record in folder.glob("units/*/*/unit.json"):
        record.write_text(json.dumps({"peak_mib": {TEXT: 3}}))
        (record.parent / "diagnosis.md").write_text(TEXT)
    plan = json.loads((folder / "plan.json").read_text())
    plan |= {"title": TEXT, "protocol": TEXT, "dataset": TEXT, "commands": [TEXT]}
    plan["rows"] = [row | {"label": TEXT + row["name"]} for row in plan["rows"]]
    (folder / "plan.json").write_text(json.dumps(plan))


def rename_slices(path) -> None:
    kept = json.loads(path.read_text())
    for case, sheets in zip(kept["cases"], kept["viewer"], strict=True):
        case["name"] = sheets["name"] = hostile(case["name"])
        case["why"] = sheets["why"] = sheets["modality"] = TEXT
        case["strip"][0] |= {"title": TEXT, "note": TEXT, "source": TEXT}
    path.write_text(json.dumps(kept | {"legend": [[TEXT, TEXT]]}))


@pytest.fixture(scope="module", params=["train", "study"])
def page(request, tmp_path_factory):
    description = replace(load_description("brats2021"), name=TEXT, citation=TEXT)
    root = write_plan(tmp_path_factory.mktemp("cv") / "cv", description, cases=3)
    cut_slices(read_folder(root))
    rename(root)
    rename_slices(root / "slices.json")
    if request.param == "study":
        plan = json.loads((root / "plan.json").read_text())
        plan |= {"kind": "study", "labels": dict.fromkeys(["teacher", "baseline", TEXT], TEXT)}
        for row in plan["rows"]:
            row["kind"] = {"student": TEXT}.get(row["name"], row["name"])
        (root / "plan.json").write_text(json.dumps(plan))
    return write_report(root).read_text(encoding="utf-8")


def test_hostile_names_make_no_elements_and_no_attributes(page):
    elements = Elements()
    elements.feed(page)
    assert "hostile" not in {tag for tag, _ in elements.found}
    attributes = {name for _, found in elements.found for name, _ in found}
    assert not [name for name in attributes if name.startswith("on")]


def test_the_names_are_there_to_be_read_and_add_no_script(page):
    scripts = read_links(page).scripts
    assert [kind for kind, _ in scripts] == ["application/json", "text/javascript"]
    assert not any("alert(2)</script" in text for _, text in scripts)
    assert html.escape(TEXT, quote=False).partition("onmouseover")[0] in page
    assert "{{ 7*7 }}" in page
    assert "1 subject was left out, because the files are not" in page
