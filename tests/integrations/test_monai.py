"""MONAI's real engines on tiny networks."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from privdistill import (
    DistillationWrapper,
    GroundTruth,
    HolisticAdversarial,
    LifecycleError,
    ModalityError,
    ObjectiveError,
    PrivilegedInput,
    TeacherCache,
    kdnet,
)

pytest.importorskip("ignite", reason="the extra monai is not installed")
pytest.importorskip("monai", reason="the extra monai is not installed")

from monai.data import MetaTensor
from monai.handlers import CheckpointSaver, MeanDice, from_engine
from monai.inferers import SlidingWindowInferer
from monai.transforms import AsDiscreted

from privdistill.integrations.monai import DistillationEvaluator, DistillationTrainer

MODALITIES = ("flair", "t1", "t1ce", "t2")


def samples(**more):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": MetaTensor(torch.randn(4, 8, 8, generator=generator)),
            "label": torch.randint(0, 3, (1, 8, 8), generator=generator),
            **{name: value(index) for name, value in more.items()},
        }
        for index in range(4)
    ]


def loader(batch_size=2, **more):
    return DataLoader(samples(**more), batch_size=batch_size, collate_fn=_stack)


def _stack(rows):
    return {
        name: torch.stack([row[name] for row in rows])
        if isinstance(rows[0][name], torch.Tensor)
        else [row[name] for row in rows]
        for name in rows[0]
    }


@pytest.fixture
def build(tiny_unet):
    def make(student=("t1ce",), **options):
        torch.manual_seed(0)
        usual = {
            "objective": kdnet(),
            "inputs": PrivilegedInput(MODALITIES, student=student),
            "example": torch.zeros(1, 4, 8, 8),
        }
        return DistillationWrapper(tiny_unet(4), tiny_unet(len(student)), **usual | options)

    return make


def train(kd, epochs, batches, **options):
    optimizer = torch.optim.Adam(kd.parameters(), lr=1e-2)
    trainer = DistillationTrainer("cpu", epochs, batches, kd, optimizer, **options)
    trainer.run()
    return trainer


def test_a_training_equals_the_plain_loop(build):
    trained, kd = build(), build()
    train(trained, 2, loader())
    optimizer = torch.optim.Adam(kd.parameters(), lr=1e-2)
    for batch in [*loader(), *loader()]:
        optimizer.zero_grad()
        kd(batch["image"], batch["label"]).loss.backward()
        optimizer.step()
    torch.testing.assert_close(trained.state_dict(), kd.state_dict(), rtol=0, atol=0)


def test_terms_are_metrics_of_the_epoch(build):
    kd = build()
    expected = []
    kd.register_forward_hook(lambda _, args, out: expected.append(out.terms["latent_kl"].item()))
    trainer = train(kd, 1, loader())
    names = ("loss", "soft_target_dice_bce", "ground_truth", "latent_kl")
    assert set(trainer.state.metrics) == {f"train_{name}" for name in names}
    assert trainer.state.metrics["train_latent_kl"] == pytest.approx(sum(expected) / 2)
    assert set(trainer.state.terms) == set(names)


def test_the_last_batch_weighs_as_many_samples_as_it_has(build):
    kd, losses = build(), []
    kd.register_forward_hook(lambda _, args, out: losses.append(out.loss.item()))
    trainer = train(kd, 1, loader(batch_size=3))
    mean = (3 * losses[0] + losses[1]) / 4
    assert trainer.state.metrics["train_loss"] == pytest.approx(mean)


def test_key_labelled_and_present_come_from_the_batch(build):
    cache, seen = TeacherCache(), []
    kd = build(("t1ce", "t2"), cache=cache)
    kd.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    extra = {
        "key": lambda index: f"case{index}",
        "labelled": lambda index: torch.tensor(index != 1),
        "present": lambda index: torch.tensor([True, True, True, index != 2]),
    }
    train(kd, 2, loader(**extra))
    assert seen[0]["key"] == ["case0", "case1"]
    assert seen[0]["labelled"].tolist() == [True, False]
    assert seen[1]["present"][0].tolist() == [True, True, True, False]
    assert cache.statistics.hits == 4


def dice():
    return {"val_dice": MeanDice(output_transform=from_engine(["pred", "label"]))}


def discrete():
    return AsDiscreted(keys=("pred", "label"), argmax=(True, False), to_onehot=3)


def test_an_evaluator_gives_metrics_and_terms(build):
    kd = build()
    evaluator = DistillationEvaluator(
        "cpu", loader(), kd, postprocessing=discrete(), key_val_metric=dice()
    )
    evaluator.run()
    names = {"loss", "soft_target_dice_bce", "ground_truth", "latent_kl", "dice"}
    assert set(evaluator.state.metrics) == {f"val_{name}" for name in names}
    assert kd.training
    assert kd.steps == 0


def test_with_an_inferer_the_student_runs_alone(build):
    kd = build()
    whole = DistillationEvaluator("cpu", loader(), kd, decollate=False)
    windows = DistillationEvaluator(
        "cpu", loader(), kd, decollate=False, inferer=SlidingWindowInferer((8, 8))
    )
    whole.run()
    kd.close()
    windows.run()
    assert windows.state.metrics == {}
    torch.testing.assert_close(windows.state.output["pred"], whole.state.output["pred"])


def test_present_is_refused_where_windows_of_several_images_mix(build):
    batches = loader(present=lambda index: torch.ones(4, dtype=torch.bool))
    inferer = SlidingWindowInferer((4, 4))
    evaluator = DistillationEvaluator("cpu", batches, build(), inferer=inferer)
    with pytest.raises(ModalityError, match="windows of a batch, here of 2 images"):
        evaluator.run()


def test_checkpoints_hold_no_teacher(build, tmp_path):
    kd = build()
    saver = CheckpointSaver(str(tmp_path), {"kd": kd}, save_final=True)
    train(kd, 1, loader(), train_handlers=[saver])
    (written,) = tmp_path.glob("*.pt")
    kept = torch.load(written, weights_only=True)
    assert kept.keys() == kd.state_dict().keys()
    assert not any("teacher" in name for name in kept)


def test_names_that_no_step_takes_are_refused(build):
    with pytest.raises(ObjectiveError, match="names= says where seg lies"):
        train(build(), 1, loader(), names={"seg": "label"})


def test_a_critic_is_refused(build):
    kd = build(objective=GroundTruth() + HolisticAdversarial(nn.Conv2d(4, 1, 1)))
    with pytest.raises(LifecycleError, match="DistillationTrainer: a term has a critic"):
        train(kd, 1, loader())
