"""A model file of a stranger: what it may ask for, and that nothing of it runs."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from quick import STUDENT
from safetensors.torch import load_file

import predict
import train
from invented_runs import scores_of
from kdnet.config import NetworkConfig
from kdnet.errors import UserError
from kdnet.evaluation.scoring import write_scores
from kdnet.models import NETWORKS, build_network
from kdnet.models.trust import HARMLESS, check_trusted
from kdnet.results.cost import cost_table
from kdnet.results.stored import read_folder
from kdnet.training.checkpoint import load_model, read_metadata, save_weights

#: Nested too deeply for a parser of JSON.
DEEP = "[" * 100_000
CANARY = """
import pathlib
pathlib.Path({mark!r}).write_text("imported")
from torch import nn
class Net(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.layer = nn.Conv3d(in_channels, out_channels, 1)
    def forward(self, x):
        return self.layer(x)
def call(**words):
    pathlib.Path({mark!r}).write_text("called")
"""


def metadata(backbone="kdnet", arguments=None):
    arguments = arguments or {}
    return replace(STUDENT, role="teacher", backbone=backbone, backbone_arguments=arguments)


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A module that leaves a mark when it is imported, and a file that asks for its class."""
    mark = tmp_path / "mark"
    (tmp_path / "canary.py").write_text(CANARY.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "canary", raising=False)

    def write(backbone="canary.Net", arguments=None):
        path = tmp_path / "model.safetensors"
        weights = {"layer.weight": torch.zeros(4, 1, 1, 1, 1), "layer.bias": torch.zeros(4)}
        save_weights(path, weights, metadata(backbone, arguments))
        return path

    yield write, mark
    sys.modules.pop("canary", None)


def test_a_foreign_network_is_refused_before_its_module_is_imported(hostile):
    write, mark = hostile
    with pytest.raises(UserError, match=r"'canary\.Net'.*--trust-backbone canary\.Net"):
        load_model(write())
    assert not mark.exists()
    assert "canary" not in sys.modules
    # Who vouches for a class gets it.
    network, _ = load_model(write(), trusted=["canary.Net"])
    assert type(network).__name__ == "Net"
    assert mark.read_text() == "imported"


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "subprocess.Popen", "canary.call"])
def test_a_function_is_never_called_even_if_somebody_vouches_for_it(hostile, name):
    write, mark = hostile
    with pytest.raises(UserError, match="asks for the network"):
        load_model(write(name))
    with pytest.raises(UserError, match=r"not a subclass of torch\.nn\.Module"):
        load_model(write(name), trusted=[name])
    assert not mark.exists() or mark.read_text() == "imported"


@pytest.mark.parametrize("part", ["segmenter", "generator"])
def test_a_network_inside_a_network_is_looked_at_too(hostile, part):
    write, mark = hostile
    nested = {"synthesised": 1, part: "canary.Net"}
    with pytest.raises(UserError, match=r"'canary\.Net'"):
        load_model(write("synthesis", nested))
    deeper = {"segmenter": "synthesis", "segmenter_arguments": nested}
    with pytest.raises(UserError, match=r"'canary\.Net'"):
        load_model(write("synthesis", deeper))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("timm_unet", {"encoder": "hf-hub:stranger/model"}),
        ("timm_unet", {"encoder": "local-dir:/tmp/model"}),
        ("monai.networks.nets.UNet", {"act": ["PRELU", {"url": "http://example.org"}]}),
        ("synthesis", {"segmenter_arguments": {"weights": "../other"}, "segmenter": "kdnet"}),
    ],
)
def test_arguments_that_reach_for_files_or_addresses_are_refused(name, arguments):
    with pytest.raises(UserError, match="may be a path, an address or a model of a hub"):
        check_trusted("model", name, arguments)
    check_trusted("model", name, arguments, trusted=[name, "kdnet"])


def test_own_networks_and_those_of_monai_need_no_word():
    for name in HARMLESS:
        check_trusted("model", name, {"channels": [4, 8], "norm": "INSTANCE"})
    small = {"channels": [2, 4], "strides": [2], "spatial_dims": 3}
    build_network("monai.networks.nets.UNet", small, in_channels=1, out_channels=2)


def test_every_network_that_is_called_harmless_exists():
    import monai.networks.nets

    foreign = HARMLESS - {*NETWORKS}
    assert all(hasattr(monai.networks.nets, name.rpartition(".")[2]) for name in foreign)


def test_predict_refuses_and_takes_the_users_word(hostile, tmp_path, refusal):
    write, mark = hostile
    command = ["--model", write(), "--input", tmp_path / "none", "--out", tmp_path]
    assert "--trust-backbone canary.Net" in refusal(predict, *command)
    assert not mark.exists()
    trusted = refusal(predict, *command, "--trust_backbone", "canary.Net")
    assert "found nothing there" in trusted
    assert mark.exists()


def test_training_refuses_the_file_of_a_teacher_before_it_is_built(hostile, tmp_path, refusal):
    write, mark = hostile
    command = ["--teacher-model", write(), "--out", tmp_path / "run", "--phantoms", "6"]
    assert "asks for the network 'canary.Net'" in refusal(train, *command)
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


def test_a_report_leaves_out_what_a_foreign_network_costs(hostile, tmp_path):
    write, mark = hostile
    root = tmp_path / "crossval"
    unit = root / "units" / "mine" / "fold0-seed0"
    unit.mkdir(parents=True)
    write().rename(unit / "model.safetensors")
    plan = {"kind": "crossval", "title": "x", "rows": [{"name": "mine"}]}
    (root / "plan.json").write_text(json.dumps(plan))
    write_scores(root / "scores.csv", scores_of("mine", {"a": 0.5}))
    table = cost_table(read_folder(root))
    assert table.frame.empty
    assert "mine: " in table.notes[-1]
    assert "--trust-backbone canary.Net" in table.notes[-1]
    assert not mark.exists()


def test_a_configuration_vouches_for_what_it_names_itself():
    network = NetworkConfig(backbone="my.Net", trust_backbone=("their.Net",))
    assert network.vouched(own=True) == {"my.Net", "their.Net"}
    synthesis = replace(network, backbone="synthesis", backbone_arguments={"segmenter": "my.Other"})
    assert synthesis.vouched(own=True) == {"synthesis", "my.Other", "their.Net"}
    assert synthesis.vouched(own=False) == {"my.Other", "their.Net"}


def described_as(path, **strings):
    """Whoever writes other metadata writes their digests, too."""
    every = metadata().to_strings() | strings
    save_weights(path, load_file(path), SimpleNamespace(to_strings=lambda: every))
    return path


@pytest.mark.parametrize(
    "strings",
    [
        *({"in_channels": value} for value in ("many", -1, True)),
        *({"modalities": value} for value in (["pet"], "t1ce")),
        *({"grid": value} for value in ([16, 16], [16, 0, 16], [2**15, 2**15, 1])),
        *({"crop": value} for value in (4, [10**30, 1, 1])),
        *({"slices": value} for value in ("oblique", [1])),
        *({"normalise": "never"}, {"resample": "cubic"}),
        *({"patch": [2**10, 2**10, 2**10]}, {"activation": {}}, {"backbone": ["kdnet"]}),
        *({"backbone_arguments": "x"}, {"seen_cases": [1]}, {"orientation": 3}),
        {"backbone_arguments": DEEP},
    ],
    ids=lambda strings: str(strings)[:60],
)
def test_entries_that_make_no_sense_are_told(hostile, strings):
    write, _ = hostile
    strings = {key: v if v == DEEP else json.dumps(v) for key, v in strings.items()}
    with pytest.raises(UserError, match=r"its metadata|another network"):
        load_model(described_as(write("kdnet"), **strings))


def test_a_larger_volume_can_be_allowed(hostile, monkeypatch):
    write, _ = hostile
    path = described_as(write("kdnet"), grid=json.dumps([2**10, 2**10, 2**10]))
    with pytest.raises(UserError, match=r"536,870,912 voxels .*PRIVDISTILL_LARGEST_VOLUME"):
        read_metadata(path)
    monkeypatch.setenv("PRIVDISTILL_LARGEST_VOLUME", str(2**30))
    assert read_metadata(path).grid == (2**10, 2**10, 2**10)
