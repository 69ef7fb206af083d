"""docs/terms.md: one row for each term, made from the classes."""

import inspect
import os
import re
from pathlib import Path

import pytest
from terms import KINDS, make

import privdistill.functional as F
from privdistill.losses import presets

PAGE = Path(__file__).parent.parent / "docs" / "terms.md"
HEAD = "| term | formula | reads | options | typical weight | source |\n| --- |" + " --- |" * 5
PRESETS = [function for name, function in vars(presets).items() if inspect.isfunction(function)]
PRESETS = [function for function in PRESETS if function.__module__ == presets.__name__]


def function(kind):
    """The function that a term calls: it holds formula and source."""
    return getattr(F, make(kind).name)


def section(documented, title):
    """The text of a docstring's section, on one line."""
    text = inspect.getdoc(documented)
    (body,) = re.findall(rf"^{title}:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    return " ".join(body.split()).replace("|", "\\|")


def formula(documented):
    """The first formula, else the first sentence."""
    text = inspect.getdoc(documented).split("\nArgs:")[0]
    found = [part for part in re.findall(r"`([^`]+)`", text) if " " in part]
    chosen = " ".join(found[0].split()) if found else text.splitlines()[0]
    return f"`{chosen}`".replace("|", "\\|") if found else chosen


def reads(term):
    parts = [f"tap `{tap}`" for tap in term.taps]
    parts += ["teacher's logits"] * term.needs_teacher + ["target"] * term.needs_target
    return ", ".join(parts)


def options(term):
    parameters = inspect.signature(type(term)).parameters.values()
    named = [p for p in parameters if p.name != "tap"]
    return ", ".join(
        f"`{p}`" if p.default is p.empty else f"`{p.name}={p.default!r}`" for p in named
    )


def rows():
    return [
        f"| `{kind.__name__}` | {formula(function(kind))} | {reads(make(kind))} "
        f"| {options(make(kind)) or 'none'} | {section(kind, 'Weight')} "
        f"| {section(function(kind), 'Source')} |"
        for kind in KINDS
    ]


def preset_rows():
    return [
        f"| `{preset.__name__}{inspect.signature(preset)}`".replace(" -> Objective", "").replace(
            " -> privdistill.losses.objective.Objective", ""
        )
        + f" | `{preset()!r}` | {section(preset, 'Source')} |"
        for preset in PRESETS
    ]


def page(text):
    parts = re.split(r"((?:^\|.*\n)+)", text, flags=re.MULTILINE)
    tables = ["\n".join([HEAD, *rows()]) + "\n"]
    tables.append(
        "\n".join(["| preset | objective | source |\n| --- | --- | --- |", *preset_rows()])
    )
    parts[1], parts[3] = tables[0], tables[1] + "\n"
    return "".join(parts)


def test_the_page_is_what_the_classes_say():
    text = PAGE.read_text(encoding="utf-8")
    made = page(text)
    if os.environ.get("PRIVDISTILL_WRITE_PAGES"):
        PAGE.write_text(made, encoding="utf-8")
    else:
        assert text == made, "PRIVDISTILL_WRITE_PAGES=1 pytest -n 0 tests/test_terms_page.py"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_term_says_where_it_comes_from_and_what_it_weighs(kind):
    assert section(function(kind), "Source")
    assert section(kind, "Weight")
