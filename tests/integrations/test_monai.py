"""MONAI's real engines on tiny networks."""

import inspect
import math
import os

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.utils.data import DataLoader

from privdistill import (
    DistillationWrapper,
    LifecycleError,
    ObjectiveError,
    PrivilegedInput,
    TeacherCache,
    kdnet,
)

pytest.importorskip("ignite", reason="the extra monai is not installed")
pytest.importorskip("monai", reason="the extra monai is not installed")

import ignite.distributed as idist
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
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


@pytest.mark.skipif(
    "accumulation_steps" not in inspect.signature(SupervisedTrainer).parameters,
    reason="MONAI accumulates gradients from 1.6 on",
)
@pytest.mark.parametrize(("accumulation", "steps"), [(1, 3), (2, 2), (3, 1), (4, 1)])
def test_schedules_count_steps_of_the_optimizer(build, accumulation, steps):
    kd, taken = build(), []
    optimizer = torch.optim.SGD(kd.parameters(), lr=1e-2)
    optimizer.register_step_post_hook(lambda *_: taken.append(int(kd.steps)))
    batches = [*loader(), *loader(batch_size=4)]
    DistillationTrainer(
        "cpu", 2, batches, kd, optimizer, accumulation_steps=accumulation, decollate=False
    ).run()
    assert taken == list(range(1, 2 * steps + 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", [False, True])
def test_engines_train_and_validate_on_a_gpu(build, amp):
    kd = build().to("cuda")
    before = {name: value.clone() for name, value in kd.student.state_dict().items()}
    optimizer = torch.optim.Adam(kd.parameters(), lr=1e-2)
    trainer = DistillationTrainer("cuda", 3, loader(), kd, optimizer, amp=amp)
    trainer.run()
    evaluator = DistillationEvaluator("cuda", loader(), kd, amp=amp)
    evaluator.run()
    assert {len(trainer.state.metrics), len(evaluator.state.metrics)} == {4}
    assert all(map(math.isfinite, evaluator.state.metrics.values()))
    after = kd.student.state_dict()
    assert not any(torch.equal(after[name], before[name]) for name in before)


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


def test_a_batch_without_a_term_does_not_count_for_it(build):
    kd, values = build(), []
    kd.register_forward_hook(lambda _, args, out: values.append(out.terms.get("ground_truth")))
    (first, second) = loader()
    bare = {"image": second["image"], "labelled": torch.zeros(2, dtype=torch.bool)}
    trainer = train(kd, 1, [first, bare])
    assert values[1] is None
    assert trainer.state.metrics["train_ground_truth"] == pytest.approx(values[0].item())


def test_means_are_over_the_samples_of_all_processes(build, monkeypatch):
    # Another process, with two samples more, whose loss is one, and without another term.
    def others(table):
        return table + torch.tensor([[2.0, 2.0], *[[0.0, 0.0]] * (len(table) - 1)])

    kd, losses = build(), []
    kd.register_forward_hook(lambda _, args, out: losses.append(out.loss.item()))
    monkeypatch.setattr(idist, "all_reduce", others)
    trainer = train(kd, 1, loader())
    assert trainer.state.metrics["train_loss"] == pytest.approx((2 * sum(losses) + 2) / 6)


def _part(rank, folder, kd):
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun does
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    try:
        evaluator = DistillationEvaluator(
            "cpu", [[*loader(batch_size=3)][rank]], kd, decollate=False
        )
        evaluator.run()
        torch.save(evaluator.state.metrics, folder / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_metrics_of_one(build, tmp_path):
    # One has a batch of three, the other one of a single sample.
    kd = build()
    whole = DistillationEvaluator("cpu", loader(batch_size=3), kd, decollate=False)
    whole.run()
    multiprocessing.start_processes(_part, (tmp_path, kd), nprocs=2, start_method="fork")
    for rank in range(2):
        part = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert part == pytest.approx(whole.state.metrics)


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


def test_with_an_inferer_each_image_of_a_batch_keeps_its_own_present(build):
    has = torch.tensor([[True] * 4, [True, True, True, False]])
    batches = loader(present=lambda index: has[index % 2])
    kd = build(("t1ce", "t2"))
    evaluator = DistillationEvaluator(
        "cpu", batches, kd, inferer=SlidingWindowInferer((8, 8)), decollate=False
    )
    evaluator.run()
    image = [*batches][-1]["image"]
    torch.testing.assert_close(evaluator.state.output["pred"], kd.predict(image, present=has))


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


@pytest.mark.parametrize("names", [None, {}, {"image": "image"}])
def test_the_target_is_called_label_unless_it_is_named(build, names):
    trainer = train(build(), 1, loader(), names=names)
    assert "train_ground_truth" in trainer.state.metrics


def _called_seg():
    return [{"image": batch["image"], "seg": batch["label"]} for batch in loader()]


def test_a_reference_that_is_not_found_is_refused(build):
    with pytest.raises(ObjectiveError, match="target"):
        train(build(), 1, _called_seg())
    with pytest.raises(ObjectiveError, match="target"):
        DistillationEvaluator("cpu", _called_seg(), build()).run()
    named = train(build(), 1, _called_seg(), names={"target": "seg"})
    assert "train_ground_truth" in named.state.metrics


@pytest.mark.parametrize("inferer", [None, SlidingWindowInferer((8, 8))])
def test_outputs_are_called_as_the_batch_calls_them(build, inferer):
    batches = [{"scan": b["image"], "seg": b["label"], "label": "a"} for b in loader()]
    names = {"image": "scan", "target": "seg"}
    dice = MeanDice(output_transform=from_engine(["pred", "seg"]))
    evaluator = DistillationEvaluator(
        *("cpu", batches, build()),
        names=names,
        inferer=inferer,
        postprocessing=AsDiscreted(keys=("pred", "seg"), argmax=(True, False), to_onehot=3),
        key_val_metric={"val_dice": dice},
    )
    evaluator.run()
    assert 0 < evaluator.state.metrics["val_dice"] < 1
    trainer = train(build(), 1, batches, names=names, decollate=False)
    for engine in (evaluator, trainer):
        found = engine.state.output if engine is trainer else engine.state.output[0]
        assert {"scan", "seg", "pred"} <= set(found)
        assert "image" not in found


def test_with_an_inferer_no_reference_is_needed(build):
    inferer = SlidingWindowInferer((8, 8))
    batches = _called_seg()
    evaluator = DistillationEvaluator("cpu", batches, build(), inferer=inferer, decollate=False)
    evaluator.run()
    assert evaluator.state.output["pred"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("option", ["prepare_batch", "loss_function"])
def test_options_that_the_wrapper_stands_in_for_are_not_taken(build, option):
    with pytest.raises(TypeError, match=option):
        train(build(), 1, loader(), **{option: print})
    with pytest.raises(TypeError, match=option):
        DistillationEvaluator("cpu", loader(), build(), **{option: print})


def test_a_network_that_is_no_wrapper_is_refused():
    with pytest.raises(LifecycleError, match="network is a Conv2d"):
        train(nn.Conv2d(1, 2, 1), 1, loader())
    with pytest.raises(LifecycleError, match="network is a Conv2d"):
        DistillationEvaluator("cpu", loader(), nn.Conv2d(1, 2, 1))


def test_a_compiled_wrapper_is_taken_for_one(build):
    compiled = torch.compile(build(), backend="eager")
    evaluator = DistillationEvaluator("cpu", loader(), compiled)
    assert evaluator.network is compiled
