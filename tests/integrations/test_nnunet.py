"""nnU-Net's real trainer on tiny plans: steps, checkpoints, the folder that stock nnU-Net reads."""

import json
import os
import re
import runpy
import sys
import zipfile
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch

from privdistill import (
    GroundTruth,
    LatentKL,
    LifecycleError,
    ModalityError,
    ObjectiveError,
    SoftTargetDiceBCE,
    Tap,
)

pytest.importorskip("nnunetv2", reason="the extra nnunet is not installed")

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from privdistill.integrations.nnunet import nnUNetTrainerDistillation, write_student_folder
from privdistill.integrations.nnunet import plans as nnunet_plans
from privdistill.integrations.nnunet import trainer as nnunet_trainer

pytestmark = pytest.mark.filterwarnings("default")  # of a package that is not ours

EXAMPLES = Path(__file__).parents[2] / "examples" / "nnunet"
CHANNELS = {"0": "t1", "1": "t1ce", "2": "flair"}
LABELS = {"background": 0, "oedema": 1, "core": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": [2]}
SIZE = (16, 16, 16)
SITK = {
    "spacing": (1.0,) * 3,
    "origin": (0.0,) * 3,
    "direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
}


def plans():
    conv, norm = "torch.nn.modules.conv.Conv3d", "torch.nn.modules.instancenorm.InstanceNorm3d"
    arguments = {
        "n_stages": 3,
        "features_per_stage": [4, 8, 8],
        "conv_op": conv,
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": norm,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    base = {
        "data_identifier": "nnUNetPlans_tiny",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(SIZE),
        "spacing": [1.0, 1.0, 1.0],
        "median_image_size_in_voxels": [16.0, 16.0, 16.0],
        "normalization_schemes": ["ZScoreNormalization"] * 3,
        "use_mask_for_norm": [True, False, True],
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": arguments,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    for name in ("data", "seg", "probabilities"):
        base[f"resampling_fn_{name}"] = "resample_data_or_seg_to_shape"
        base[f"resampling_fn_{name}_kwargs"] = resampling | {"is_seg": name == "seg"}
    intensities = {key: {"mean": float(key)} for key in CHANNELS}
    return {
        "dataset_name": "Dataset900_Tiny",
        "plans_name": "nnUNetPlans",
        "configurations": {"base": base, "tiny": {"inherits_from": "base"}},
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": intensities,
    }


def description(labels=LABELS):
    described = {"channel_names": CHANNELS, "labels": labels, "file_ending": ".nii.gz"}
    return described | ({"regions_class_order": [1, 2]} if labels is REGIONS else {})


def image(seed):
    """Three channels that tell the labels; but for the second one they are zero in part."""
    random = np.random.default_rng(seed)
    labels = np.zeros((1, 20, 20, 20), dtype=np.int8)
    labels[0, 6:14, 6:14, 6:14], labels[0, 8:12, 8:12, 8:12] = 1, 2
    data = random.normal(5 + labels, 0.5, (3, 20, 20, 20)).astype(np.float32)
    data[[0, 2], :2] = 0
    return data, labels


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """nnU-Net's three folders, with a data set that is preprocessed."""
    root = tmp_path_factory.mktemp("nnunet")
    base = root / "preprocessed" / "Dataset900_Tiny"
    (base / "nnUNetPlans_tiny").mkdir(parents=True)
    manager = PlansManager(plans())
    for seed in range(4):
        data, labels = image(seed)
        data, labels, properties = DefaultPreprocessor(verbose=False).run_case_npy(
            data,
            labels,
            {"spacing": [1.0] * 3, "sitk_stuff": SITK},
            manager,
            manager.get_configuration("tiny"),
            description(),
        )
        place = str(base / "nnUNetPlans_tiny" / f"case{seed}")
        save(place, data, labels, properties)
    names = [f"case{seed}" for seed in range(4)]
    split = [{"train": names[:3], "val": names[3:]}]
    (base / "splits_final.json").write_text(json.dumps(split))
    fingerprint = {"foreground_intensity_properties_per_channel": {k: {} for k in CHANNELS}}
    (base / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return root


def save(place, data, labels, properties):
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    sizes = {"chunks": data.shape, "blocks": data.shape}
    labels_sizes = {"chunks_seg": labels.shape, "blocks_seg": labels.shape}
    nnUNetDatasetBlosc2.save_case(data, labels, properties, place, **sizes, **labels_sizes)


@pytest.fixture(autouse=True)
def _settings(home, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PRIVDISTILL_", "nnUNet_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("nnUNet_preprocessed", str(home / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("PRIVDISTILL_CHANNELS", "t1ce")


def trainer(kind=nnUNetTrainerDistillation, labels=LABELS, fold=0, **changes):
    given = plans()
    given["configurations"]["tiny"] |= changes
    made = kind(
        given | {"continue_training": False}, "tiny", fold, description(labels), torch.device("cpu")
    )
    made.num_epochs, made.num_iterations_per_epoch, made.num_val_iterations_per_epoch = 1, 2, 1
    return made


def ready(*given, **changes):
    made = trainer(*given, **changes)
    made.initialize()
    return made


@pytest.fixture
def teach(monkeypatch):
    """A plain nnU-Net of all channels in its model folder, named as the teacher."""

    def make(labels=LABELS, **changes):
        plain = trainer(nnUNetTrainer, labels, **changes)
        plain.initialize()
        folder = Path(plain.output_folder_base)
        write(folder, plain.plans_manager.plans, plain.dataset_json)
        plain.my_init_kwargs["plans"].pop("continue_training", None)
        plain.logger.log("train_losses", np.float32(1), 0)
        plain._best_ema = np.float64(0.5)
        plain.save_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))
        monkeypatch.setenv("PRIVDISTILL_TEACHER", str(folder))
        return plain

    return make


def write(folder, given, dataset):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(given))
    (folder / "dataset.json").write_text(json.dumps(dataset))


def batch(trainer, channels=3, labels=LABELS):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2, channels, *SIZE, generator=generator)
    heads = 1 if labels is LABELS else 2
    target = [
        torch.randint(0, 3 if heads == 1 else 2, (2, heads, size, size, size), generator=generator)
        for size in (16, 8)
    ]
    return {"data": data, "target": [t.float() for t in target]}


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_the_plans_of_all_channels_stay_as_they_are():
    given, described = plans() | {"continue_training": False}, description()
    before = deepcopy((given, described))
    nnUNetTrainerDistillation(given, "tiny", 0, described, torch.device("cpu"))
    assert (given, described) == before


def test_a_step_moves_the_student_and_never_the_teacher(teach):
    teach()
    student = ready()
    before = weights(student.network), weights(student.kd.teacher)
    result = student.train_step(batch(student))
    after = weights(student.network), weights(student.kd.teacher)
    assert set(result) == {"loss", "nnunet", "soft_target_dice_bce"}
    assert any(not torch.equal(before[0][name], after[0][name]) for name in after[0])
    assert all(torch.equal(before[1][name], after[1][name]) for name in after[1])
    assert not student.kd.teacher.training
    assert isinstance(student.kd.teacher(batch(student)["data"]), torch.Tensor)  # one head
    assert student.network.encoder.stages[0][0].convs[0].conv.in_channels == 1


def test_the_loss_is_nnunets_and_the_teachers_by_their_shares(teach, monkeypatch):
    teach()
    monkeypatch.setenv("PRIVDISTILL_IMITATION", "0.25")
    student = ready()
    given = batch(student)
    with torch.no_grad():
        own = student.loss(student.network(given["data"][:, 1:2]), given["target"])
    result = student.train_step(given)
    assert result["nnunet"] == pytest.approx(own.item(), rel=1e-5)
    expected = 0.75 * result["nnunet"] + 0.25 * result["soft_target_dice_bce"]
    assert result["loss"] == pytest.approx(expected, rel=1e-5)
    assert list(student.kd.head_weights) == list(student.loss.weight_factors)


def test_at_imitation_0_a_step_is_nnunets_own(monkeypatch):
    monkeypatch.setenv("PRIVDISTILL_IMITATION", "0")
    student = trainer()
    torch.manual_seed(0)
    student.initialize()
    given = student.plans_manager.plans | {"continue_training": False}
    own = nnUNetTrainer(given, "tiny", 0, student.dataset_json, torch.device("cpu"))
    torch.manual_seed(0)
    own.initialize()
    given = batch(student)
    result = student.train_step(given)
    assert result == own.train_step(given | {"data": given["data"][:, 1:2]})
    assert set(result) == {"loss"}
    assert student.plans_manager.plans_name == "nnUNetPlans_t1ce_baseline"


@pytest.mark.parametrize("labels", [REGIONS, LABELS | {"ignore": 3}], ids=["regions", "ignore"])
def test_regions_and_an_ignored_reference_are_distilled(teach, labels):
    teach(labels)
    student = ready(labels=labels)
    assert student.kd.activation == ("sigmoid" if labels is REGIONS else "softmax")
    given = batch(student, labels=REGIONS if labels is REGIONS else LABELS)
    if labels is not REGIONS:
        given["target"] = [torch.full_like(target, 3) for target in given["target"]]
    result = student.train_step(given)
    assert result["soft_target_dice_bce"] > 0
    assert np.isfinite(result["loss"])


def test_a_two_dimensional_configuration_is_distilled(teach):
    flat = plans()["configurations"]["base"]["architecture"]
    arguments = flat["arch_kwargs"]
    arguments["conv_op"] = "torch.nn.modules.conv.Conv2d"
    arguments["norm_op"] = "torch.nn.modules.instancenorm.InstanceNorm2d"
    arguments["kernel_sizes"], arguments["strides"] = [[3, 3]] * 3, [[1, 1], [2, 2], [2, 2]]
    changes = {"patch_size": [16, 16], "spacing": [1.0, 1.0], "architecture": flat}
    teach(**changes)
    student = ready(**changes)
    target = [torch.randint(0, 3, (2, 1, size, size)).float() for size in (16, 8)]
    result = student.train_step({"data": torch.randn(2, 3, 16, 16), "target": target})
    assert np.isfinite(result["loss"])


def test_images_are_augmented_whole(monkeypatch):
    monkeypatch.setenv("PRIVDISTILL_IMITATION", "0")
    given, usual = [], nnUNetTrainer.get_training_transforms

    def see(*arguments, **more):
        given.append(more["use_mask_for_norm"])
        return usual(*arguments, **more)

    monkeypatch.setattr(nnUNetTrainer, "get_training_transforms", staticmethod(see))
    student = ready()
    images = next(student.get_dataloaders()[0])["data"]
    assert given == [[True, False, True]]
    assert images.shape[1] == 3


def test_validation_steps_see_the_students_channels(teach):
    teach()
    student = ready()
    given = batch(student)
    student.network.eval()
    with torch.no_grad():
        first = student.validation_step(batch(student))
        given["data"][:, [0, 2]] = torch.nan
        assert student.validation_step(given)["loss"] == first["loss"]


def test_a_compiled_student_takes_the_same_step(teach, monkeypatch):
    teach()
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        student = trainer()
        monkeypatch.setattr(student, "_do_i_compile", lambda compiled=compiled: compiled)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
            student.initialize()
        results.append(student.train_step(batch(student))["loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


class OfFeatures(nnUNetTrainerDistillation):
    """Another architecture than the teacher's, so that an adapter is trained."""

    def build_objective(self):
        return 0.5 * SoftTargetDiceBCE(temperature=2.0) + LatentKL()


def test_a_training_goes_on_with_its_adapters(teach, tmp_path):
    teach()
    narrow = plans()["configurations"]["base"]["architecture"]
    narrow["arch_kwargs"]["features_per_stage"] = [4, 8, 6]
    torch.manual_seed(0)
    first = ready(OfFeatures, architecture=narrow)
    assert len(first.kd.adapters) == 1
    trained = [weight for group in first.optimizer.param_groups for weight in group["params"]]
    assert len(trained) == len({*trained})
    assert {*trained} == {*first.kd.parameters()}
    first.train_step(batch(first))
    first.on_train_epoch_start()
    for key in ("mean_fg_dice", "ema_fg_dice"):
        first.logger.local_logger.log(key, 0.5, 0)
    first.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    again = trainer(OfFeatures, architecture=narrow)
    again.load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    assert int(again.kd.steps) == 1
    results = [t.train_step(batch(t)) for t in (first, again)]
    assert results[0] == results[1]
    for name, value in weights(first.kd).items():
        assert torch.equal(value, again.kd.state_dict()[name])


class Tapped(nnUNetTrainerDistillation):
    taps = MappingProxyType({"bottleneck": Tap("encoder.stages.1", "encoder.stages.1")})


@pytest.mark.parametrize("other", ["imitation", "encoder.stages.1", "teacher"])
def test_a_training_does_not_go_on_with_other_options(teach, tmp_path, monkeypatch, other):
    teach()
    file = str(tmp_path / "checkpoint_latest.pth")
    ready().save_checkpoint(file)
    trainer().load_checkpoint(file)
    if other == "imitation":
        monkeypatch.setenv("PRIVDISTILL_IMITATION", "0.9")
    if other == "teacher":
        torch.manual_seed(1)
        teach()
    again = trainer(Tapped if other == "encoder.stages.1" else nnUNetTrainerDistillation)
    with pytest.raises(LifecycleError, match=f"was trained with .*asked for .*{other}"):
        again.load_checkpoint(file)


CHECKPOINT = "fold_0/checkpoint_final.pth"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (CHECKPOINT, lambda whole: whole[:0]),
        (CHECKPOINT, lambda whole: whole[:100]),
        (CHECKPOINT, lambda whole: whole[:-100]),
        ("plans.json", lambda _: b""),
        ("plans.json", lambda _: b'{"a": '),
        ("dataset.json", lambda _: b"[1, 2]"),
    ],
)
def test_a_damaged_file_of_the_teacher_is_named(teach, name, damage):
    teach()
    file = Path(os.environ["PRIVDISTILL_TEACHER"]) / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(LifecycleError, match=f"{name} is damaged"):
        trainer().initialize()


def test_a_file_of_something_else_is_no_checkpoint(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(LifecycleError, match=r"other\.pth is damaged"):
        nnunet_plans.read(tmp_path / "other.pth")


@pytest.fixture
def written(teach):
    """A student's training folder after two steps of real patches, and what was written from it."""
    teach()
    student = ready()
    student.on_train_start()
    student.on_train_epoch_start()
    student.train_step(next(student.dataloader_train))
    student.current_epoch = 1
    student.on_train_end()
    return student, Path(student.output_folder_base).with_name(
        "nnUNetTrainer__nnUNetPlans_t1ce__tiny"
    )


def test_stock_nnunet_predicts_from_the_folder_that_is_written(written):
    student, folder = written
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    data, _ = image(9)
    predicted = predictor.predict_single_npy_array(data[1:2], {"spacing": [1.0] * 3})
    assert predicted.shape == data.shape[1:]
    assert predictor.trainer_name == "nnUNetTrainer"
    assert type(predictor.network).__module__.startswith("dynamic_network_architectures.")
    for name, value in student.network.state_dict().items():
        assert torch.equal(value, predictor.network.state_dict()[name])


@pytest.mark.slow
def test_a_whole_training_ends_with_a_validation_of_the_students_channels(teach, home, monkeypatch):
    itk = pytest.importorskip("SimpleITK")
    monkeypatch.setattr("nnunetv2.training.nnUNetTrainer.nnUNetTrainer.default_num_processes", 1)
    truth = home / "preprocessed" / "Dataset900_Tiny" / "gt_segmentations"
    truth.mkdir()
    itk.WriteImage(itk.GetImageFromArray(image(3)[1][0]), str(truth / "case3.nii.gz"))
    teach()
    student = trainer()
    student.run_training()
    student.perform_actual_validation()
    folder = Path(student.output_folder)
    cases = json.loads((folder / "validation" / "summary.json").read_text())["metric_per_case"]
    assert len(cases) == 1
    stand_alone = Path(student.output_folder_base).with_name(
        "nnUNetTrainer__nnUNetPlans_t1ce__tiny"
    )
    assert {path.name for path in (stand_alone / "fold_0").iterdir()} == {
        "checkpoint_best.pth",
        "checkpoint_final.pth",
    }


def test_the_folder_holds_what_belongs_to_the_students_channels(written):
    _, folder = written
    read = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    intensities = "foreground_intensity_properties_per_channel"
    assert read["dataset.json"]["channel_names"] == {"0": "t1ce"}
    assert read["plans.json"][intensities] == {"0": {"mean": 1.0}}
    assert list(read["plans.json"]["configurations"]) == ["tiny"]
    assert read["plans.json"]["configurations"]["tiny"]["use_mask_for_norm"] == [False]
    assert len(read["dataset_fingerprint.json"][intensities]) == 1
    file = folder / "fold_0" / "checkpoint_final.pth"
    assert "optimizer_state" not in torch.load(file, weights_only=True)


def test_the_folder_is_written_again_from_the_command_line(written, tmp_path, monkeypatch, capsys):
    student, folder = written
    out = tmp_path / "elsewhere"
    monkeypatch.setattr(sys, "argv", ["program", student.output_folder_base, str(out)])
    runpy.run_module("privdistill.integrations.nnunet", run_name="__main__")
    assert str(out) in capsys.readouterr().out
    assert {p.name for p in out.rglob("*")} == {p.name for p in folder.rglob("*")}


def test_a_model_that_is_not_ours_is_not_overwritten(written):
    student, folder = written
    (folder / "privdistill.json").unlink()
    with pytest.raises(LifecycleError, match=f"{folder.name} and this training are no one model"):
        student.on_train_start()


def trained_fold(kind=nnUNetTrainerDistillation, fold=0):
    """The folder of a training with one checkpoint and no step taken."""
    student = ready(kind, fold=fold)
    base = Path(student.output_folder_base)
    write(base, student.plans_manager.plans, student.dataset_json)
    (base / "dataset_fingerprint.json").write_text("{}")
    (base / f"fold_{fold}").mkdir(exist_ok=True)
    student.save_checkpoint(str(base / f"fold_{fold}" / "checkpoint_final.pth"))
    return student, base


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


class AnotherName(nnUNetTrainerDistillation):
    """The same in everything but its name."""


def test_two_trainers_do_not_share_a_folder(monkeypatch):
    monkeypatch.setenv("PRIVDISTILL_IMITATION", "0")
    _, first = trained_fold()
    other, second = trained_fold(AnotherName, fold=1)
    out = write_student_folder(first)
    before = content(out)
    said = "written_from: nnUNetTrainerDistillation__.* and AnotherName__.*TRAINED FOLDER"
    with pytest.raises(LifecycleError, match=said):
        write_student_folder(second)
    with pytest.raises(LifecycleError, match=said):
        other.on_train_start()
    assert content(out) == before
    elsewhere = write_student_folder(second, out.with_name("elsewhere"))
    assert (elsewhere / "fold_1" / "checkpoint_final.pth").is_file()


def test_folds_that_were_told_different_things_are_no_one_model(teach, monkeypatch):
    plain = teach()
    other = Path(os.environ["PRIVDISTILL_TEACHER"]) / "fold_1" / "checkpoint_final.pth"
    other.parent.mkdir()
    with torch.no_grad():
        next(plain.network.parameters()).add_(1)
    plain.save_checkpoint(str(other))
    trained_fold()
    _, base = trained_fold(fold=1)  # a fold has a teacher of its own: no difference
    out = write_student_folder(base)
    assert sorted(path.name for path in out.glob("fold_*")) == ["fold_0", "fold_1"]
    monkeypatch.setenv("PRIVDISTILL_IMITATION", "0.7")
    trained_fold(fold=1)
    with pytest.raises(LifecycleError, match=r"fold_0.* and fold_1.* imitation: 0\.5 and 0\.7"):
        write_student_folder(base, out.with_name("elsewhere"))
    with pytest.raises(LifecycleError, match=rf"{out.name} and fold_1.* imitation: 0\.5 and 0\.7"):
        write_student_folder(base, fold=1)


@pytest.mark.parametrize("broken_off", range(5))
def test_a_write_that_is_broken_off_is_mended_by_the_next(monkeypatch, broken_off):
    monkeypatch.setenv("PRIVDISTILL_IMITATION", "0")
    _, base = trained_fold()
    replace, done = Path.replace, []

    def killed(part, path):
        if len(done) == broken_off:
            os.link(part, part.with_name("left.part"))  # as if nothing could tidy up any more
            raise KeyboardInterrupt
        done.append(replace(part, path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_student_folder(base)
    out = write_student_folder(base)
    whole = write_student_folder(base, base.with_name("whole"))
    assert {p.name for p in out.rglob("*.json")} == {p.name for p in whole.rglob("*.json")}
    assert torch.load(out / "fold_0" / "checkpoint_final.pth", weights_only=True)


def test_nothing_is_written_before_everything_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("PRIVDISTILL_IMITATION", "0")
    _, base = trained_fold()
    (base / "dataset_fingerprint.json").unlink()
    with pytest.raises(LifecycleError, match="does not exist"):
        write_student_folder(base)
    assert not base.with_name("nnUNetTrainer__nnUNetPlans_t1ce_baseline__tiny").exists()
    with pytest.raises(LifecycleError, match=r"has no fold_\*/checkpoint_final\.pth"):
        write_student_folder(tmp_path / "A__B__C")


def test_nnunet_finds_the_trainer_where_users_put_it(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(EXAMPLES / "trainers"))
    found = recursive_find_trainer_class_by_name("nnUNetTrainerDistillationShort")
    assert issubclass(found, nnUNetTrainerDistillation)
    assert trainer(found).num_val_iterations_per_epoch == 1
    assert (
        recursive_find_trainer_class_by_name("nnUNetTrainerDistillation")
        is nnUNetTrainerDistillation
    )


@pytest.mark.parametrize("wanted", ["", "t2", "t1ce,t1ce", "7"])
def test_channels_that_are_not_there_are_refused(monkeypatch, wanted):
    monkeypatch.setenv("PRIVDISTILL_CHANNELS", wanted)
    with pytest.raises(ModalityError, match=r"the data set has 0 \(t1\), 1 \(t1ce\), 2 \(flair\)"):
        trainer()


def test_channels_are_given_by_number_where_names_repeat():
    dataset = {"channel_names": {"0": "noNorm", "1": "CT", "2": "noNorm"}}
    assert nnunet_plans.channel_indices(dataset, ["2", "CT"]) == [2, 1]
    with pytest.raises(ModalityError, match="give its number where names repeat"):
        nnunet_plans.channel_indices(dataset, ["noNorm"])


@pytest.mark.parametrize("share", ["1.5", "much", "nan"])
def test_a_share_that_is_none_is_refused(monkeypatch, share):
    monkeypatch.setenv("PRIVDISTILL_IMITATION", share)
    with pytest.raises(ObjectiveError, match="PRIVDISTILL_IMITATION.*" + share):
        trainer()


@pytest.mark.parametrize(
    ("folder", "said"),
    [("", "Set PRIVDISTILL_TEACHER"), ("/nowhere", r"plans\.json does not exist")],
)
def test_a_teacher_that_is_not_there_is_named(monkeypatch, folder, said):
    monkeypatch.setenv("PRIVDISTILL_TEACHER", folder)
    with pytest.raises(LifecycleError, match=said):
        trainer().initialize()


def test_a_teacher_of_another_fold_is_refused(teach):
    teach()
    with pytest.raises(LifecycleError, match=r"beside it are fold_0/checkpoint_final\.pth"):
        trainer(fold=1).initialize()


def test_a_teacher_of_other_patches_is_refused(teach):
    teach(patch_size=[16, 16, 32], spacing=[1.0, 1.0, 2.0])
    with pytest.raises(
        LifecycleError, match=r"spacing: \[1\.0, 1\.0, 2\.0\] and \[1\.0, 1\.0, 1\.0\]"
    ):
        trainer().initialize()


def test_a_teacher_that_would_run_a_program_is_refused(teach, monkeypatch, tmp_path):
    plain = teach()

    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    file = Path(os.environ["PRIVDISTILL_TEACHER"]) / "fold_0" / "checkpoint_final.pth"
    torch.save({"network_weights": Program()}, file)
    with pytest.raises(LifecycleError, match="can run any program"):
        trainer().initialize()
    plain.plans_manager.plans["configurations"]["base"]["architecture"]["network_class_name"] = (
        "os.mkdir"
    )
    plain.save_checkpoint(str(file))
    write(file.parents[1], plain.plans_manager.plans, plain.dataset_json)
    with pytest.raises(LifecycleError, match=r"build the network from os\.mkdir"):
        trainer().initialize()
    assert not (tmp_path / "ran").exists()


def test_a_teacher_that_was_trained_under_numpy_1_is_read(teach, tmp_path):
    teach()
    file = Path(os.environ["PRIVDISTILL_TEACHER"]) / "fold_0" / "checkpoint_final.pth"
    old = tmp_path / "old.pth"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                assert b"numpy.core.multiarray" in content
            target.writestr(name, content)
    assert nnunet_plans.read(old)["_best_ema"] == 0.5


def test_a_second_stage_of_a_cascade_is_refused():
    with pytest.raises(LifecycleError, match="second stage of a cascade"):
        trainer(previous_stage="base")


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(LifecycleError, match="one process"):
        trainer()


def test_a_term_that_reads_the_reference_is_refused(teach):
    class Twice(nnUNetTrainerDistillation):
        def build_objective(self):
            return SoftTargetDiceBCE() + GroundTruth()

    teach()
    with pytest.raises(ObjectiveError, match=r"GroundTruth.* its weight is 1 - imitation"):
        trainer(Twice).initialize()


def test_the_reference_page_names_what_the_trainer_has():
    page = (Path(__file__).parents[2] / "docs/reference/integrations.md").read_text("utf-8")
    section = page.partition("## nnU-Net")[2]
    lines = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    names = [cells[1].strip(" `()") for cells in lines]
    assert all(hasattr(nnUNetTrainerDistillation, name) for name in names)
    annotated = {*nnUNetTrainerDistillation.__annotations__}
    assert annotated - {*names} == {"network", "loss", "dataset_class"}
    variables = {cells[2].strip(" `") for cells in lines} - {""}
    source = Path(nnunet_trainer.__file__).read_text("utf-8")
    assert variables == {*re.findall(r"PRIVDISTILL_[A-Z]+", source)}
