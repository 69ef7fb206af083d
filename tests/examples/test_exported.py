import contextlib
import functools
import io
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from quick import STUDENT
from safetensors.torch import load_file

import predict
from export import main
from kdnet import exported
from kdnet.data.phantom_images import make_phantom
from kdnet.errors import UserError
from kdnet.exported import TOLERANCE, export, open_model
from kdnet.runs.networks import build
from kdnet.training.checkpoint import save_model, save_weights

DESCRIBED = STUDENT.description.to_dict()
ENDINGS = [".safetensors", ".pt2", ".onnx"]
# What torch's exporter to ONNX says of its own parts.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    metadata = replace(STUDENT, grid=(8, 8, 8))
    return build(metadata).eval(), metadata


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    """Each format is written once, by the command; gives the file and what was said."""
    folder = tmp_path_factory.mktemp("exported")
    save_model(folder / "model.safetensors", *trained)

    @functools.cache
    def write(ending):
        if ending == ".onnx":
            for name in ("onnx", "onnxscript", "onnxruntime"):
                pytest.importorskip(name, reason="the extra export is not installed")
        path, said = folder / f"student{ending}", io.StringIO()
        with contextlib.redirect_stdout(said):
            status = main(["--model", str(folder / "model.safetensors"), "--out", str(path)])
        assert status == 0
        return path, said.getvalue()

    return write


@pytest.fixture
def copied(written, tmp_path):
    """A file of a format that a test may damage."""

    def copy(ending):
        path, _ = written(ending)
        return Path(shutil.copy(path, tmp_path))

    return copy


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A phantom of t1ce, anisotropic, larger than the network's grid."""
    voxels = np.asarray(make_phantom(0, 0, 32).images["t1ce"])
    path = tmp_path_factory.mktemp("subject") / "case_t1ce.nii.gz"
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 1.5, 1.0])), path)
    return path


def segmented(model, image, out, device="cpu"):
    """Status of the command, and the label map if there is one."""
    given = ("--model", model, "--input", image, "--out", out, "--device", device)
    status = predict.main([*map(str, given), "--trust-program"])
    maps = list(out.glob("*.nii.gz"))
    return status, nib.load(maps[0]) if maps else None


@pytest.mark.parametrize("ending", ENDINGS)
def test_each_format_gives_the_logits_and_the_metadata(trained, written, ending):
    network, metadata = trained
    module, found = open_model(written(ending)[0], trust_program=True)
    assert found == metadata
    for batch in (1, 3):
        image = torch.randn(batch, 1, 8, 8, 8)
        with torch.no_grad():
            np.testing.assert_allclose(module(image), network(image), atol=TOLERANCE)


@pytest.mark.parametrize("ending", ENDINGS)
def test_predict_gives_the_label_map_of_the_model_itself(written, subject, tmp_path, ending):
    path, _ = written(ending)
    status, expected = segmented(path.parent / "model.safetensors", subject, tmp_path / "model")
    assert status == 0
    status, found = segmented(path, subject, tmp_path / "exported")
    assert status == 0
    values = np.asarray(expected.dataobj)
    assert len(np.unique(values)) > 1
    # Where two classes are as likely, rounding may decide.
    assert np.mean(values != np.asarray(found.dataobj)) < 1e-4
    np.testing.assert_array_equal(found.affine, expected.affine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_is_predicted_with_where_there_is_a_gpu(written, subject, tmp_path, ending):
    path, _ = written(ending)
    status, expected = segmented(path, subject, tmp_path / "cpu")
    assert status == 0
    status, found = segmented(path, subject, tmp_path / "gpu", device="auto")
    assert status == 0
    # TensorFloat-32 keeps ten bits, and the network is not trained.
    assert np.mean(np.asarray(expected.dataobj) != np.asarray(found.dataobj)) < 1e-2


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("left", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_one_message(copied, subject, tmp_path, capfd, ending, left):
    path = copied(ending)
    content = path.read_bytes()
    path.write_bytes(content[: left if left in (0, 10) else int(left * len(content))])
    assert segmented(path, subject, tmp_path / "out") == (2, None)
    said = capfd.readouterr().err
    assert said.startswith(str(path))
    assert len(said.splitlines()) == 1


def test_one_changed_number_is_damage(copied, subject, tmp_path, capsys):
    path = copied(".pt2")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert segmented(path, subject, tmp_path / "out") == (2, None)
    assert "is damaged" in capsys.readouterr().err


def contradicting(trained, **changes):
    """The metadata's strings with other values."""
    strings = trained[1].to_strings()
    return strings | {name: json.dumps(value) for name, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 2}, "in_channels cannot be used"),
        ({"out_channels": 3}, "out_channels cannot be used"),
        ({"grid": None}, "grid and patch cannot be used"),
        ({"in_channels": 2, "modalities": ["t1ce", "t1"]}, "the weights of another network"),
        ({"backbone_arguments": {"channels": [4, 6]}}, "the weights of another network"),
        ({"description": DESCRIBED | {"spacing": "1 mm"}}, "spacing.*1 mm"),
    ],
)
def test_metadata_that_contradict_the_weights_or_themselves_are_refused(
    trained, copied, changes, message
):
    path = copied(".safetensors")
    strings = contradicting(trained, **changes)
    save_weights(path, load_file(path), SimpleNamespace(to_strings=lambda: strings))
    with pytest.raises(UserError, match=rf"(?s)student\.safetensors.*{message}"):
        open_model(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"{}", b"[" * 100_000])
def test_damaged_metadata_of_a_program_are_refused(copied, tmp_path, content):
    path = rewritten(copied(".pt2"), tmp_path, content)
    with pytest.raises(UserError, match=r"other\.pt2"):
        open_model(path, trust_program=True)


def rewritten(path, folder, metadata):
    """A program with other metadata."""
    other = folder / "other.pt2"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            own = Path(name).name == "privdistill"
            target.writestr(name, metadata if own else source.read(name))
    return other


def test_a_program_is_not_opened_unless_it_is_trusted(tmp_path):
    with pytest.raises(UserError, match="can run code that its author put there"):
        open_model(tmp_path / "a.pt2")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(trained, tmp_path, monkeypatch, missing):
    def absent(name):
        if name == missing:
            raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(exported.importlib, "import_module", absent)
    with pytest.raises(UserError, match=rf"needs the package {missing}.*\./privdistill\[export\]"):
        export(tmp_path / "a.onnx", *trained)


def test_an_unknown_ending_is_refused(capsys, tmp_path):
    assert main(["--model", "m.safetensors", "--out", str(tmp_path / "a.h5")]) == 2
    assert "'.h5'" in capsys.readouterr().err


def test_the_command_says_how_far_onnx_is_from_torch(written):
    assert "logits differ from torch's by" in written(".onnx")[1]
