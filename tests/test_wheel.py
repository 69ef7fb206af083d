"""The wheel alone: the README's user code runs where torch and nothing else is installed.

torch is too large to be installed anew, so that the empty environment borrows it: it gets links to
the files of torch and of what torch itself requires, found in their metadata, and no others.
"""

import importlib.metadata as metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
pytestmark = pytest.mark.slow


def required(name, extras=frozenset(), found=None):
    """A distribution with some of its extras, and all that it requires then."""
    found = {} if found is None else found
    key = re.sub(r"[-_.]+", "-", name).lower(), frozenset(extras)
    if key in found:
        return found
    try:
        found[key] = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return found  # of another platform
    for line in found[key].requires or ():
        wanted = Requirement(line)
        asked = ("", *extras)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": e}) for e in asked):
            required(wanted.name, wanted.extras, found)
    return found


def borrow(folder):
    """Link the files of torch's own requirements into a folder."""
    for distribution in required("torch").values():
        for file in distribution.files or ():
            source, target = Path(distribution.locate_file(file)), folder / file
            if ".." in file.parts or not source.is_file():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.symlink_to(source.resolve())


def run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build", reason="build is not installed")
    folder = tmp_path_factory.mktemp("dist")
    # A copy, since setuptools leaves build/ and *.egg-info beside what it builds.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "privdistill").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, source)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment that holds the wheel and torch."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", home / "venv")
    python = home / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", wheel)
    borrow(home / "torch")
    (site,) = (home / "venv").glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(f"{home / 'torch'}\n", encoding="utf-8")
    return python


def test_the_wheel_holds_the_typed_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "privdistill/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"privdistill"}


def test_the_source_archive_holds_what_builds_the_library_and_no_more(tmp_path):
    pytest.importorskip("build", reason="build is not installed")
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("what is tracked is known to git alone")
    tracked = run("git", "-C", ROOT, "ls-files", "-z").split("\0")
    source = tmp_path / "source"
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path, source)
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        files = [member.name.partition("/")[2] for member in archive if member.isfile()]
    assert {name.partition("/")[0] for name in files} == {
        *("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md"),
        *("constraints.txt", "privdistill", "privdistill.egg-info", "pyproject.toml", "setup.cfg"),
    }
    library = {name for name in tracked if name.startswith("privdistill/")}
    assert library == {name for name in files if name.startswith("privdistill/")}


def test_the_readme_runs_beside_torch_alone(python, tmp_path):
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    code = "\n".join(blocks)
    code += "\nimport importlib.util, privdistill\n"
    code += "print([n for n in ('numpy', 'monai', 'scipy') if importlib.util.find_spec(n)])\n"
    code += "print(privdistill.__file__)\n"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    said = run(python, "-c", code, cwd=tmp_path, env=bare).splitlines()
    assert said[-2] == "[]"
    assert "site-packages" in said[-1]
    assert (tmp_path / "student.pt").is_file()
