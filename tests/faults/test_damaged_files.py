"""Any bytes in any file of a finished run end in a message, for the report and for what goes on."""

import json
import shutil
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from invented_runs import write_plan
from kdnet.config import parse_config
from kdnet.data.description import load_description
from kdnet.errors import UserError
from kdnet.evaluation.scoring import read_scores
from kdnet.files import UnreadableError, read_json, read_rows, read_yaml
from kdnet.results.page import write_reports
from kdnet.results.slices import cut_slices, load_slices
from kdnet.results.stored import read_folder
from kdnet.runs.folder import Folder, UnitFolder
from kdnet.runs.plan import load_folds
from kdnet.training.history import read_history

DEEP = b"[" * 100_000
DEEP_KEYS = b'{"a":' * 20_000
UNIT = "units/student/fold0-seed0"
FILES = (
    *("config.yaml", "plan.json", "description.json", "scores.csv"),
    *("slices.json", f"{UNIT}/history.csv"),
)


CONFIG, DESCRIPTION = parse_config([]), load_description("brats2021")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    # Two networks on two cases, so that a report takes no longer than it must.
    root = tmp_path_factory.mktemp("damaged") / "run"
    write_plan(root, DESCRIPTION, ("baseline", "student"), cases=2)
    cut_slices(read_folder(root))
    return root


@pytest.fixture
def run(finished, tmp_path):
    """Without the networks, whose operations take long to count."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return shutil.copytree(finished, tmp_path / "run", ignore=ignored)


def report(folder):
    """Return the message, None if there is a page."""
    try:
        write_reports(folder)
    except UserError as error:
        return str(error)
    return None


def go_on(folder):
    """What train.py reads in a folder that it goes on with."""
    run, unit = Folder(folder), UnitFolder(folder)
    readers = [
        run.read_plan,
        run.read_skipped,
        unit.read_record,
        lambda: run.check_config(CONFIG),
        lambda: run.check_unchanged(DESCRIPTION, {"folds": []}, {}),
        lambda: read_scores(unit.scores),
        lambda: load_slices(folder / "slices.json"),
        lambda: read_history(unit.history),
        lambda: load_folds(run.folds, [], validation=True),
        lambda: load_description(folder / "description.json"),
    ]
    messages = []
    for reader in readers:
        try:
            reader()
        except UserError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named(run, file):
    (run / file).write_bytes(DEEP)
    assert file.rpartition("/")[2] in (report(run) or "")


RECORDS = (
    *("{", "[]", '{"seconds": 5}', '{"experiment": []}', '{"peak_mib": []}'),
    *('{"seconds": {"training": "long"}}', '{"seconds": {"training": NaN}}'),
    '{"peak_mib": {"process": null}}',
)
HISTORIES = ("epoch,loss\none,2\n", "epoch,loss\n1,two\n", "loss\n2\n", "epoch,loss\n1\n")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("unit.json", content) for content in RECORDS),
        *(("history.csv", content) for content in HISTORIES),
        *(("skipped.json", content) for content in ("", "{}", "[1]", '{"subjects": 3}')),
    ],
)
def test_content_of_another_form_is_named(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    assert any(f"{file} is damaged" in message for message in go_on(tmp_path))


def bytes_of(seed):
    """Any bytes, or those of a sound file with some of them changed or cut off."""
    changed = st.builds(
        lambda at, new, cut: (seed[:at] + new + seed[at + len(new) :])[: len(seed) - cut],
        st.integers(0, max(len(seed) - 1, 0)),
        st.binary(min_size=1, max_size=8),
        st.integers(0, len(seed)) | st.just(0),
    )
    return changed | st.binary(max_size=60)


NAMES = (*FILES, "skipped.json", "unit.json", "history.csv")
KEYS = st.sampled_from(["seconds", "resolved", "peak_mib", "train", "test", "folds"]) | st.text(
    max_size=4
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
INNER = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(KEYS, PLAIN, max_size=3)
JSON = PLAIN | st.lists(INNER, max_size=3) | st.dictionaries(KEYS, INNER, max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), file=st.sampled_from(NAMES))
def test_what_goes_on_reads_or_says_why_not(finished, tmp_path, data, file):
    sound = (finished / file).read_bytes() if (finished / file).is_file() else b'{"subjects": []}'
    content = data.draw(bytes_of(sound) | JSON.map(lambda v: json.dumps(v).encode()))
    folder = tmp_path / "run"
    (folder / UNIT).mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(content)
    go_on(folder)
    (folder / file).unlink()


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15
)
@given(data=st.data(), file=st.sampled_from(FILES))
def test_the_report_is_written_or_says_why_not(finished, run, data, file):
    sound = (finished / file).read_bytes()
    content = data.draw(bytes_of(sound) | JSON.map(lambda v: json.dumps(v).encode()))
    (run / file).write_bytes(content)
    report(run)
    (run / file).write_bytes(sound)


@example(b"{? [] : 1}")
@example(b"2001-99-99")
@example(b"!!int x")
@example(b"!!bool x")
@example(b"!!timestamp x")
@example(b"1" * 5000)
@example(DEEP)
@example(b"\xff\xfe\x00\x01" * 9)
@example(DEEP_KEYS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=80))
def test_the_readers_read_or_raise_one_error(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    for read in (read_json, read_yaml, read_rows):
        with suppress(UnreadableError):
            read(path)
