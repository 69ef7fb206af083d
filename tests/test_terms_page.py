"""docs/terms.md: one section for each term and preset, made from the classes."""

import inspect
import os
import re
from pathlib import Path

import pytest
from terms import KINDS, make

import privdistill.functional as F
from privdistill.losses import presets

PAGE = Path(__file__).parent.parent / "docs" / "terms.md"
PRESETS = [function for name, function in vars(presets).items() if inspect.isfunction(function)]
PRESETS = [function for function in PRESETS if function.__module__ == presets.__name__]


def function(kind):
    """The function that a term calls: it holds formula and source."""
    return getattr(F, make(kind).name)


def section(documented, title):
    """The text of a docstring's section, on one line, with links to the papers."""
    text = inspect.getdoc(documented)
    (body,) = re.findall(rf"^{title}:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    body = " ".join(body.split())
    body = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", body)
    return re.sub(r"doi:(10\.[\w./]+\w)", r"[doi:\1](https://doi.org/\1)", body)


def formula(documented):
    """The first formula and what its paragraph says of it, else the first sentence."""
    first, *others = inspect.getdoc(documented).split("\n\n")
    for paragraph in (" ".join(other.split()) for other in others):
        if found := re.fullmatch(r":math:`([^`]+)`[,:.]? ?(.*)", paragraph):
            rest = re.sub(r":math:`([^`]+)`", r"$\1$", found[2])
            return f"$$\n{found[1]}\n$$\n\n{rest}".rstrip()
    return first


def reads(term):
    parts = [f"tap `{tap}`" for tap in term.taps]
    parts += ["teacher's logits"] * term.needs_teacher + ["target"] * term.needs_target
    return ", ".join(parts)


def options(documented):
    parameters = inspect.signature(documented).parameters.values()
    named = [p for p in parameters if p.name != "tap"]
    return ", ".join(
        f"`{p.name}`" if p.default is p.empty else f"`{p.name}={p.default!r}`" for p in named
    )


def entry(name, documented, **items):
    """A heading, the formula, and what there is to know, one item a line."""
    lines = [f"- **{item.capitalize()}:** {text}\n" for item, text in items.items()]
    return f"### `{name}`\n\n{formula(documented)}\n\n{''.join(lines)}\n"


def terms():
    for kind in KINDS:
        yield entry(
            kind.__name__,
            function(kind),
            weight=section(kind, "Weight"),
            source=section(function(kind), "Source"),
            reads=reads(make(kind)),
            options=options(kind) or "none",
        )


def chosen():
    for preset in PRESETS:
        yield entry(
            preset.__name__,
            preset,
            objective=f"`{preset()!r}`",
            source=section(preset, "Source"),
            options=options(preset),
        )


def page(text):
    for heading, entries in (("Terms", terms()), ("Presets", chosen())):
        found = re.compile(rf"(^## {heading}\n.*?)^### .*?(?=^## )", re.MULTILINE | re.DOTALL)
        made = "".join(entries)
        text = found.sub(lambda match, made=made: match[1] + made, text)
    return text


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
