"""The one file to copy: it runs on phantoms and on files, and its page shows it as it is."""

import importlib.util
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from monai.utils import set_determinism
from written import write_subject, write_volume

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "one_file.py"
PAGE = ROOT / "docs" / "how-to" / "one-file.md"
BLOCK = re.compile(r"^```py\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    block
    for page in (PAGE, ROOT / "README.md")
    for block in BLOCK.findall(page.read_text(encoding="utf-8"))
]


@pytest.fixture
def one_file():
    spec = importlib.util.spec_from_file_location("one_file", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    set_determinism(None)  # the seed of every transform of MONAI


@pytest.fixture
def written(tmp_path):
    """Four subjects at 1 mm, as files."""
    for number in range(4):
        write_subject(tmp_path / "data" / f"Case_{number}", suffix=".nii.gz")
    return tmp_path / "data"


def scores(printed):
    """The numbers of each network's row."""
    rows = re.findall(r"^(teacher|baseline|student)((?: +[\d.]+){3})$", printed, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in rows}


def test_it_fits_on_a_few_screens():
    assert len(FILE.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("block", BLOCKS)
def test_pages_show_the_file_as_it_is(block):
    source = FILE.read_text(encoding="utf-8")
    assert any(textwrap.indent(block, " " * deep) in source for deep in (0, 4, 8))


def test_the_page_shows_the_parts_that_matter():
    assert len(BLOCKS) >= 6


@pytest.mark.slow
def test_phantoms_give_a_table_a_label_map_and_a_plain_student(one_file, tmp_path, capsys):
    one_file.main(["--out", str(tmp_path), "--steps", "2"])
    found = scores(capsys.readouterr().out)
    assert list(found) == ["teacher", "baseline", "student"]
    assert all(0 <= dice <= 1 for row in found.values() for dice in row)
    (label_map,) = tmp_path.glob("*.nii.gz")
    (source,) = tmp_path.rglob(f"*/{label_map.name}")
    drawn, reference = nib.load(label_map), nib.load(source)
    assert drawn.shape == reference.shape
    assert np.array_equal(drawn.affine, reference.affine)
    assert set(np.unique(drawn.dataobj)) <= {0, 1, 2, 4}
    weights = torch.load(tmp_path / "student.pt", weights_only=True)
    UNet(3, 1, 3, channels=(16, 32, 64), strides=(2, 2)).load_state_dict(weights)


def test_files_are_read_and_segmented_in_their_own_space(one_file, written, tmp_path, monkeypatch):
    monkeypatch.setattr(one_file, "HELD_OUT", 1)
    (written / "Case_3" / "Case_3_seg.nii.gz").unlink()
    steps, train = {}, one_file.train

    def counted(name, data, count, *arguments, **options):
        steps[name] = len(data), count
        return train(name, data, count, *arguments, **options)

    monkeypatch.setattr(one_file, "train", counted)
    one_file.main(["--data-root", str(written), "--out", str(tmp_path), "--steps", "2"])
    # Subjects and steps: the one without a reference teaches through the teacher alone.
    assert steps == {"teacher": (2, 2), "baseline": (2, 4), "student": (3, 2)}
    drawn = nib.load(tmp_path / "Case_0_seg.nii.gz")
    assert drawn.shape == (12, 12, 12)
    assert np.array_equal(drawn.affine, np.eye(4))


def test_a_prediction_lies_where_the_subject_shows_it(one_file, tmp_path):
    bright = np.full((40, 50, 30), 10.0, np.float32)
    bright[8:24, 20:38, 6:20] = 20.0
    affine = np.array([[-1.0, 0, 0, 7], [0, -1, 0, 90], [0, 0, 2, -5], [0, 0, 0, 1]])
    folder = tmp_path / "Case"
    for end in (*one_file.MODALITIES, "seg"):
        volume = (bright > 15) * 4.0 if end == "seg" else bright
        write_volume(folder / f"Case_{end}.nii.gz", volume, affine)
    one_file.HELD_OUT = 0
    (sample,) = one_file.load(one_file.find_subjects(tmp_path), train=False)
    # Normalised to mean 0, only what is bright is positive.
    seen = SimpleNamespace(predict=lambda image: image[:, :3] * 10)
    found = one_file.predict(seen, sample)
    assert found.shape == sample["label"].shape == (3, 40, 50, 30)
    shared = (found * (sample["label"] > 0)).sum()
    assert 2 * shared / (found.sum() + sample["label"].sum()) > 0.9


def test_a_missing_modality_is_named(one_file, written):
    (written / "Case_1" / "Case_1_t2.nii.gz").unlink()
    with pytest.raises(SystemExit, match=r"Case_1_t2\.nii\.gz"):
        one_file.main(["--data-root", str(written)])


def test_a_label_of_no_region_is_named(one_file, written, monkeypatch):
    monkeypatch.setattr(one_file, "REGIONS", {"WT": torch.tensor([7])})
    with pytest.raises(SystemExit, match=r"seg\.nii\.gz: REGIONS lacks some of its labels"):
        one_file.find_subjects(written)


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_folder_without_subjects_is_named(one_file, tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=name):
        one_file.main(["--data-root", str(tmp_path / name)])
