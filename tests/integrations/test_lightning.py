"""Lightning's real Trainer on tiny networks."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from privdistill import (
    DistillationWrapper,
    GroundTruth,
    JointTeacher,
    LifecycleError,
    MovingAverage,
    ObjectiveError,
    PrivilegedInput,
    Ramp,
    SoftTargetDiceBCE,
    TeacherCache,
    kdnet,
)

lightning = pytest.importorskip("lightning.pytorch", reason="the extra lightning is not installed")

from torchmetrics import MetricCollection  # noqa: E402
from torchmetrics.classification import MulticlassAccuracy  # noqa: E402

from privdistill.integrations.lightning import DistillationModule  # noqa: E402

# What Lightning advises on, and torch on what Lightning calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode at the start"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
MODALITIES = ("flair", "t1", "t1ce", "t2")


class Samples(Dataset):
    """Six images with a reference, and whatever else a batch shall hold."""

    def __init__(self, **more):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(6, 4, 8, 8, generator=generator)
        self.targets = torch.randint(0, 3, (6, 8, 8), generator=generator)
        self.more = more

    def __len__(self):
        return 6

    def __getitem__(self, index):
        more = {name: value(index) for name, value in self.more.items()}
        return {"image": self.images[index], "label": self.targets[index], **more}


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


@pytest.fixture
def build(tiny_unet):
    """KD-Net's objective on tiny networks, the same in each call."""

    def make(**options):
        torch.manual_seed(0)
        usual = {
            "objective": kdnet(),
            "inputs": PrivilegedInput(MODALITIES, student=("t1ce",)),
            "example": torch.zeros(1, 4, 8, 8),
        }
        teacher = options.pop("teacher", None) or tiny_unet(4)
        student = options.pop("student", None) or tiny_unet(1)
        return DistillationWrapper(teacher, student, **usual | options)

    return make


def module(wrapper, *rest):
    return DistillationModule(wrapper, adam, *rest, names={"target": "label"})


def trainer(folder, epochs, **options):
    usual = {
        "accelerator": "cpu",
        "max_epochs": epochs,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "default_root_dir": folder,
    }
    return lightning.Trainer(**usual | options)


def loader(shuffle=False, **more):
    return DataLoader(Samples(**more), batch_size=2, shuffle=shuffle)


def weights(trained):
    return {name: value.clone() for name, value in trained.state_dict().items()}


def test_the_last_batch_weighs_as_many_samples_as_it_has(build, tmp_path):
    kd, losses = build(), []
    kd.register_forward_hook(lambda _, args, out: losses.append(out.loss.item()))
    fit = trainer(tmp_path, 1)
    fit.validate(module(kd), DataLoader(Samples(), batch_size=4), verbose=False)
    expected = (4 * losses[0] + 2 * losses[1]) / 6
    assert fit.callback_metrics["val/loss"].item() == pytest.approx(expected)


def accuracy(logits, target):
    return (logits.argmax(1) == target).float().mean()


def every(name):
    return {
        "function": {"accuracy": accuracy},
        "single function": accuracy,
        "values by name": lambda *given: {"accuracy": accuracy(*given)},
        "torchmetric": {"accuracy": MulticlassAccuracy(3, average="micro")},
        "collection": MetricCollection({"accuracy": MulticlassAccuracy(3, average="micro")}),
    }[name]


@pytest.mark.parametrize("name", ["function", "single function", "values by name", "torchmetric"])
@pytest.mark.parametrize("run", ["validate", "test"])
def test_metrics_see_the_logits_that_the_loss_saw(build, tmp_path, name, run):
    kd, calls = build(), []
    kd.student.register_forward_hook(lambda *_: calls.append(1))
    measured = DistillationModule(kd, adam, names={"target": "label"}, metrics=every(name))
    fit = trainer(tmp_path, 1)
    getattr(fit, run)(measured, loader(), verbose=False)
    assert len(calls) == 3
    data = Samples()
    expected = accuracy(kd.predict(data.images), data.targets)
    stage = "val" if run == "validate" else "test"
    torch.testing.assert_close(fit.callback_metrics[f"{stage}/accuracy"], expected)
    assert len(measured.output.student) == 2


def test_a_collection_is_computed_over_all_loaders_and_anew_in_each_epoch(build, tmp_path):
    logged = []

    class Log(lightning.Callback):
        def on_validation_end(self, trainer, module):
            logged.append(trainer.callback_metrics["val/accuracy"])

    metrics = every("collection")
    measured = DistillationModule(build(), adam, names={"target": "label"}, metrics=metrics)
    fit = trainer(tmp_path, 2, callbacks=[Log()])
    fit.fit(measured, loader(), [loader(), DataLoader(Samples(), batch_size=6)])
    data = Samples()
    expected = accuracy(measured.kd.predict(data.images), data.targets)
    torch.testing.assert_close(logged[-1], expected)
    assert not metrics["accuracy"].update_called
    assert not any("accuracy" in name for name in measured.state_dict())


def test_metrics_never_see_the_reference_of_an_unlabelled_sample(build, tmp_path):
    seen = []

    def see(logits, target):
        seen.append((len(logits), target))
        return 0.0

    measured = DistillationModule(build(), adam, names={"target": "label"}, metrics=see)
    trainer(tmp_path, 1).validate(
        measured, loader(labelled=lambda index: torch.tensor(index == 1)), verbose=False
    )
    ((count, target),) = seen
    assert count == 1
    assert torch.equal(target[0], Samples().targets[1])


def test_the_objective_and_the_inputs_reach_the_logger(build, tmp_path):
    logger = lightning.loggers.CSVLogger(tmp_path)
    trainer(tmp_path, 1, logger=logger, log_every_n_steps=1).fit(module(build), loader())
    assert "LatentKL" in logger.experiment.hparams["objective"]
    assert "student t1ce" in logger.experiment.hparams["inputs"]


def test_weights_and_options_of_every_term_are_hyper_parameters(build):
    soft = Ramp(0, 1, steps=5) * SoftTargetDiceBCE(temperature=4.0)
    objective = soft + 0.25 * GroundTruth(nn.CrossEntropyLoss()).named("metrics")
    terms = module(build(objective=objective)).hparams["terms"]
    assert terms["soft_target_dice_bce"]["weight"] == "Ramp(0, 1, steps=5)"
    assert terms["soft_target_dice_bce"]["temperature"] == 4.0
    assert terms["metrics"]["weight"] == 0.25
    assert "loss" not in terms["metrics"]


class Scripted:
    """A metric that is best in the second epoch."""

    def __init__(self):
        self.values = iter([0.1, 0.9, 0.5])

    def __call__(self, logits, target): ...

    def update(self, logits, target): ...

    def reset(self): ...

    def compute(self):
        return next(self.values)


def test_a_checkpoint_is_chosen_by_a_metric(build, tmp_path):
    metrics = {"dice": Scripted()}
    measured = DistillationModule(build(), adam, names={"target": "label"}, metrics=metrics)
    saver = lightning.callbacks.ModelCheckpoint(tmp_path, monitor="val/dice", mode="max")
    options = {"enable_checkpointing": True, "num_sanity_val_steps": 0, "callbacks": [saver]}
    trainer(tmp_path, 3, **options).fit(measured, loader(), loader())
    assert saver.best_model_score == pytest.approx(0.9)
    assert torch.load(saver.best_model_path, weights_only=True)["epoch"] == 1


def test_a_training_equals_the_plain_loop(build, tmp_path):
    trained, fit = module(build()), trainer(tmp_path, 2)
    fit.fit(trained, loader(), loader())
    names = ("loss", "soft_target_dice_bce", "ground_truth", "latent_kl")
    assert {f"val/{name}" for name in names} <= set(fit.callback_metrics)
    assert {f"train/{name}_epoch" for name in names} <= set(fit.callback_metrics)
    kd = build()
    optimizer = adam(kd.parameters())
    for batch in [*loader(), *loader()]:
        optimizer.zero_grad()
        kd(batch["image"], batch["label"]).loss.backward()
        optimizer.step()
    torch.testing.assert_close(trained.kd.state_dict(), kd.state_dict(), rtol=0, atol=0)


def test_schedules_and_averages_count_steps_of_the_optimizer(tiny_unet, tmp_path):
    def make():
        torch.manual_seed(0)
        objective = GroundTruth() + Ramp(0, 1, steps=5) * SoftTargetDiceBCE()
        return DistillationWrapper(MovingAverage(0.5), tiny_unet(4), objective=objective)

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    trained = DistillationModule(make(), sgd, names={"target": "label"})
    trainer(tmp_path, 2, accumulate_grad_batches=2).fit(trained, loader(), loader())
    kd = make()
    optimizer = sgd(kd.parameters())
    batches = list(loader())
    for window in [batches[:2], batches[2:]] * 2:  # the last one of an epoch is shorter
        for batch in window:
            out = kd(batch["image"], batch["label"], advance=batch is window[-1])
            (out.loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert trained.kd.steps == 4
    torch.testing.assert_close(trained.kd.state_dict(), kd.state_dict(), rtol=0, atol=0)


def test_a_validation_before_the_training_leaves_the_check_of_targets(build, tmp_path):
    images = torch.rand(4, 4, 8, 8)
    grey = 255 * torch.randint(0, 2, (4, 3, 8, 8)).float()
    wrong = DataLoader([{"image": i, "label": t} for i, t in zip(images, grey, strict=True)])
    with pytest.raises(ObjectiveError, match="255"):
        trainer(tmp_path, 1, num_sanity_val_steps=2).fit(module(build()), wrong, loader())


def dropping(build, tiny_unet):
    """Whatever a step may take from the past: dropout, a schedule, a balance, an optimizer."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Dropout(0.3), tiny_unet(1))
    objective = (GroundTruth() + Ramp(0, 1, steps=20) * SoftTargetDiceBCE()).balanced()
    return module(
        build(student=student, objective=objective),
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )


def test_a_training_that_goes_on_from_a_checkpoint_is_the_same(build, tiny_unet, tmp_path):
    def run(epochs, start=None):
        trained = dropping(build, tiny_unet)
        fit = trainer(tmp_path, epochs)
        fit.fit(trained, loader(shuffle=True), loader(), ckpt_path=start)
        fit.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return weights(trained)

    whole = run(3)
    run(2)
    torch.rand(7)
    torch.testing.assert_close(run(3, tmp_path / "2.ckpt"), whole, rtol=0, atol=0)


@pytest.mark.parametrize("later", [False, True])
def test_lightnings_own_checkpoints_give_back_the_student_and_hold_no_teacher(
    build, tmp_path, later
):
    saver = lightning.callbacks.ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True)
    names, metrics = {"target": "label"}, MulticlassAccuracy(3)
    trained = DistillationModule(build(), adam, names=names, metrics=metrics)
    fit = trainer(tmp_path, 2, enable_checkpointing=True, callbacks=[saver])
    fit.fit(trained, loader(), loader())
    again = DistillationModule.load_from_checkpoint(
        saver.last_model_path, wrapper=build if later else build(), optimizer=adam, names=names
    )
    torch.testing.assert_close(again.kd.state_dict(), trained.kd.state_dict(), rtol=0, atol=0)
    assert saver.best_model_score == fit.callback_metrics["val/loss"]
    kept = torch.load(saver.last_model_path, weights_only=True)["state_dict"]
    assert set(kept) == {f"kd.{name}" for name in trained.kd.state_dict()}
    assert not any("teacher" in name for name in kept)


def test_a_function_builds_the_wrapper_once(build, tmp_path):
    calls = []

    def make():
        calls.append(1)
        return build()

    trained = module(make)
    fit = trainer(tmp_path, 1)
    fit.fit(trained, loader())
    fit.validate(trained, loader(), verbose=False)
    assert len(calls) == 1
    assert trained.kd.steps == 3


def test_labelled_present_and_key_come_from_the_batch(build, tiny_unet, tmp_path):
    cache = TeacherCache()
    only = PrivilegedInput(MODALITIES, student=("t1ce", "t2"))
    seen = []
    kd = build(cache=cache, inputs=only, student=tiny_unet(2))
    kd.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    extra = {
        "key": lambda index: f"case{index}",
        "labelled": lambda index: torch.tensor(index != 1),
        "present": lambda index: torch.tensor([True, True, True, index != 2]),
    }
    trainer(tmp_path, 2).fit(module(kd), loader(**extra))
    assert seen[0]["key"] == ["case0", "case1"]
    assert seen[0]["labelled"].tolist() == [True, False]
    assert seen[1]["present"][0].tolist() == [True, True, True, False]
    assert cache.statistics.hits == 6


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision_plugins(build, tmp_path, precision):
    trained = module(build())
    fit = trainer(tmp_path, 1, precision=precision)
    fit.fit(trained, loader())
    assert fit.callback_metrics["train/loss_epoch"].isfinite()
    expected = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    for network in (trained.kd.student, trained.kd.teacher):
        assert next(network.parameters()).dtype == expected[precision]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_precision_plugins_on_a_gpu(build, tmp_path, precision):
    trained = module(build())
    before, teacher = weights(trained.kd.student), weights(trained.kd.teacher)
    fit = trainer(tmp_path, 3, accelerator="gpu", devices=1, precision=precision)
    fit.fit(trained, loader(), loader())
    assert fit.callback_metrics["val/loss"].isfinite()
    after = {name: value.cpu() for name, value in trained.kd.student.state_dict().items()}
    assert not any(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(trained.kd.cpu().teacher.state_dict(), teacher, rtol=0, atol=0)


def test_a_teacher_that_learns_is_trained_and_goes_back_to_train_mode(build, tiny_unet, tmp_path):
    objective = kdnet() + GroundTruth(of="teacher").named("teacher")
    trained = module(build(teacher=JointTeacher(tiny_unet(4)), objective=objective))
    before = [weight.clone() for weight in trained.kd.teacher.parameters()]
    trainer(tmp_path, 1).fit(trained, loader(), loader())
    assert trained.kd.teacher.training
    assert not all(map(torch.equal, before, trained.kd.teacher.parameters()))


def test_present_is_found_by_its_name_in_prediction(build, tiny_unet, tmp_path):
    kd = build(
        inputs=PrivilegedInput(MODALITIES, student=("t1ce", "t2")),
        student=tiny_unet(2),
    )
    has = torch.tensor([True, True, True, False])
    named = DistillationModule(kd, adam, names={"target": "label", "present": "has"})
    batches = loader(has=lambda index: has)
    (first, *_) = trainer(tmp_path, 1).predict(named, batches)
    images = next(iter(batches))["image"]
    expected = kd.predict(images, present=has.expand(2, -1))
    torch.testing.assert_close(first, expected)
    assert not torch.equal(first, kd.predict(images))


def test_a_test_and_several_loaders_of_validation(build, tmp_path):
    trained = module(build())
    trained.kd.student.encoder.eval()
    fit = trainer(tmp_path, 1)
    fit.fit(trained, loader(), [loader(), loader()])
    assert {"val/loss/dataloader_idx_0", "val/loss/dataloader_idx_1"} <= set(fit.callback_metrics)
    (tested,) = fit.test(trained, loader(), verbose=False)
    (validated,) = fit.validate(trained, loader(), verbose=False)
    assert tested["test/loss"] == validated["val/loss"]
    assert len(fit.predict(trained, [loader(), loader()])) == 2
    assert trained.kd.student.head.training
    assert not trained.kd.student.encoder.training
    assert not trained.kd.teacher.training


def test_what_is_no_wrapper_or_no_argument_is_refused(build, tmp_path):
    for wrapper in (nn.Conv2d(1, 2, 1), "kd.pt"):
        with pytest.raises(LifecycleError, match=f"is a {type(wrapper).__name__}"):
            DistillationModule(wrapper, adam)
    with pytest.raises(LifecycleError, match="network is a Conv2d"):
        trainer(tmp_path, 1).fit(DistillationModule(lambda: nn.Conv2d(1, 2, 1), adam), loader())
    with pytest.raises(ObjectiveError, match="names= says where label lies in a batch"):
        DistillationModule(build(), adam, names={"label": "target"})


@pytest.mark.parametrize("argument", ["optimizer", "scheduler", "metrics"])
def test_what_cannot_be_called_is_refused_before_the_training(build, argument):
    kd = build()
    made = torch.optim.Adam(kd.parameters())
    wrong = {
        "optimizer": made,
        "scheduler": torch.optim.lr_scheduler.StepLR(made, 1),
        "metrics": [adam],
    }[argument]
    with pytest.raises(ObjectiveError, match=f"is a {type(wrong).__name__}"):
        DistillationModule(kd, **({"optimizer": adam} | {argument: wrong}))


def test_a_batch_may_say_that_it_has_no_reference(build, tmp_path):
    fit = trainer(tmp_path, 1)
    nothing = loader(labelled=lambda index: torch.tensor(False))
    fit.fit(DistillationModule(build(), adam), nothing)
    assert "train/latent_kl_epoch" in fit.callback_metrics
    assert "train/ground_truth_epoch" not in fit.callback_metrics


@pytest.mark.slow
def test_two_processes_equal_one_on_the_joined_batch(build, tmp_path):
    def run(batch_size, **options):
        names = {"target": "label"}
        trained = DistillationModule(build(), lambda p: torch.optim.SGD(p, 0.1), names=names)
        # All samples in one step: Lightning shuffles what it spreads over processes.
        fit = trainer(tmp_path, 3, **options)
        fit.fit(trained, DataLoader(Samples(), batch_size=batch_size))
        return weights(trained)

    double = run(3, strategy="ddp_fork", devices=2)
    torch.testing.assert_close(double, run(6), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_two_processes_go_on_from_a_checkpoint_as_if_they_had_not_stopped(build, tmp_path):
    def run(epochs, start=None):
        trained = module(build())
        saver = lightning.callbacks.ModelCheckpoint(tmp_path / f"{epochs}", filename="end")
        two = {"strategy": "ddp_fork", "devices": 2, "precision": "bf16-mixed"}
        if start is None:
            two |= {"enable_checkpointing": True, "callbacks": [saver]}
        fit = trainer(tmp_path, epochs, **two)
        fit.fit(trained, DataLoader(Samples(), batch_size=3), ckpt_path=start)
        return weights(trained)

    whole = run(3)
    run(2)
    torch.testing.assert_close(run(3, tmp_path / "2" / "end.ckpt"), whole, rtol=0, atol=0)
