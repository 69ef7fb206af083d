"""What the model file of a row says about it."""

from dataclasses import replace

import pytest
from rich.console import Console

from kdnet.config import parse_config
from kdnet.data.splits import Split
from kdnet.errors import UserError
from kdnet.rows import Row
from kdnet.runs.experiment import Experiment
from kdnet.runs.networks import build
from kdnet.runs.opening import open_experiment
from kdnet.runs.teaching import cache_place, check_unseen, describe_row
from kdnet.training.checkpoint import save_model
from phantoms import generate_phantoms

SMALL = [
    *("--backbone_arguments", '{"channels": [2, 4]}', "--grid", "8,8,8", "--threads", "1"),
    *("--performance", "plain", "--workers", "1", "--folds", "3", "--preset", "demo"),
]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    """One training, one validation and one test subject."""
    folder = tmp_path_factory.mktemp("teaching")
    subjects = generate_phantoms(folder / "data", subjects=3, seed=0, size=16, progress=False)
    flags = ["--data-root", str(subjects), "--out", str(folder / "run")]
    return open_experiment(parse_config([*flags, *SMALL]), Console(quiet=True))


def test_networks_for_any_subset_are_marked(experiment):
    hemis = Row("hemis", recipe="missing_modality", role="teacher")
    assert describe_row(experiment, hemis).any_subset
    assert not describe_row(experiment, Row("baseline")).any_subset


def test_a_student_has_seen_what_all_its_teachers_have_seen(experiment):
    own = (*experiment.split.train, *experiment.split.validation)
    taught = replace(experiment.metadata("teacher"), seen_cases=(own[0], "Elsewhere"))
    save_model(experiment.run.model("teacher"), build(taught), taught)
    student = Row("student", recipe="distilled", teacher="teacher")
    assert describe_row(experiment, student).seen_cases == (*own, "Elsewhere")
    baseline = describe_row(experiment, Row("baseline"))
    assert baseline.seen_cases == own
    assert baseline.spacing == (1, 1, 1)
    assert len(baseline.nonzero) == 1
    assert 0.1 < baseline.nonzero[0] < 0.6


def test_a_network_that_has_seen_a_held_out_subject_is_refused(experiment, tmp_path):
    metadata = experiment.metadata("student")
    check_unseen(tmp_path, metadata, experiment.split)
    with pytest.raises(UserError, match="was trained on 1 subjects of the held-out fold"):
        check_unseen(tmp_path, metadata, Split((), (), metadata.seen_cases[:1]))


def test_the_teacher_is_kept_on_a_cpu_and_runs_in_every_step_on_a_gpu():
    # benchmarks/results/gpu.json: reading what it said takes as long as hearing it again.
    assert [cache_place("auto", device) for device in ("cpu", "mps", "cuda")] == [
        "disk",
        "disk",
        "off",
    ]
    assert cache_place("memory", "cuda") == "memory"
