"""Under which name networks are scored, and which label maps are kept."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from rich.console import Console

from kdnet.config import parse_config
from kdnet.errors import UserError
from kdnet.runs.experiment import Experiment
from kdnet.runs.held_out import score_network, score_subsets, score_with
from kdnet.runs.networks import build
from kdnet.runs.opening import open_experiment
from kdnet.training.checkpoint import save_model
from phantoms import generate_phantoms

SMALL = [
    *("--backbone_arguments", '{"channels": [2, 4]}', "--grid", "8,8,8", "--threads", "1"),
    *("--performance", "plain", "--workers", "1", "--folds", "3", "--preset", "demo"),
]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    """Three subjects, one of them held out; the student sees t1 and flair, in this order."""
    folder = tmp_path_factory.mktemp("held_out")
    subjects = generate_phantoms(folder / "data", subjects=3, seed=0, size=16, progress=False)
    flags = ["--data-root", str(subjects), "--out", str(folder / "run")]
    flags += ["--student_modalities", "t1,flair"]
    return open_experiment(parse_config([*flags, *SMALL]), Console(quiet=True))


@pytest.fixture
def name(experiment, request) -> str:
    """A network of all modalities, whose file bears another name; each test has its own."""
    name = request.node.name
    metadata = replace(experiment.metadata("teacher"), role="another")
    torch.manual_seed(0)
    save_model(experiment.run.model(name), build(metadata), metadata)
    return name


def label_map(experiment, name):
    (path,) = experiment.run.predictions(name).glob("*_seg.nii.gz")
    return np.asarray(nib.load(path).dataobj)


def test_scores_and_label_maps_bear_the_name_that_was_asked_for(experiment, name):
    assert {score.role for score in score_network(experiment, name)} == {name}
    assert label_map(experiment, name).shape == (16, 16, 16)
    assert not experiment.run.predictions("another").exists()


def test_label_maps_of_subsets_are_those_of_the_students_view_alone(experiment, name):
    score_with(experiment, name, ("flair", "t1"))
    kept = label_map(experiment, name)
    scores = score_subsets(experiment, name)
    assert len({score.modalities for score in scores}) == 15
    assert np.array_equal(label_map(experiment, name), kept)
    score_network(experiment, name)
    assert not np.array_equal(label_map(experiment, name), kept)


def test_no_label_map_is_kept_of_another_view(experiment, name):
    score_with(experiment, name, ("flair", "t1", "t1ce", "t2"))
    assert not experiment.run.predictions(name).exists()


def test_a_modality_that_was_not_trained_is_refused(experiment, name):
    with pytest.raises(UserError, match="cannot be scored with pet"):
        score_with(experiment, name, ("pet",))
