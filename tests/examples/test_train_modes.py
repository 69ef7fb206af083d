"""train.py with a teacher of another kind, with patches of whole volumes, and with slices."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from quick import QUICK
from safetensors.torch import load_file
from written import write_subject

import faulty_training
import predict
import train
from faulty_training import MODALITIES, Samples, case, send
from kdnet.config import DataConfig, ObjectiveConfig, parse_config
from kdnet.data.description import load_description
from kdnet.data.samples import (
    FixedPatches,
    FreePatches,
    plane_remark,
    samples_per_subject,
)
from kdnet.evaluation.inference import predict_volume
from kdnet.evaluation.scoring import read_scores
from kdnet.models import KDNet, build_network
from kdnet.recipes.kdnet import bottleneck, student_objective
from kdnet.rows import Row
from kdnet.runs.folder import Folder
from kdnet.runs.networks import build, describe_network, rehearse
from kdnet.stopping import StoppedError
from kdnet.training.checkpoint import read_metadata
from kdnet.training.history import read_history
from kdnet.training.loop import mean_dice
from privdistill import DistillationWrapper, GroundTruth, PrivilegedInput

SIZES = (12, 20, 14, 18, 16, 15)
SMALL = [
    *("--backbone-arguments", '{"channels": [2, 4, 8]}', "--threads", "1", "--workers", "1"),
    *("--epochs", "1", "--folds", "3", "--accelerator", "cpu"),
]
PATCHES = [*SMALL, "--preset", "native", "--augment", "false", "--patch", "16,16,16"]


@pytest.fixture
def subjects(tmp_path) -> Path:
    """Six subjects of several sizes, some smaller than a patch."""
    for number, size in enumerate(SIZES):
        write_subject(tmp_path / "data" / f"BraTS2021_{number:05d}", size=size)
    return tmp_path / "data"


def run(subjects, out, *options):
    assert train.main(["--data-root", str(subjects), "--out", str(out), *options]) == 0
    return lambda role: Folder(out).unit(f"{role}/fold0-seed0")


def label_maps(folder):
    return {path.name: nib.load(path).get_fdata() for path in folder.glob("*.nii.gz")}


def assert_predict_agrees(found, subjects, out):
    """The model file alone must be enough to predict what the run predicted."""
    model = str(found("student").model)
    assert predict.main(["--model", model, "--input", str(subjects), "--out", str(out)]) == 0
    again = label_maps(out)
    maps = label_maps(found("student").predictions)
    assert len(maps) == 2
    for name, volume in maps.items():
        assert np.array_equal(volume, again[name.replace("_seg", "_t1ce_seg")])
    return maps


@pytest.mark.usefixtures("training_alone")
def test_patches_of_volumes_of_several_sizes(subjects, tmp_path, capsys):
    found = run(subjects, tmp_path / "run", *PATCHES, "--teacher-cache", "disk")
    assert (
        "Teacher cache: off, as augmented samples, and patches at new positions"
        in capsys.readouterr().out
    )
    assert "teacher_cache" not in found("student").read_record()
    metadata = read_metadata(found("student").model)
    assert (metadata.patch, metadata.grid, metadata.crop) == ((16, 16, 16), None, None)
    for name, volume in assert_predict_agrees(found, subjects, tmp_path / "maps").items():
        assert volume.shape == (SIZES[int(name.split("_")[1])],) * 3
    assert len(read_scores(tmp_path / "run" / "scores.csv")) == 3 * 2 * 3 * 3
    assert "validation_dice" in read_history(found("student").history)[0]


@pytest.mark.usefixtures("training_alone")
def test_the_cache_of_fixed_patches_keeps_its_limit(subjects, tmp_path):
    options = ["--patches-per-case", "2", "--teacher-cache", "memory", "--epochs", "2"]
    limit = ["--teacher-cache-gib", "0.0002", "--flips", "false", "--predictions", "false"]
    found = run(subjects, tmp_path / "run", *PATCHES, *options, *limit)
    counts = found("student").read_record()["teacher_cache"]
    assert 0 < counts["bytes"] <= 0.0002 * 2**30
    assert counts["hits"] > 0
    # Three subjects of two patches, one of three in the validation, twice.
    assert counts["hits"] + counts["misses"] == 2 * (3 * 2 + 3)


@pytest.mark.usefixtures("training_alone")
def test_slices_of_a_grid(subjects, tmp_path):
    options = [*SMALL, "--grid", "12,16,8", "--crop", "12,12,12", "--slices", "axial"]
    found = run(subjects, tmp_path / "run", *options, *QUICK)
    metadata = read_metadata(found("teacher").model)
    assert metadata.input_size == (12, 16)
    assert metadata.backbone_arguments["spatial_dims"] == 2
    maps = assert_predict_agrees(found, subjects, tmp_path / "maps")
    assert {volume.ndim for volume in maps.values()} == {3}
    (cases,) = json.loads((tmp_path / "run" / "folds.json").read_text())["folds"]
    counts = found("student").read_record()["teacher_cache"]
    # Eight slices of each, all of which hold brain.
    assert counts["hits"] + counts["misses"] == 8 * len(cases["train"] + cases["validation"])


def test_objective_is_equation_five_and_terms_of_weight_zero_cost_nothing():
    terms = student_objective(ObjectiveConfig()).named_terms
    weights = {name: weight.factor for name, (weight, _) in terms.items()}
    assert weights == {"soft_target_dice_bce": 0.75, "ground_truth": 0.25, "latent_kl": 10.0}
    alone = student_objective(ObjectiveConfig(imitation=0, latent_weight=0)).named_terms
    assert list(alone) == ["ground_truth"]


def test_imitation_may_rise_while_the_reference_counts_less():
    options = ObjectiveConfig(imitation_start=0.5, imitation_steps=10)
    terms = student_objective(options).named_terms.values()
    for step, expected in ((0, [0.5, 0.5, 10.0]), (10, [0.75, 0.25, 10.0])):
        assert [float(weight.at(torch.tensor(step))) for weight, _ in terms] == expected


def distil_once(teacher, student, options=None):
    options = options or ObjectiveConfig()
    objective = student_objective(options)
    inputs = PrivilegedInput(MODALITIES, student=("t1ce",))
    kd = DistillationWrapper(
        teacher,
        student,
        objective=objective,
        inputs=inputs,
        taps=bottleneck(options, student, objective, teacher),
        example=torch.zeros(1, 4, 16, 16, 16),
    )
    target = torch.zeros(2, 16, 16, 16, dtype=torch.long)
    kd(torch.randn(2, 4, 16, 16, 16), target).loss.backward()
    return kd


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("multiresunet", {"filters": [4, 8, 16]}),
        ("monai.networks.nets.SegResNet", {"init_filters": 8}),
        ("kdnet", {"channels": [2, 4]}),
    ],
)
def test_a_student_of_another_kind_gets_an_adapter_and_learns(name, arguments):
    teacher = KDNet(4, 4, channels=(2, 4, 8))
    student = build_network(name, arguments, in_channels=1, out_channels=4)
    with distil_once(teacher, student) as kd:
        assert "bottleneck" in kd.adapters
        assert all(weight.grad is not None for weight in kd.adapters.parameters())
        assert all(weight.grad is None for weight in teacher.parameters())


FOREIGN = torch.nn.Sequential(torch.nn.Conv3d(1, 1, 1))
OWN = KDNet(1, 2, channels=(2, 4))


@pytest.mark.parametrize(
    ("layers", "teacher", "tap"),
    [
        (("auto", "auto"), FOREIGN, ("bottleneck", None)),
        (("auto", "encoder.0"), FOREIGN, ("bottleneck", "encoder.0")),
        (("encoder.1", "auto"), FOREIGN, ("encoder.1", None)),
        # Networks of one kind share the layer that is named.
        (("encoder.0", "auto"), KDNet(4, 2, channels=(4, 8)), ("encoder.0", "encoder.0")),
    ],
)
def test_each_side_names_its_own_layer(layers, teacher, tap):
    options = ObjectiveConfig(bottleneck_layer=layers[0], teacher_bottleneck_layer=layers[1])
    found = bottleneck(options, OWN, student_objective(options), teacher)["bottleneck"]
    assert (found.student, found.teacher) == tap
    assert bottleneck(options, OWN, 1.0 * GroundTruth()) == {}


def test_several_latent_layers_share_the_weight_whatever_they_are_called():
    options = ObjectiveConfig(latent_layers=("encoder.0", "bottleneck"), latent_weight=10.0)
    objective = student_objective(options)
    assert [str(weight) for weight, _ in objective.named_terms.values()].count("5") == 2
    kd = distil_once(KDNet(4, 2, channels=(2, 4)), KDNet(1, 2, channels=(2, 4)), options)
    assert all(weight.grad is not None for weight in kd.student.encoder[0].parameters())
    assert [*bottleneck(options, kd.student, objective)] == ["layer_encoder_0", "bottleneck"]


@pytest.mark.usefixtures("training_alone")
def test_a_trained_teacher_may_be_of_any_kind(subjects, tmp_path, capsys):
    options = [*SMALL, "--teacher-backbone", "multiresunet", *QUICK]
    options += ["--teacher-backbone-arguments", '{"filters": [4, 8]}', "--grid", "8,8,8"]
    options += ["--crop", "12,12,12", "--predictions", "false"]
    found = run(subjects, tmp_path / "run", *options)
    assert read_metadata(found("teacher").model).backbone == "multiresunet"
    given = [*options, "--teacher-model", str(found("teacher").model), "--slices", "axial"]
    given += ["--data-root", str(subjects), "--out", str(tmp_path / "other")]
    assert train.main(given) == 2
    assert "differs in slices" in capsys.readouterr().err


class Volumes(Samples):
    """Random volumes of several sizes; reading a chosen one sends a signal first."""

    def __init__(self, count, at=None):
        super().__init__(count, at, send(signal.SIGTERM))
        generator = torch.Generator().manual_seed(1)
        self.images = [torch.randn(4, 6 + n, 7, 8, generator=generator) for n in range(count)]
        self.labels = [(image[:1] > 0).byte() for image in self.images]


def patch_task(folder):
    task = case(folder, epochs=3)
    metadata = replace(task.metadata, grid=None, patch=(4, 4, 4))
    return replace(task, metadata=metadata, volumes=Volumes(2))


def train_on_patches(task, at=None):
    torch.manual_seed(0)
    free = FreePatches(Volumes(4, at), (4, 4, 4))
    fixed = FixedPatches(Volumes(2), (4, 4, 4), 3, seed=0)
    return faulty_training.train(task, free, fixed, moves=True)


def test_a_resumed_training_sees_the_patches_of_an_uninterrupted_one(tmp_path):
    whole, parts = patch_task(tmp_path / "whole"), patch_task(tmp_path / "parts")
    train_on_patches(whole)
    with pytest.raises(StoppedError, match="1 of 3 epochs and 1 of 2 steps of the next are kept"):
        train_on_patches(parts, at=6)
    train_on_patches(parts)
    expected, found = (load_file(task.folder.last) for task in (whole, parts))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_dice_of_the_validation_is_that_of_whole_volumes(tmp_path):
    task = patch_task(tmp_path)
    kd = DistillationWrapper(None, train_on_patches(task).eval(), objective=GroundTruth())
    dice = []
    for item in map(task.volumes.__getitem__, range(2)):
        logits = predict_volume(kd.predict, item["image"][None, 2:3], patch=(4, 4, 4))
        dice.append(mean_dice(logits, item["label"][None].long(), task.metadata))
    row = read_history(task.folder.history)[-1]
    assert row["validation_dice"] == pytest.approx(float(torch.stack(dice).mean()), abs=1e-6)


def test_slices_of_another_plane_than_their_name_says_are_told():
    free = DataConfig(patch=(8, 8, 8))
    axial = DataConfig(slices="axial")
    assert plane_remark(axial, "RAS") is None
    assert plane_remark(free, "PSR") is None
    assert "axes are PSR: the slices are not axial" in plane_remark(axial, "PSR")


def test_an_epoch_takes_one_sample_per_subject_patch_or_slice():
    assert samples_per_subject(DataConfig(), (8, 9, 7)) == 1
    assert samples_per_subject(DataConfig(slices="coronal"), (8, 9, 7)) == 9
    assert samples_per_subject(DataConfig(patch=(4, 4, 4)), None) == 1
    assert samples_per_subject(DataConfig(patch=(4, 4, 4), patches_per_case=5), None) == 5


def test_rows_of_the_teachers_role_train_the_network_that_they_name():
    config = parse_config([*SMALL, "--teacher-backbone", "multiresunet"])
    for options, expected in (
        ({}, ("multiresunet", {})),
        ({"backbone_arguments": {"alpha": 2.0}}, ("multiresunet", {"alpha": 2.0})),
        ({"backbone": "hemis"}, ("hemis", {})),
    ):
        network = Row("teacher", role="teacher", options=options).configure(config).network
        assert network.of("teacher") == expected
    assert Row("baseline").configure(config).network.of("student")[0] == "kdnet"


PHANTOM = load_description(Path("phantom"))


def test_what_segments_beside_a_synthesis_is_two_dimensional_too():
    config = parse_config([*SMALL, *QUICK, "--slices", "axial"])
    row = Row("synthesised", recipe="synthesised", options={"backbone": "synthesis"})
    network = build(describe_network("student", row.configure(config), PHANTOM))
    assert network(torch.zeros(1, 1, 16, 16)).shape == (1, 4, 16, 16)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_prior_makes_three_regions_rare_or_three_classes_beside_the_background(activation):
    config = parse_config([*SMALL, "--activation", activation])
    arguments = {"channels": [2, 4], "prior": 0.01}
    own = Row("baseline", options={"backbone_arguments": arguments}).configure(config)
    bias = build(describe_network("student", own, PHANTOM)).head.bias
    assert int((bias < -4).sum()) == 3


def test_of_a_synthesis_the_segmenter_alone_has_the_prior():
    arguments = ["--backbone-arguments", '{"channels": [2, 4], "prior": 0.01}']
    config = parse_config([*SMALL, "--activation", "softmax", *arguments])
    row = Row("synthesised", recipe="synthesised", options={"backbone": "synthesis"})
    network = build(describe_network("student", row.configure(config), PHANTOM))
    assert int((network.segmenter.head.bias < -4).sum()) == 3
    assert network.generator.head.bias.abs().max() < 1


@pytest.mark.parametrize(("view", "made"), [("t1ce", 1), ("flair", 3)])
def test_a_synthesis_makes_as_many_modalities_as_are_privileged(view, made):
    options = {"backbone": "synthesis", "student_modalities": [view]}
    row = Row("synthesised", recipe="synthesised", options=options)
    own = row.configure(parse_config(SMALL))
    assert build(describe_network("student", own, PHANTOM)).synthesised == made
    rehearse(row, own, PHANTOM, None)
