"""What a file calls a subject, a row or a data set is shown by the pages and never obeyed."""

import html
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from invented_runs import write_crossval, write_run
from kdnet.data.description import load_description
from kdnet.evaluation.scoring import read_scores, write_scores
from page_links import read_links
from report import write_report

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
    scores = [
        replace(score, case=hostile(score.case)) for score in read_scores(folder / "scores.csv")
    ]
    write_scores(folder / "scores.csv", scores)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {TEXT: TEXT, "note": [TEXT]}))
    environment = {"versions": {TEXT: TEXT}, "seed": TEXT}
    (folder / "environment.json").write_text(json.dumps(environment))
    skipped = {"subjects": [TEXT], "problems": [PROBLEM]}
    (folder / "skipped.json").write_text(json.dumps(skipped))


def rename_slices(path) -> None:
    arrays = dict(np.load(path, allow_pickle=False))
    cases = json.loads(str(arrays["cases"]))
    for case in cases:
        case["name"], case["why"], case["modality"] = hostile(case["name"]), TEXT, TEXT
    arrays["cases"] = np.array(json.dumps(cases))
    arrays["classes"] = np.array(json.dumps([TEXT] * 4))
    np.savez_compressed(path, **arrays)


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    description = replace(load_description("brats2021"), name=TEXT, citation=TEXT)
    run = write_run(tmp_path_factory.mktemp("run") / "run", description)
    rename(run)
    rename_slices(run / "slices.npz")
    lists = {"train": [TEXT], "validation": ["a"], "test": [hostile("Case_0")], TEXT: [TEXT]}
    (run / "cases.json").write_text(json.dumps(lists))
    (run / "summary.json").write_text(json.dumps({"seconds": {TEXT: 3}, "peak_mib": {TEXT: 3}}))
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def crossval_page(tmp_path_factory):
    description = replace(load_description("brats2021"), name=TEXT, citation=TEXT)
    root = write_crossval(tmp_path_factory.mktemp("cv") / "cv", description, folds=2, cases=4)
    write_report(root)  # cuts the slices
    rename(root)
    rename_slices(root / "slices.npz")
    facts = json.loads((root / "crossval.json").read_text())
    facts |= {"labels": dict.fromkeys(facts["rows"], TEXT), "protocol": TEXT, "dataset": TEXT}
    facts |= {"grades": {TEXT: 3}, "folds_sha256": TEXT}
    (root / "crossval.json").write_text(json.dumps(facts))
    return write_report(root).read_text(encoding="utf-8")


@pytest.fixture(params=["run", "crossval"])
def page(request):
    return request.getfixturevalue(f"{request.param}_page")


def test_hostile_names_make_no_elements_and_no_attributes(page):
    elements = Elements()
    elements.feed(page)
    assert "hostile" not in {tag for tag, _ in elements.found}
    attributes = {name for _, found in elements.found for name, _ in found}
    assert not [name for name in attributes if name.startswith("on")]


def test_no_script_is_added(page):
    scripts = read_links(page).scripts
    assert [kind for kind, _ in scripts] in (["application/json", "text/javascript"], [])
    assert not any("alert(2)</script" in text for _, text in scripts)


def test_the_names_are_there_to_be_read(page):
    assert html.escape(TEXT, quote=False).partition("onmouseover")[0] in page
    assert "{{ 7*7 }}" in page


def test_who_was_left_out_is_told(page):
    assert "1 subject was left out, because the files are not" in page
