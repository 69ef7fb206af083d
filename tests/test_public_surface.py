"""The public surface: names, signatures and public attributes, kept in `public_surface.txt`.

A change there is a change for every user: it belongs into the changelog, and, after 1.0, into the
version. `PRIVDISTILL_WRITE_PAGES=1` writes the file anew.
"""

import inspect
import os
import re
from pathlib import Path

import torch

import privdistill

FILE = Path(__file__).with_name("public_surface.txt")
HEAD = "What users may call. Made by tests/test_public_surface.py.\n"


def signature(thing):
    """A signature on one line, without what differs between versions of Python and torch."""
    try:
        text = str(inspect.signature(thing))
    except ValueError:  # of classes that are made in C
        return ""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def own(kind):
    """Public members of a class and of bases that users do not see; others are listed there."""
    for name, member in inspect.getmembers_static(kind):
        owner = next(c for c in kind.__mro__ if name in vars(c))
        inherited = owner is not kind and owner.__name__ in privdistill.__all__
        ours = owner.__module__.startswith("privdistill") and not inherited
        if ours and not name.startswith("_"):
            yield name, member


def described(name):
    thing = getattr(privdistill, name)
    if not inspect.isclass(thing):
        return [f"{name}{signature(thing)}"]
    bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
    lines = [f"class {name}({bases})" if bases else f"class {name}"]
    if not issubclass(thing, Exception):
        lines.append(f"    {signature(thing)}")
    for member, value in own(thing):
        function = getattr(value, "__func__", value)  # of static and class methods
        if inspect.isfunction(function):
            lines.append(f"    .{member}{signature(function)}")
        elif not isinstance(value, torch.Tensor):
            lines.append(f"    .{member}")
    return lines


def surface():
    blocks = ["\n".join(described(name)) for name in sorted(privdistill.__all__)]
    return "\n\n".join([HEAD.strip(), *blocks]) + "\n"


def test_the_public_surface_is_what_the_file_says():
    made = surface()
    if os.environ.get("PRIVDISTILL_WRITE_PAGES"):
        FILE.write_text(made, encoding="utf-8")
    kept = FILE.read_text(encoding="utf-8")
    assert made == kept, "PRIVDISTILL_WRITE_PAGES=1 pytest -n 0 tests/test_public_surface.py"


def test_names_are_sorted_and_none_is_hidden():
    assert privdistill.__all__ == sorted(privdistill.__all__)
    assert not [name for name in privdistill.__all__ if name.startswith("_")]
    assert not [name for name in privdistill.__all__ if not hasattr(privdistill, name)]
