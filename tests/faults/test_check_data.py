"""check_data.py: all problems at once, for people and for programs, within bounds of memory."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from written import write_subject

import check_data
from faults.corpus import FAULTS, NAMES, SOUND, SOUND_NAMES, label_map, write_corpus

SCRIPT = Path(check_data.__file__)
SOUND_ONES = len(SOUND) + len(SOUND_NAMES) + 4
ALL = len(FAULTS) + len(NAMES) + SOUND_ONES
#: More than a process that finds nothing to complain of, MiB; most of it are tables and text.
ROOM = 64


def run(*arguments: str | Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Start the command as users do; what it said, and its peak of memory, MiB."""
    # The high-water mark of this process alone; that of getrusage begins with its parent's.
    measured = (
        "import pathlib, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    lines = pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "    peak = next(line.split()[1] for line in lines if line.startswith('VmHWM'))\n"
        "    sys.stderr.write(f'\\npeak {peak}\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", measured, str(SCRIPT), *map(str, arguments), "--workers", "2"],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
        timeout=120,
    )
    return done, float(done.stderr.split("peak ")[1].split()[0]) / 1024


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture(scope="module")
def checked(corpus):
    out = corpus.parent / "problems.csv"
    return *run("--data-root", corpus, "--json", "-", "--csv", out), out


@pytest.mark.faults
def test_every_fault_of_the_corpus_is_listed_in_one_pass(checked):
    done, _, path = checked
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["subjects"] == ALL
    assert found["usable"] == SOUND_ONES
    told = {problem["subject"]: problem["reason"] for problem in found["problems"]}
    assert {*FAULTS} <= {*told}
    assert len(told) == found["with_problems"] == len(FAULTS) + len(NAMES)
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    assert rows == found["problems"]
    assert found["number_of_problems"] == len(rows)


@pytest.mark.faults
def test_nothing_of_it_ends_in_a_traceback_or_moves_the_cursor(checked):
    done, _, _ = checked
    assert "Traceback" not in done.stderr
    for text in (done.stdout, done.stderr):
        assert "\x1b" not in text
        assert text.isascii() or text.encode()  # no bytes that are no text
    assert "escape\\x1b[31m" in done.stderr


@pytest.mark.faults
def test_memory_is_bounded_by_what_a_sound_data_set_takes(checked, tmp_path):
    for number in range(3):
        write_subject(tmp_path / f"good{number}")
    done, sound = run("--data-root", tmp_path)
    assert done.returncode == 0, done.stderr
    print(f"peak: corpus {checked[1]:.0f} MiB, sound {sound:.0f} MiB")
    assert checked[1] - sound < ROOM


def test_what_is_not_used_need_not_be_there(tmp_path, capsys):
    folder = write_subject(tmp_path / "one")
    label_map(folder).unlink()
    (folder / "one_t2.nii").unlink()
    root = ["--data-root", str(tmp_path)]
    assert check_data.main(root) == 1
    assert "the label map is missing" in capsys.readouterr().out
    assert check_data.main([*root, "--no-labels", "--modalities", "t1,t1ce"]) == 0
    assert "1 subjects, 1 usable, 0 with problems" in capsys.readouterr().out
    # Markup in names is shown and not obeyed.
    write_subject(tmp_path / "[red]bold[b]:smile:")
    (tmp_path / "[red]bold[b]:smile:" / "[red]bold[b]:smile:_seg.nii").unlink()
    assert check_data.main(root) == 1
    assert "[red]bold[b]:smile:" in capsys.readouterr().out


def test_what_cannot_be_checked_is_refused(tmp_path, refusal):
    root = ("--data-root", tmp_path)
    assert "expected a data set, found no image" in refusal(check_data, *root)
    write_subject(tmp_path / "one")
    message = refusal(check_data, *root, "--modalities", "pet")
    assert "has flair, t1, t1ce, t2, found pet" in message


def test_a_strange_folder_does_not_end_the_search(tmp_path, capsys):
    write_subject(tmp_path / "good")
    (write_subject(tmp_path / "twice") / "twice_t1.nii.gz").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert check_data.main(["--data-root", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "claims to be modality t1 too" in " ".join(out.split())
    assert "2 subjects, 1 usable, 1 with problems (1 in all)" in out
