import csv
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import faulty_training
from faulty_training import Samples, case, equal, losses, send, weights, wrapper
from kdnet.config import TrainingConfig
from kdnet.errors import UserError
from kdnet.stopping import StoppedError
from kdnet.training.checkpoint import Means, is_finished, load_state, read_metadata
from kdnet.training.history import Journal, read_history
from kdnet.training.loop import add_terms, build_scheduler, mean_dice
from privdistill import Output


def network():
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Dropout3d(0.3), nn.Conv3d(4, 4, 1)
    )


def train(work, samples=None, validation=None, **options):
    """With dropout, so that random numbers count."""
    return faulty_training.train(work, samples, validation, kd=wrapper(network()), **options)


@pytest.mark.parametrize("schedule", ["onecycle", "plateau"])
def test_a_run_stopped_at_every_step_and_in_every_validation_is_the_same(tmp_path, schedule):
    """Each start takes one step, or validates one batch and is asked to stop before the next."""
    settings = {"schedule": schedule, "plateau_patience": 0, "selection": "best"}
    whole, parts = case(tmp_path / "whole", **settings), case(tmp_path / "parts", **settings)
    train(whole)
    stops, stop = 0, send(signal.SIGTERM)
    while not is_finished(parts.folder):
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
    assert equal(weights(whole), weights(parts))
    assert losses(whole) == losses(parts)
    assert read_metadata(whole.folder.model) == read_metadata(parts.folder.model)
    assert not parts.folder.pause.exists()


def test_a_pause_of_an_older_epoch_is_not_gone_on_with(tmp_path):
    """A kill between the state of an epoch and the removal of what was kept inside it."""
    work = case(tmp_path)
    with pytest.raises(StoppedError):
        train(work, Samples(5, at=3, call=send(signal.SIGTERM)))
    old = work.folder.pause.read_bytes()
    with pytest.raises(StoppedError):
        train(work, Samples(5, at=10, call=send(signal.SIGTERM)))
    assert load_state(work.folder.state)["epoch"] >= 1
    work.folder.pause.write_bytes(old)
    train(work)
    train(whole := case(tmp_path / "whole"))
    assert equal(weights(work), weights(whole))


def test_a_damaged_pause_says_what_is_left_without_it(tmp_path):
    work = case(tmp_path)
    with pytest.raises(StoppedError):
        train(work, Samples(5, at=7, call=send(signal.SIGTERM)))
    work.folder.pause.write_bytes(b"half")
    with pytest.raises(UserError, match=r"remove pause.safetensors alone"):
        train(work)
    work.folder.pause.unlink()
    train(work)
    train(whole := case(tmp_path / "whole"))
    assert equal(weights(work), weights(whole))


@pytest.mark.parametrize("schedule", ["onecycle", "plateau"])
@pytest.mark.parametrize("at", [7, 11])
def test_a_run_goes_on_with_another_number_of_steps_in_an_epoch(tmp_path, schedule, at):
    """As with another number of devices: the schedule counts epochs, and so does the state."""
    work = case(tmp_path, schedule=schedule, plateau_patience=2)
    with pytest.raises(StoppedError):
        train(work, Samples(5, at=at, call=send(signal.SIGTERM)))
    train(work, batch=1)
    epochs = [(row["epoch"], row["step"]) for row in losses(work)]
    done = (at - 1) // 5
    assert epochs == [(e, 3 * min(e, done) + 5 * max(0, e - done)) for e in (1, 2, 3, 4)]
    train(other := case(tmp_path / "other", schedule=schedule, plateau_patience=2), batch=1)
    rates = [[row["learning_rate"] for row in losses(w)][done:] for w in (work, other)]
    if schedule == "onecycle":
        assert rates[0] == pytest.approx(rates[1])


@pytest.mark.parametrize("at", [7, 10])
def test_the_state_of_another_network_is_refused_with_both_descriptions(tmp_path, at):
    work = case(tmp_path)
    with pytest.raises(StoppedError):
        train(work, Samples(5, at=at, call=send(signal.SIGTERM)))
    other = replace(work.metadata, backbone="multiresunet", modalities=("t2",))
    with pytest.raises(UserError, match=r"(?s)another network.*Expected .*t2.*Found .*t1ce"):
        train(replace(work, metadata=other))


def test_a_finished_training_vouches_for_its_weights(tmp_path):
    train(work := case(tmp_path, epochs=1))
    assert is_finished(work.folder)
    content = bytearray(work.folder.model.read_bytes())
    content[-1] ^= 1
    work.folder.model.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is not the file with which"):
        is_finished(work.folder)


def test_a_signal_during_the_last_validation_leaves_before_its_next_batch(tmp_path):
    work = case(tmp_path)
    with pytest.raises(StoppedError, match="3 of 4 epochs and 3 of 3 steps of the next"):
        train(work, validation=Samples(3, at=11, call=send(signal.SIGUSR1)))
    assert not is_finished(work.folder)
    train(work, rest := Samples(5))
    assert rest.reads == 0
    assert is_finished(work.folder)


def test_a_signal_during_the_very_last_batch_is_not_lost(tmp_path, monkeypatch):
    calls = iter(range(1, 9))

    def dice(*arguments):
        if next(calls) == 8:
            send(signal.SIGUSR1)()
        return mean_dice(*arguments)

    monkeypatch.setattr("kdnet.training.loop.mean_dice", dice)
    work = case(tmp_path)
    with pytest.raises(StoppedError, match=r"Stopped in epoch 4 .* 4 of 4 epochs are kept"):
        train(work)
    assert is_finished(work.folder)


def test_best_weights_are_those_of_the_lowest_validation_loss(tmp_path, monkeypatch):
    scripted = iter([3.0, 1.0, 2.0, 1.5])

    def validate(*_):
        return {"validation_loss": next(scripted), "validation_dice": 0.0}

    monkeypatch.setattr("kdnet.training.loop.validate", validate)
    train(work := case(tmp_path, selection="best"))
    assert read_metadata(work.folder.model).epoch == 2
    assert read_metadata(work.folder.last).epoch == 4


@pytest.mark.parametrize("measured", ["ground_truth", "objective"])
def test_the_validation_loss_may_be_that_against_the_reference_alone(tmp_path, measured):
    work = case(tmp_path, epochs=1, validation_loss=measured)
    faulty_training.train(work, kd=wrapper(teacher=faulty_training.network(channels=4)))
    (row,) = losses(work)
    alone = row["validation_loss"] == row["validation_ground_truth"]
    assert alone == (measured == "ground_truth")


def test_last_weights_are_those_of_the_last_epoch(tmp_path):
    work = case(tmp_path, selection="last", learning_rate=0.5, schedule="constant")
    student = train(work)
    assert equal(load_file(work.folder.model), dict(student.state_dict()))


@pytest.mark.parametrize("logger", ["tensorboard", "csv"])
def test_rows_after_the_last_checkpoint_are_dropped_and_curves_go_on(tmp_path, logger):
    work = replace(case(tmp_path, logger=logger), options={"temperature": 1.5})
    for done, rows in ((0, [(1, 0.5), (2, 0.5), (3, 0.5)]), (1, [(2, 0.25)])):
        journal = Journal(work, epoch=done, steps=1)
        with journal.open():
            for epoch, loss in rows:
                journal.epoch({"epoch": epoch, "step": epoch, "train_loss": loss})
    losses = [row["train_loss"] for row in read_history(work.folder.history)]
    assert losses == [0.5, 0.25]
    if logger == "tensorboard":
        events = list(work.folder.curves.glob("events*"))
        assert len(events) == 2
        assert all(b"temperature: 1.5" in path.read_bytes() for path in events)
        return
    with (work.folder.curves / "version_1" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (float(row["train/loss"]), int(row["step"])) == (0.25, 2)


def write_two_epochs(work):
    journal = Journal(work, epoch=0, steps=1)
    with journal.open():
        for epoch in (1, 2):
            journal.epoch({"epoch": epoch, "step": epoch, "train_loss": 1 / epoch})


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_one_message_before_the_first_step(
    tmp_path, name, monkeypatch
):
    monkeypatch.setitem(sys.modules, "lightning.pytorch.loggers", None)
    with pytest.raises(UserError, match=rf"--logger {name} .*lightning {name}.*tensorboard or csv"):
        train(case(tmp_path, logger=name), samples := Samples(5))
    assert samples.reads == 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_of_wandb_ends_with_its_training(tmp_path, fails, monkeypatch):
    named, ended = [], []

    def logger(name, save_dir):
        named.append(name)
        run = SimpleNamespace(finish=ended.append)
        log = (lambda *_: 1 / 0) if fails else (lambda *_: None)
        nothing = SimpleNamespace(log_hyperparams=lambda _: None, finalize=lambda status: None)
        return SimpleNamespace(experiment=run, log_metrics=log, **vars(nothing))

    loggers = SimpleNamespace(WandbLogger=logger)
    monkeypatch.setitem(sys.modules, "lightning.pytorch.loggers", loggers)
    work = case(tmp_path / "teacher", role="fold0-seed0", logger="wandb")
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        write_two_epochs(work)
    assert named == ["teacher/fold0-seed0"]
    assert ended == [int(fails)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_each_training_is_a_run_of_its_own(tmp_path, name, monkeypatch):
    package = pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("kdnet.training.history._TRACKING_URI", None)
    works = [
        replace(case(tmp_path / role, logger=name), options={"temperature": 1.5})
        for role in ("teacher", "student")
    ]
    for work in works:
        write_two_epochs(work)
    for work in works:
        if name == "wandb":
            assert len([*work.folder.curves.rglob("*.wandb")]) == 1
            continue
        client = package.MlflowClient(f"sqlite:///{work.folder.curves}/mlflow.db")
        (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
        losses = client.get_metric_history(run.info.run_id, "train/loss")
        assert [(entry.step, entry.value) for entry in losses] == [(1, 1.0), (2, 0.5)]
        assert run.data.params == {"temperature": "1.5"}


def test_a_term_that_reads_the_reference_is_averaged_over_labelled_samples():
    means, kd = Means(), wrapper()
    for value, labelled in ((1.0, [True, False]), (4.0, [True, True])):
        loss = torch.tensor(value)
        out = Output(loss, {"ground_truth": loss}, torch.zeros(2, 4), None, {})
        add_terms(means, kd, out, torch.tensor(labelled))
    row = means.reduce(Fabric(accelerator="cpu", devices=1), "train_")
    assert row == {"train_loss": 2.5, "train_ground_truth": pytest.approx((1 + 2 * 4) / 3)}


def test_clipping_bounds_the_step_of_plain_gradients(tmp_path):
    train(free := case(tmp_path / "free", epochs=1))
    train(bound := case(tmp_path / "bound", epochs=1, gradient_clip=1e-9))
    moved = [
        max(
            (load_file(w.folder.model)[n] - t).abs().max()
            for n, t in network().state_dict().items()
        )
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


def test_validation_dice_averages_regions_and_counts_empty_pairs_as_one():
    label = torch.zeros(1, 1, 2, 2, 1, dtype=torch.int64)
    label[0, 0, 0, 0] = 2  # oedema: WT has one voxel, TC and ET none
    predicted = torch.zeros_like(label)
    predicted[0, 0, 0] = 2  # two voxels, one of them right: WT Dice 2 * 1 / (2 + 1)
    logits = torch.nn.functional.one_hot(predicted[:, 0], 4).movedim(-1, 1).float()
    dice = mean_dice(logits, label, case(Path()).metadata)
    assert dice.item() == pytest.approx((1 + 1 + 2 / 3) / 3)
