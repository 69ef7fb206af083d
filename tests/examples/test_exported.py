import numpy as np
import pytest
import torch

import exported
from data.description import load_description
from errors import UserError
from export import main
from exported import TOLERANCE, export, open_model
from models import build_network
from training.checkpoint import ModelMetadata

NETWORK = {"channels": [4, 8], "skip_connections": 1}
# What torch's exporter to ONNX says of its own parts.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    network = build_network("kdnet", NETWORK, in_channels=1, out_channels=4).eval()
    metadata = ModelMetadata(
        role="student",
        backbone="kdnet",
        backbone_arguments=NETWORK,
        in_channels=1,
        out_channels=4,
        modalities=("t1ce",),
        activation="softmax",
        description=load_description("brats2021"),
        crop=None,
        grid=(8, 8, 8),
    )
    return network, metadata


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pt2", ".onnx"])
def test_each_format_gives_the_logits_and_the_metadata(trained, tmp_path, ending):
    if ending == ".onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason="the extra export is not installed")
    network, metadata = trained
    path = tmp_path / f"student{ending}"
    export(path, network, metadata)
    module, found = open_model(path, trust_program=True)
    assert found == metadata
    for batch in (1, 3):
        image = torch.randn(batch, 1, 8, 8, 8)
        with torch.no_grad():
            np.testing.assert_allclose(module(image), network(image), atol=TOLERANCE)


def test_a_state_is_plain_weights(trained, tmp_path):
    export(tmp_path / "a.pt", *trained)
    kept = torch.load(tmp_path / "a.pt", weights_only=True)
    assert kept.keys() == trained[0].state_dict().keys()


def test_a_state_without_its_metadata_is_refused(trained, tmp_path):
    export(tmp_path / "a.pt", *trained)
    (tmp_path / "a.pt.json").unlink()
    with pytest.raises(UserError, match=r"expected a\.pt\.json beside it"):
        open_model(tmp_path / "a.pt")


def test_a_program_is_not_opened_unless_it_is_trusted(tmp_path):
    with pytest.raises(UserError, match="can run code that its author put there"):
        open_model(tmp_path / "a.pt2")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(trained, tmp_path, monkeypatch, missing):
    def absent(name):
        if name == missing:
            raise ImportError(f"No module named {name!r}")
        return

    monkeypatch.setattr(exported.importlib, "import_module", absent)
    with pytest.raises(UserError, match=rf"needs the package {missing}.*privdistill\[export\]"):
        export(tmp_path / "a.onnx", *trained)


def test_an_unknown_ending_is_refused(capsys, tmp_path):
    assert main(["--model", "m.safetensors", "--out", str(tmp_path / "a.h5")]) == 2
    assert "ends in .safetensors, .pt, .pt2, .onnx, found '.h5'" in capsys.readouterr().err


def test_the_command_says_how_far_onnx_is_from_torch(trained, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    model = tmp_path / "model.safetensors"
    export(model, *trained)
    assert main(["--model", str(model), "--out", str(tmp_path / "a.onnx")]) == 0
    assert "logits differ from torch's by" in capsys.readouterr().out
