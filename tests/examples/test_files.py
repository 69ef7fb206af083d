"""A run goes on with the files it began with, or names those that have changed."""

import os
from dataclasses import replace

import pytest

import crossval
import train
from kdnet.data.subjects import ImageFile, Subject, changed_files, file_states
from kdnet.errors import UserError
from kdnet.runs.run_folder import RunFolder
from phantoms import generate_phantoms


@pytest.fixture
def subject(tmp_path):
    files = [tmp_path / name for name in ("t1.nii", "seg.nii")]
    for file in files:
        file.write_bytes(b"1234")
    return Subject("a", {"t1": ImageFile(files[0])}, ImageFile(files[1]))


@pytest.fixture
def run(tmp_path, subject):
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    run.write_files(file_states([subject]))
    return run


def test_the_same_files_go_on(run, subject):
    run.check_files(file_states([subject]))


def test_a_file_of_another_size_is_named(run, subject):
    status = subject.segmentation.path.stat()
    subject.segmentation.path.write_bytes(b"12345")
    os.utime(subject.segmentation.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"1 files .* have changed .*: \S+seg.nii\. What"):
        run.check_files(file_states([subject]))


def test_a_file_of_another_time_is_named_and_the_check_can_be_left_out(run, subject):
    os.utime(subject.images["t1"].path, ns=(1, 1))
    with pytest.raises(UserError, match=r"t1\.nii.*remove \S+files\.json to go on"):
        run.check_files(file_states([subject]))
    run.files.unlink()
    run.check_files(file_states([subject]))


def test_a_file_that_has_gone_and_one_that_is_new_are_named(tmp_path, subject):
    before = file_states([subject])
    fresh = replace(subject, segmentation=None, images={**subject.images})
    assert changed_files(before, file_states([fresh])) == [str(tmp_path / "seg.nii")]
    assert changed_files(file_states([fresh]), before) == [str(tmp_path / "seg.nii")]
    assert changed_files({}, before) == []
    assert len(changed_files({"a": 5}, before)) == 2


def test_a_file_that_cannot_be_looked_at_is_left_to_the_checks_and_named_later(run, subject):
    subject.images["t1"].path.unlink()
    assert [-1, -1] in file_states([subject])["a"].values()
    with pytest.raises(UserError, match=r"1 files .* have changed .*t1\.nii"):
        run.check_files(file_states([subject]))


@pytest.mark.parametrize(
    ("program", "last"),
    [(train, "kdnet.runs.opening.settle"), (crossval, "kdnet.runs.folder._complete")],
)
def test_what_goes_on_is_refused_where_a_file_has_changed(
    tmp_path, monkeypatch, capsys, program, last
):
    data = generate_phantoms(tmp_path / "data", subjects=6, seed=0, size=16, progress=False)
    given = ["--data-root", str(data), "--preset", "demo", "--grid", "8,8,8", "--workers", "1"]
    given += ["--backbone_arguments", '{"channels": [2, 4]}', "--folds", "3"]
    given += ["--performance", "plain", "--out", str(tmp_path / "run")]
    given += ["--rows", "baseline"] if program is crossval else []

    def stop(*_, **__):
        raise UserError("as far as here")

    monkeypatch.setattr(last, stop)
    for _ in range(2):
        assert program.main(given) == 2
        assert "as far as here" in capsys.readouterr().err
    file = next(data.rglob("*t1ce*.nii*"))
    os.utime(file, ns=(1, 1))
    assert program.main(given) == 2
    assert f"1 files of the data set have changed since this run began: {file}." in (
        capsys.readouterr().err
    )
