"""A pickle that would run code is refused wherever the application or the library reads tensors."""

import os
import pickle
import zipfile

import pytest
import torch

from faulty_training import case, train
from kdnet.data.loading import prepare
from kdnet.data.preprocessing import Preprocessing
from kdnet.data.subjects import find_subjects
from kdnet.errors import UserError
from kdnet.training.checkpoint import load_model, load_state
from phantoms import generate_phantoms
from privdistill import CacheWarning, TeacherCache


class Trap:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['TRAP']}",)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A file that appears if the code runs."""
    monkeypatch.setenv("TRAP", str(tmp_path / "trapped"))
    return tmp_path / "trapped"


def plain(path):
    path.write_bytes(pickle.dumps(Trap(), protocol=2))


def in_torch(path):
    torch.save({"weights": Trap(), "image": Trap(), "digest": Trap()}, path)


def old_torch(path):
    torch.save({"weights": Trap()}, path, _use_new_zipfile_serialization=False)


HOSTILE = pytest.mark.parametrize("write", [plain, in_torch, old_torch])


def test_the_trap_works(tmp_path, trap):
    plain(tmp_path / "file")
    pickle.loads((tmp_path / "file").read_bytes())
    assert trap.exists()


@HOSTILE
def test_a_state_is_refused(tmp_path, trap, write):
    task = case(tmp_path / "run")
    task.folder.root.mkdir()
    for file in (task.folder.state, task.folder.pause):
        write(file)
        with pytest.raises(UserError, match="cannot be gone on with"):
            load_state(file)
        with pytest.raises(UserError, match="cannot be gone on with"):
            train(task)
        file.unlink()
    assert not trap.exists()


@HOSTILE
def test_a_model_file_is_refused(tmp_path, trap, write):
    write(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no file of this application, or it is damaged"):
        load_model(tmp_path / "model.safetensors")
    assert not trap.exists()


@HOSTILE
def test_a_prepared_subject_is_refused(tmp_path, trap, write):
    root = generate_phantoms(tmp_path / "p", subjects=1, seed=0, size=16, progress=False)
    description, subjects = find_subjects(root)
    preprocessing = Preprocessing(description, ("t1",), None, (6, 6, 6))
    prepared = prepare(subjects, preprocessing, tmp_path / "cache", 1, progress=False)
    file = prepared.file(subjects[0])
    write(file)
    with pytest.raises(UserError, match=r"is damaged .*Remove it"):
        prepared[0]
    # What is no archive at all is made again when the next run begins.
    if write is not in_torch:
        again = prepare(subjects, preprocessing, tmp_path / "cache", 1, progress=False)
        assert again[0]["image"].shape == (1, 6, 6, 6)
    assert not trap.exists()


def repeating(path):
    """A terabyte of float32 in four bytes."""
    tensors = {name: torch.zeros(1).expand(2**38) for name in ("weights", "image", "digest")}
    torch.save(tensors | {"parts": {}, "checksum": 0}, path)


def compressed(path):
    """A gigabyte of zeros would take a megabyte in this form; here it is small."""
    torch.save({"weights": torch.zeros(2**20), "image": torch.zeros(2**20)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def is_made_again(folder, write):
    """An entry is written, exchanged for another file, and asked for again."""
    answer = {"tap.x": torch.ones(1, 3)}

    def fetch():
        return TeacherCache(folder).fetch("t", ["a"], torch.zeros(1, 1, 4), lambda: answer)

    fetch()
    (entry,) = folder.rglob("*.pt")
    write(entry)
    with pytest.warns(CacheWarning, match="is damaged"):
        assert torch.equal(fetch()["tap.x"], answer["tap.x"])


@HOSTILE
def test_an_entry_of_the_teacher_cache_is_refused_and_made_again(tmp_path, trap, write):
    is_made_again(tmp_path / "cache", write)
    assert not trap.exists()


@pytest.mark.parametrize("write", [repeating, compressed])
def test_an_entry_of_the_teacher_cache_that_unfolds_is_made_again(tmp_path, write):
    is_made_again(tmp_path / "cache", write)
