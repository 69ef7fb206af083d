import csv
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR, ReduceLROnPlateau

from kdnet.config import TrainingConfig
from kdnet.data.description import load_description
from kdnet.data.loading import build_loader
from kdnet.errors import UserError
from kdnet.stopping import StoppedError, deferring
from kdnet.training.checkpoint import ModelMetadata, load_state, read_metadata
from kdnet.training.finite import NonFiniteError
from kdnet.training.history import History, read_history
from kdnet.training.loop import build_scheduler, fit, is_finished, mean_dice
from kdnet.training.task import Task
from privdistill import DistillationWrapper, GroundTruth, PrivilegedInput

DESCRIPTION = load_description("brats2021")
GRID = (4, 4, 4)


class Samples(torch.utils.data.Dataset):
    """Random volumes; reading a chosen one calls a function first."""

    def __init__(self, count, at=None, call=None):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 4, *GRID, generator=generator)
        self.labels = torch.randint(0, 4, (count, 1, *GRID), generator=generator).byte()
        self.reads, self.at, self.call = 0, at, call

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == self.at:
            self.call(self)
        return {"image": self.images[index], "label": self.labels[index], "name": f"case{index}"}


def network():
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Dropout3d(0.3), nn.Conv3d(4, 4, 1)
    )


def task(folder, role="baseline", **settings):
    metadata = ModelMetadata(
        role=role,
        backbone="kdnet",
        backbone_arguments={},
        in_channels=1,
        out_channels=4,
        modalities=("t1ce",),
        activation="softmax",
        description=DESCRIPTION,
        crop=None,
        grid=GRID,
    )
    usual = {"epochs": 4, "batch_size": 2, "learning_rate": 0.01, "schedule": "onecycle"}
    return Task(
        metadata=metadata,
        settings=TrainingConfig(**(usual | settings)),
        folder=folder / role,
        scalars=folder / "tensorboard" / role,
        memory_format="contiguous",
        console=Console(quiet=True),
    )


def train(work, samples=None, validation=None):
    fabric = Fabric(accelerator="cpu", devices=1)
    inputs = PrivilegedInput(tuple(DESCRIPTION.modalities), student=("t1ce",))
    loaders = [
        build_loader(dataset, 2, shuffle=shuffle, seed=3, flips=shuffle, workers=0)
        for dataset, shuffle in ((samples or Samples(5), True), (validation or Samples(3), False))
    ]
    student = network()
    with DistillationWrapper(None, student, objective=GroundTruth(), inputs=inputs) as kd:
        fit(fabric, kd, *loaders, work)
    return student


def send(number):
    return lambda samples: os.kill(os.getpid(), number)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def rows_without_times(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_history(path)]


@pytest.mark.parametrize("schedule", ["onecycle", "plateau"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_resumed_run_is_the_uninterrupted_run_bit_by_bit(tmp_path, schedule, number):
    settings = {"schedule": schedule, "plateau_patience": 0, "selection": "best"}
    whole, parts = task(tmp_path / "whole", **settings), task(tmp_path / "parts", **settings)
    train(whole)
    with pytest.raises(
        StoppedError, match="2 of 4 epochs and 2 of 3 steps of the next are kept"
    ) as stop:
        train(parts, Samples(5, at=13, call=send(number)))
    assert stop.value.exit_status == 128 + number
    assert not is_finished(parts.folder)
    train(parts)
    for name in ("model.safetensors", "last.safetensors"):
        assert equal(load_file(whole.folder / name), load_file(parts.folder / name))
        assert read_metadata(whole.folder / name) == read_metadata(parts.folder / name)
    history = rows_without_times(whole.folder / "history.csv")
    assert history == rows_without_times(parts.folder / "history.csv")
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert is_finished(parts.folder)


def test_a_run_stopped_in_its_first_epoch_goes_on_inside_it(tmp_path, capsys):
    work = task(tmp_path)
    with pytest.raises(StoppedError, match=r"epoch 1 .* 0 of 4 epochs and 1 of 3 steps"):
        train(work, Samples(5, at=1, call=send(signal.SIGTERM)))
    train(work, rest := Samples(5))
    assert "baseline: continues in epoch 1, after step 1 of 3 (1 in all)" in capsys.readouterr().out
    assert rest.reads == 4 * 5 - 2  # what the first step saw is not read again
    train(whole := task(tmp_path / "whole"))
    assert equal(load_file(work.model_file), load_file(whole.model_file))


@pytest.mark.parametrize("schedule", ["onecycle", "plateau"])
def test_a_run_stopped_at_every_step_and_in_every_validation_is_the_same(tmp_path, schedule):
    """Each start takes one step, or validates one batch and is asked to stop before the next."""
    settings = {"schedule": schedule, "plateau_patience": 0, "selection": "best"}
    whole, parts = task(tmp_path / "whole", **settings), task(tmp_path / "parts", **settings)
    train(whole)
    stops = 0
    while not is_finished(parts.folder):
        stop = send(signal.SIGTERM)
        try:
            # Every other start is stopped in the training, the others in the validation.
            if stops % 2:
                train(parts, Samples(5, at=3, call=stop))
            else:
                train(parts, validation=Samples(3, at=2, call=stop))
        except StoppedError:
            stops += 1
        assert stops < 40
    assert stops == 7
    assert equal(load_file(whole.model_file), load_file(parts.model_file))
    assert equal(load_file(whole.last_file), load_file(parts.last_file))
    first, second = (rows_without_times(w.folder / "history.csv") for w in (whole, parts))
    assert first == second
    assert not parts.pause_file.exists()


def test_a_pause_of_an_older_epoch_is_not_gone_on_with(tmp_path):
    """A kill between the state of an epoch and the removal of what was kept inside it."""
    work = task(tmp_path)
    with pytest.raises(StoppedError):
        train(work, Samples(5, at=3, call=send(signal.SIGTERM)))
    old = work.pause_file.read_bytes()
    with pytest.raises(StoppedError):
        train(work, Samples(5, at=10, call=send(signal.SIGTERM)))
    assert load_state(work.state_file)["epoch"] >= 1
    work.pause_file.write_bytes(old)
    train(work)
    train(whole := task(tmp_path / "whole"))
    assert equal(load_file(work.model_file), load_file(whole.model_file))


def test_a_damaged_pause_says_what_is_left_without_it(tmp_path):
    work = task(tmp_path)
    with pytest.raises(StoppedError):
        train(work, Samples(5, at=7, call=send(signal.SIGTERM)))
    work.pause_file.write_bytes(b"half")
    with pytest.raises(UserError, match=r"pause.pt alone to go on after epoch 1"):
        train(work)
    work.pause_file.unlink()
    train(work)
    train(whole := task(tmp_path / "whole"))
    assert equal(load_file(work.model_file), load_file(whole.model_file))


@pytest.mark.parametrize("at", [7, 10])
def test_the_state_of_another_network_is_refused_with_both_descriptions(tmp_path, at):
    work = task(tmp_path)
    with pytest.raises(StoppedError):
        train(work, Samples(5, at=at, call=send(signal.SIGTERM)))
    other = replace(work.metadata, backbone="multiresunet", modalities=("t2",))
    with pytest.raises(UserError, match=r"(?s)another network.*Expected .*t2.*Found .*t1ce"):
        train(replace(work, metadata=other))


def test_a_finished_training_vouches_for_its_weights(tmp_path):
    train(work := task(tmp_path, epochs=1))
    assert is_finished(work.folder)
    content = bytearray(work.model_file.read_bytes())
    content[-1] ^= 1
    work.model_file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is not the file with which"):
        is_finished(work.folder)


def test_a_state_from_before_pauses_still_goes_on(tmp_path):
    work = task(tmp_path)
    with pytest.raises(StoppedError):
        train(work, Samples(5, at=7, call=send(signal.SIGTERM)))
    work.pause_file.unlink()
    state = load_state(work.state_file)
    state["random"] = {"cpu": state["random"]["cpu"][0], "cuda": []}
    torch.save(state, work.state_file)
    train(work)
    train(whole := task(tmp_path / "whole"))
    assert equal(load_file(work.model_file), load_file(whole.model_file))


def test_a_signal_during_the_last_validation_leaves_before_its_next_batch(tmp_path):
    work = task(tmp_path)
    with pytest.raises(StoppedError, match="3 of 4 epochs and 3 of 3 steps of the next"):
        train(work, validation=Samples(3, at=11, call=send(signal.SIGUSR1)))
    assert not is_finished(work.folder)
    train(work, rest := Samples(5))
    assert rest.reads == 0
    assert is_finished(work.folder)


def test_a_signal_during_the_very_last_batch_is_not_lost(tmp_path, monkeypatch):
    calls = []

    def dice(*arguments):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGUSR1)
        return mean_dice(*arguments)

    monkeypatch.setattr("kdnet.training.loop.mean_dice", dice)
    work = task(tmp_path)
    with pytest.raises(StoppedError, match=r"Stopped in epoch 4 .* 4 of 4 epochs are kept"):
        train(work)
    assert is_finished(work.folder)


def test_rows_after_the_last_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "history.csv"
    with History(path, tmp_path / "events", epoch=0) as history:
        for epoch in (1, 2, 3):
            history.add({"epoch": epoch, "step": epoch, "train_loss": 0.5})
    with History(path, tmp_path / "events", epoch=1) as history:
        history.add({"epoch": 2, "step": 2, "train_loss": 0.25})
    assert [row["train_loss"] for row in read_history(path)] == [0.5, 0.25]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path, value):
    def spoil(samples):
        samples.images[:] = value

    work = task(tmp_path, batch_size=2)
    with pytest.raises(NonFiniteError, match=r"baseline, epoch 2, step 4") as error:
        train(work, Samples(5, at=6, call=spoil))
    assert "voxels of t1 of case" in str(error.value)
    weights = load_file(work.folder / "last.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_best_weights_are_those_of_the_lowest_validation_loss(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 1.5])

    def scripted(*_):
        return {"validation_loss": next(losses), "validation_dice": 0.0}

    monkeypatch.setattr("kdnet.training.loop.validate", scripted)
    train(work := task(tmp_path, selection="best"))
    assert read_metadata(work.model_file).epoch == 2
    assert read_metadata(work.folder / "last.safetensors").epoch == 4


def test_last_weights_are_those_of_the_last_epoch(tmp_path):
    work = task(tmp_path, selection="last", learning_rate=0.5, schedule="constant")
    student = train(work)
    assert equal(load_file(work.model_file), dict(student.state_dict()))


def test_history_has_a_column_for_every_term(tmp_path):
    train(work := task(tmp_path, epochs=1))
    with (work.folder / "history.csv").open() as file:
        header = next(csv.reader(file))
    assert header == [
        "epoch",
        "step",
        "learning_rate",
        "seconds",
        "train_loss",
        "train_ground_truth",
        "validation_loss",
        "validation_dice",
        "validation_ground_truth",
    ]
    assert any(work.scalars.iterdir())


def test_clipping_bounds_the_step_of_plain_gradients(tmp_path):
    train(free := task(tmp_path / "free", epochs=1))
    train(bound := task(tmp_path / "bound", epochs=1, gradient_clip=1e-9))
    moved = [
        max((load_file(w.model_file)[n] - t).abs().max() for n, t in network().state_dict().items())
        for w in (free, bound)
    ]
    assert moved[1] < moved[0]


def test_plateau_multiplies_the_rate_after_the_patience():
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-4)
    scheduler = build_scheduler(optimizer, TrainingConfig(plateau_patience=2), steps=1)
    assert isinstance(scheduler, ReduceLROnPlateau)
    for loss in (1.0, 1.0, 1.0, 1.0):
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 1e-4)


@pytest.mark.parametrize(("name", "kind"), [("onecycle", OneCycleLR), ("constant", ConstantLR)])
def test_schedules_are_built_by_name(name, kind):
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = build_scheduler(optimizer, TrainingConfig(schedule=name, epochs=2), steps=3)
    assert isinstance(scheduler, kind)
    if name == "constant":
        assert optimizer.param_groups[0]["lr"] == 1e-3


def test_validation_dice_averages_regions_and_counts_empty_pairs_as_one():
    label = torch.zeros(1, 1, 2, 2, 1, dtype=torch.int64)
    label[0, 0, 0, 0] = 2  # oedema: WT has one voxel, TC and ET none
    predicted = torch.zeros_like(label)
    predicted[0, 0, 0] = 2  # two voxels, one of them right: WT Dice 2 * 1 / (2 + 1)
    logits = torch.nn.functional.one_hot(predicted[:, 0], 4).movedim(-1, 1).float()
    metadata = task(Path()).metadata
    assert mean_dice(logits, label, metadata).item() == pytest.approx((1 + 1 + 2 / 3) / 3)


def test_signals_act_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with deferring() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_that_follow_change_nothing_but_the_third_key_leaves():
    with deferring() as interruption:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert interruption.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_unfinished_state_holds_what_a_resume_needs(tmp_path):
    work = task(tmp_path)
    with pytest.raises(StoppedError):
        train(work, Samples(5, at=7, call=send(signal.SIGTERM)))
    state = load_state(work.state_file)
    assert {"weights", "optimizer", "scheduler", "random", "best", "epoch", "step"} <= state.keys()
    assert (state["epoch"], state["step"]) == (1, 3)
