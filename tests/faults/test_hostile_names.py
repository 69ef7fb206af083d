"""Names from files never lead out of the folder that they are put into."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from written import write_subject

from kdnet.data.checks import check_subjects
from kdnet.data.description import Description, load_description
from kdnet.data.loading import PreparedSubjects
from kdnet.data.preprocessing import Preprocessing
from kdnet.data.subjects import Subject, find_subjects
from kdnet.errors import UserError, printable
from kdnet.files import is_name
from kdnet.results.stored import read_folder
from kdnet.rows import Row, _row, sweep
from kdnet.runs.folder import Folder
from kdnet.runs.plan import load_folds

BRATS = load_description("brats2021")
PARTS = (
    *("..", ".", "/", "//", "\\", "a", "é", " ", "\n", "\0", "\x1b[2J", "~", "$HOME", "*", "?"),
    *("[", "]", "[z-a]", "[!a]", "**", "{subject}", "{grade}", "{grade:A,B}", "{", "}", "|", ":"),
    *("C:\\", "etc/passwd", "con", "%2e%2e", "\u202e", "x" * 90, "(", ")", "+", "^", "$", "(?P<a>"),
)
hostile = st.lists(st.sampled_from(PARTS), max_size=8).map("".join) | st.text(max_size=20)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set beside which lies what must not be found from it."""
    folder = tmp_path_factory.mktemp("names")
    write_subject(folder / "data" / "case")
    write_subject(folder / "secret")
    return folder / "data"


@given(hostile)
@example("../secret")
@example("/etc/passwd")
@example("..")
@example("")
def test_a_name_that_is_one_stays_where_it_is_put(name):
    if not is_name(name):
        return
    inside = Path(os.path.normpath(Path("/run") / f"{name}_seg.nii.gz"))
    assert inside.parent == Path("/run")
    assert PurePosixPath(name).parts == (name,)
    assert printable(name) == name


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "x" * 101, "é" * 51])
def test_formulas_and_endless_names_are_no_names(name):
    assert not is_name(name)
    values = {**BRATS.to_dict(), "modalities": {name: "{subject}.nii"}}
    with pytest.raises(UserError, match="does not begin with a dot, =,"):
        Description.from_dict(values)
    assert is_name(f"x{name}"[:50])


@given(hostile, st.booleans())
@example("../{subject}/{subject}_t1.nii", False)
@example("/{subject}/{subject}_t1.nii", False)
@example("{subject}/../../secret/{subject}_t1.nii", False)
@example("{subject}[z-a].nii", False)
@example("{subject}*?*?*?*?*?*?*?*?.nii", False)
def test_a_pattern_finds_nothing_outside_of_its_data_set(root, pattern, whole):
    pattern = pattern if "{subject}" in pattern or not whole else f"{{subject}}{pattern}"
    try:
        description = replace(BRATS, modalities={"t1": pattern}, segmentation=pattern)
        _, subjects = find_subjects(root, description)
    except UserError:
        return
    for subject in subjects:
        paths = [file.path for file in subject.images.values()]
        paths += [path for others in subject.rivals.values() for path in others]
        for path in paths:
            assert Path(os.path.normpath(path)).is_relative_to(root)
        assert is_name(subject.name)


@given(st.dictionaries(hostile, st.just("{subject}.nii"), min_size=1, max_size=2), hostile)
@example({"../../x": "{subject}.nii"}, "ET")
@example({"t1": "{subject}.nii"}, "../WT")
def test_modalities_and_regions_of_a_description_are_names(modalities, region):
    values = {**BRATS.to_dict(), "modalities": modalities, "regions": {region: [1]}}
    try:
        description = Description.from_dict(values)
    except UserError:
        return
    assert all(map(is_name, (*description.modalities, *description.regions)))
    try:
        rows = sweep([Row("baseline", label="b")], tuple(description.modalities))
    except UserError:
        return
    assert all(is_name(row.name) for row in rows)
    with pytest.raises(UserError, match="at most 100 bytes"):
        sweep([Row("baseline", label="b")], ("t" * 95,))


@given(
    st.sampled_from([*BRATS.to_dict()]),
    st.one_of(
        st.none(), st.integers(), hostile, st.lists(hostile), st.dictionaries(hostile, hostile)
    ),
)
def test_descriptions_of_any_content_are_refused_in_words(key, value):
    with contextlib.suppress(UserError):
        Description.from_dict({**BRATS.to_dict(), key: value})


@given(hostile)
@example("../../outside")
@example("/etc")
@example("predictions")
@example("x" * 101)
def test_a_row_is_called_by_a_name_for_folders(name):
    try:
        row = _row(Path("rows.yaml"), name, {"label": "x"})
    except UserError:
        return
    assert is_name(row.name)
    assert row.name not in {"predictions", "curves"}


@given(hostile)
@example("../../outside")
def test_a_folder_of_a_stranger_names_no_rows_outside_of_it(tmp_path_factory, name):
    root = tmp_path_factory.getbasetemp() / "crossval"
    root.mkdir(exist_ok=True)
    facts = {"kind": "train", "title": "x", "rows": [{"name": name}], "seeds": [0], "folds": [0]}
    (root / "plan.json").write_text(json.dumps(facts))
    with contextlib.suppress(UserError):
        assert all(map(is_name, read_folder(root).rows))
    with contextlib.suppress(UserError):
        assert all(is_name(row.name) for row in Folder(root).read_plan().rows)


@given(st.lists(hostile, min_size=1, max_size=3))
@example(["../../outside"])
def test_case_lists_name_subjects_that_were_found_or_are_refused(tmp_path_factory, names):
    path = tmp_path_factory.getbasetemp() / "lists.json"
    known = [Subject(name, {}) for name in ("a", "b", "c")]
    lists = {"train": ["a"], "validation": ["b"], "test": names}
    found = set()
    for content in (lists, {"folds": [lists]}):
        path.write_text(json.dumps(content))
        with contextlib.suppress(UserError):
            found |= {*load_folds(path, known)[0].split.test}
    assert found <= {"c"}


def test_files_of_the_cache_are_called_by_names(root):
    _, subjects = find_subjects(root, BRATS)
    prepared = PreparedSubjects(subjects, Preprocessing(BRATS, ("t1",), None, None), Path("cache"))
    assert all(is_name(prepared.file(subject).stem) for subject in subjects)


def test_a_link_out_of_the_data_set_is_followed(tmp_path, root):
    """People link the folders of their subjects from elsewhere; nothing is written there."""
    (tmp_path / "case").symlink_to(root / "case")
    _, subjects = find_subjects(tmp_path, BRATS)
    assert check_subjects(BRATS, subjects, workers=1, progress=False) == []
