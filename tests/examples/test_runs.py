"""Plans, their folds and folders, and what a unit keeps."""

import importlib
import io
import itertools
import json
import os
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from filelock import FileLock
from quick import QUICK, STUDENT, TINY
from rich.console import Console

from crossval import protocol_file
from kdnet.config import parse_config
from kdnet.data.loading import start_epoch
from kdnet.data.splits import Split
from kdnet.data.subjects import ImageFile, Subject, changed_files, file_states
from kdnet.environment import git_revision
from kdnet.errors import UserError
from kdnet.evaluation.scoring import read_scores
from kdnet.files import write_json
from kdnet.recipes import recipe_of
from kdnet.rows import Row
from kdnet.runs import networks
from kdnet.runs.folder import Folder, UnitFolder, locked
from kdnet.runs.networks import build
from kdnet.runs.plan import Fold, deal, fold_of, folds_content, load_folds, make_plan, unused_text
from kdnet.runs.preparation import prepare, rehearse_rows
from kdnet.runs.subjects import DataSet, find_data
from kdnet.runs.unit import launch, opened, score
from kdnet.training.checkpoint import network_digest, save_model
from phantoms import generate_phantoms
from privdistill import GroundTruth

QUIET = Console(quiet=True)
PARTS = ("train", "validation", "test")
SUBJECTS = [Subject(f"case{i}", images={}, segmentation=None) for i in range(9)]
SMALL = [*TINY, *QUICK, "--folds", "3"]


def deal_nine(repeats=1):
    return deal(SUBJECTS, parse_config(["--folds", "3", "--validation-fraction", "0.2"]), repeats)


def test_every_subject_is_tested_once_in_each_repeat_and_repeats_differ():
    folds = deal_nine(repeats=2)
    assert [(fold.number, fold.repeat) for fold in folds] == [(n, n // 3) for n in range(6)]
    for repeat in (0, 1):
        tested = [n for fold in folds if fold.repeat == repeat for n in fold.split.test]
        assert sorted(tested) == [subject.name for subject in SUBJECTS]
    assert {f.split.test for f in folds[:3]} != {f.split.test for f in folds[3:]}


def test_written_folds_are_read_back(tmp_path):
    folds = deal_nine(repeats=2)
    (tmp_path / "folds.json").write_text(json.dumps(folds_content(folds)))
    assert load_folds(tmp_path / "folds.json", SUBJECTS) == folds


def lists(train, validation, test, **more):
    return {"train": train, "validation": validation, "test": test} | more


def write_folds(tmp_path, *folds):
    (tmp_path / "mine.json").write_text(json.dumps({"folds": list(folds)}), encoding="utf-8")
    return tmp_path / "mine.json"


def test_all_problems_of_case_lists_are_named_at_once(tmp_path):
    path = write_folds(
        tmp_path,
        lists(["case0", "case0"], ["case1"], ["case2"]),
        lists(["case3"], [], ["case2", "stranger"]),
    )
    with pytest.raises(UserError) as caught:
        load_folds(path, SUBJECTS)
    for said in ("more than once: case0", "fold 1: no", "stranger", "folds 0 and 1: .* case2"):
        caught.match(said)


def test_repeated_splits_may_test_a_subject_again(tmp_path):
    first, second = (["case0"], ["case1"], ["case2"]), (["case1"], ["case0"], ["case2"])
    path = write_folds(tmp_path, lists(*first), lists(*second, repeat=1))
    assert load_folds(path, SUBJECTS)[1] == Fold(1, 1, Split(("case1",), ("case0",), ("case2",)))


def test_the_public_splits_are_those_that_others_publish_on():
    path = protocol_file("brats2018-public")
    content = json.loads(path.read_text(encoding="utf-8"))
    names = {name for fold in content["folds"] for part in PARTS for name in fold[part]}
    everyone = [Subject(name, {}) for name in sorted(names)]
    splits = [fold.split for fold in load_folds(path, everyone)]
    assert len(names) == 285
    assert [[len(getattr(s, part)) for part in PARTS] for s in splits] == [[199, 29, 57]] * 3
    # Repeated splits, no cross-validation: what a look at the published lists finds.
    one, two, three = ({*split.test} for split in splits)
    assert (len(one & two), len(one & three), len(two & three)) == (14, 9, 14)
    assert len(one | two | three) == 137


def test_subjects_that_are_missing_are_counted_and_named_once():
    path = protocol_file("brats2018-public")
    with pytest.raises(UserError) as caught:
        load_folds(path, SUBJECTS)
    caught.match("285 of 285 subjects are not in the data set: Brats18_2013_0_1, .* and 185 more")
    names = {*re.findall(r"Brats18_\w+", path.read_text(encoding="utf-8"))}
    lost = sorted(names)[3:20]
    with pytest.raises(UserError) as caught:
        load_folds(path, [Subject(name, {}) for name in names - {*lost}])
    caught.match(f"17 of 285 subjects are not in the data set: {', '.join(lost)}$")


def test_subjects_in_no_fold_are_named(tmp_path):
    path = write_folds(tmp_path, lists(["case0"], ["case1"], ["case2"]))
    folds = load_folds(path, SUBJECTS)
    text = unused_text(folds, SUBJECTS)
    assert text.startswith("6 of 9 ")
    assert "case3" in text
    assert unused_text(folds, SUBJECTS[:3]) == ""


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{", '{"folds": []}', '{"folds": [{"train": []}]}'),
        json.dumps(lists(["case0"], ["case1"], ["case2"], unlabeled=["case3"])),
    ],
)
def test_case_lists_of_another_form_are_refused(tmp_path, content):
    (tmp_path / "mine.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.json"):
        load_folds(tmp_path / "mine.json", SUBJECTS)


def test_the_lists_of_one_fold_may_stand_alone_and_name_unlabelled_subjects(tmp_path):
    path = tmp_path / "mine.json"
    config = parse_config(["--split-file", str(path)])
    split = Split(("case0",), ("case1",), ("case2",), ("case3",))
    path.write_text(json.dumps(split.to_dict()), encoding="utf-8")
    assert fold_of(SUBJECTS, config) == Fold(0, 0, split)
    assert "unlabelled" not in replace(split, unlabelled=()).to_dict()
    path.write_text(json.dumps(folds_content(deal_nine())), encoding="utf-8")
    with pytest.raises(UserError, match="3 folds"):
        fold_of(SUBJECTS, config)


ROWS = (
    Row("teacher", role="teacher"),
    Row("student", recipe="distilled", teacher="teacher", options={"latent_weight": 0.0}),
)


def plan_nine(*options, rows=ROWS, **seeds):
    config = parse_config([*SMALL, *options])
    data = DataSet(find_data(config, QUIET).description, {one.name: one for one in SUBJECTS})
    return make_plan("crossval", "x", config, rows, deal_nine(), data=data, **seeds)


def test_units_are_rows_times_seeds_times_folds_with_teachers_first():
    plan = plan_nine(seeds={"teacher": (0, 7), "student": (0, 7)})
    assert [unit.name for unit in plan.units()] == [
        f"{row}/fold{fold}-seed{seed}"
        for row, seed, fold in itertools.product(("teacher", "student"), (0, 7), (0, 1, 2))
    ]
    assert plan.find("student/fold1-seed7") == plan.find(10)
    (teacher,) = plan.teachers_of(plan.find(10))
    assert teacher.name == "teacher/fold1-seed7"
    config = plan.configure(plan.find(10))
    assert (config.data.fold, config.training.seed, config.objective.latent_weight) == (1, 7, 0.0)


def test_the_teacher_of_the_first_seed_teaches_where_there_is_none_of_its_own():
    plan = plan_nine(seeds={"teacher": (3, 5), "student": (3, 4)})
    (teacher,) = plan.teachers_of(plan.find("student/fold0-seed4"))
    assert teacher.seed == 3


def test_teachers_without_a_part_have_the_seeds_of_the_whole_one():
    plan = plan_nine(
        "--out-of-fold", "2", "--latent-weight", "0", seeds={"teacher": (3,), "student": (3, 4)}
    )
    student = plan.find("student/fold0-seed4")
    taught = plan.teachers_of(student)
    assert len(taught) == 2
    assert {unit.seed for unit in taught} == {3}
    assert plan.with_teachers([student]) == [*taught, student]


def test_more_labels_than_there_are_are_refused_before_anything_is_written():
    with pytest.raises(UserError, match="7"):
        plan_nine(rows=(Row("few", options={"labelled": 7}),))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Three subjects; the student sees t1 and flair; a row for any subset of all modalities."""
    folder = tmp_path_factory.mktemp("runs")
    subjects = generate_phantoms(folder / "data", subjects=3, seed=0, size=16, progress=False)
    flags = ["--data-root", str(subjects), "--out", str(folder / "run")]
    config = parse_config([*flags, *SMALL, "--student-modalities", "t1,flair"])
    data = find_data(config, QUIET)
    options = {"backbone": "hemis", "backbone_arguments": {"channels": [2, 4]}}
    rows = (*ROWS, Row("any", recipe="missing_modality", role="teacher", options=options))
    folds = deal(data.foldable, config)[:1]
    plan = make_plan("crossval", "x", config, rows, folds, data=data)
    return prepare(rehearse_rows(plan, plan.units(), QUIET), plan.units(), QUIET)


def open_unit(plan, name):
    unit = plan.find(f"{name}/fold0-seed0")
    return opened(plan, unit, launch(plan.configure(unit)), QUIET)


def codes_of(loader):
    """How samples are flipped in eight epochs."""
    found = set()
    for epoch in range(8):
        start_epoch(loader, epoch)
        found |= {key.rpartition("/flip")[2] for batch in loader for key in batch["key"]}
    return found


def test_training_samples_alone_are_flipped(plan):
    with open_unit(plan, "teacher") as experiment:
        assert len(codes_of(experiment.loader("train"))) > 1
        assert codes_of(experiment.loader("validation")) == {"0"}


def label_map(folder):
    (path,) = folder.predictions.glob("*_seg.nii.gz")
    return np.asarray(nib.load(path).dataobj)


def test_a_network_for_any_subset_is_scored_on_all_and_shown_with_the_students_view(plan):
    with open_unit(plan, "any") as experiment:
        metadata = experiment.metadata()
        assert metadata.any_subset
        torch.manual_seed(0)
        save_model(experiment.folder.model, build(metadata), metadata)
        score(experiment, subsets=True)
    scores, subsets = (
        read_scores(path) for path in (experiment.folder.scores, experiment.folder.subsets)
    )
    assert {*scores["row"]} == {"any"}
    assert {*scores["modalities"]} == {"t1+flair"}
    assert subsets["modalities"].nunique() == 15
    assert {*scores["postprocessing"]} == {"on", "off"}
    assert label_map(experiment.folder).shape == (16, 16, 16)


def test_a_teacher_that_learns_more_references_than_its_student_is_refused_before_it_is_trained(
    plan, tmp_path
):
    # Whatever it is called: "teacher" is the name of its row, not what it is.
    taught = {"recipe": "distilled", "options": {"latent_weight": 0.0}}
    rows = (
        Row("t2", role="teacher"),
        Row("between", teacher="t2", labelled=1, **taught),
        Row("alike", teacher="t2", **taught),
        Row("grandchild", teacher="alike", labelled=1, **taught),
    )

    def rehearsed(*names, teacher_model=None):
        network = replace(plan.config.network, teacher_model=teacher_model)
        config = replace(plan.config, network=network)
        data = replace(config.data, validation_fraction=0.0)
        config = replace(config, data=data, run=replace(config.run, out=tmp_path / "out"))
        kept = [row for row in rows if row.name in names]
        folds = deal(plan.data.foldable, config)[:1]
        some = make_plan("crossval", "x", config, kept, folds, data=plan.data)
        return rehearse_rows(some, some.units(), QUIET).experiments

    assert {*rehearsed("t2", "alike")} == {"t2", "alike"}
    for names in (("t2", "between"), ("t2", "alike", "grandchild")):
        with pytest.raises(UserError, match=f"'{names[-1]}'.* t2, has seen 1 "):
            rehearsed(*names)
    with open_unit(plan, "teacher") as experiment:
        metadata = experiment.metadata()
    # A file does not say which of them it knows by their references.
    metadata = replace(metadata, role="student")
    every = [subject.name for subject in plan.data.foldable]
    held_out = deal(plan.data.foldable, plan.config)[0].split.test
    seen = tuple(name for name in every if name not in held_out)
    save_model(tmp_path / "m.safetensors", build(metadata), replace(metadata, seen_cases=seen))
    with pytest.raises(UserError, match=r"m\.safetensors, has seen 1 "):
        rehearsed("t2", "between", teacher_model=tmp_path / "m.safetensors")


LOSS = """
import torch.nn.functional as F
from .parts import constants
def weighted(logits, target):
    return constants.WEIGHT * F.cross_entropy(logits, target.squeeze(1).long())
"""


def test_a_loss_function_and_all_that_it_imports_from_its_folder_are_recorded(
    plan, tmp_path, monkeypatch
):
    # Folders need no __init__.py.
    folder = tmp_path / "ourlosses"
    (folder / "parts").mkdir(parents=True)
    (folder / "loss.py").write_text(LOSS)
    (folder / "parts" / "constants.py").write_text("from ourlosses.more import WEIGHT\n")
    (folder / "more.py").write_text("WEIGHT = 1\n")
    (folder / "unused.py").write_text("OTHER = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    weighted = importlib.import_module("ourlosses.loss").weighted

    def recipe(row, setting):
        return replace(recipe_of(row, setting), objective=1.0 * GroundTruth(weighted))

    monkeypatch.setattr(networks, "recipe_of", recipe)

    def sources():
        row, config = plan.row("teacher"), plan.configs["teacher"]
        return networks.rehearse(row, config, plan.data.description, None)["sources"]

    before = sources()
    own = {f"ourlosses.{name}" for name in ("loss", "parts.constants", "more")}
    assert {name for name in before if name.startswith("ourlosses")} == own
    assert {"kdnet.models.blocks", "kdnet.training.checkpoint", "privdistill.wrapper"} <= {*before}
    shown = ("kdnet.results", "kdnet.studies", "kdnet.command", "torch", "numpy")
    assert not [name for name in before if name.startswith(shown)]
    (folder / "more.py").write_text('"""Weight."""\nWEIGHT = 1  # as it was\n')
    (folder / "unused.py").write_text("OTHER = 2\n")
    assert sources() == before
    (folder / "more.py").write_text("WEIGHT = 2\n")
    assert {name for name, digest in sources().items() if digest != before[name]} == {
        "ourlosses.more"
    }
    for name in [name for name in sys.modules if name.startswith("ourlosses")]:
        sys.modules.pop(name)


def test_a_teacher_that_sees_no_more_than_its_student_is_told():
    said = io.StringIO()
    for views in (["--student-modalities", "t1,t2"], ["--teacher-modalities", "t1ce"]):
        find_data(parse_config([*SMALL, *views]), Console(file=said, width=300))
    assert said.getvalue().count("Warning") == 1
    assert "the teacher sees t1ce, and nothing" in said.getvalue()


EXPERIMENT = {
    "config": {"epochs": 2},
    "objective": "L",
    "sources": {"a": "1", "b": "2"},
    "row": {"role": "student"},
}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"config": {"epochs": 3}}, "epochs: 2 there, 3 now"),
        ({"objective": "M"}, "objective: 'L' there, 'M' now"),
        ({"sources": {"a": "1", "b": "3"}}, "sources.b: '2' there"),
        ({"row": {"role": "teacher"}}, "role: 'student' there"),
    ],
)
def test_another_experiment_in_a_units_folder_is_refused_with_what_differs(
    tmp_path, changed, named
):
    folder = UnitFolder(tmp_path)
    folder.check_experiment(EXPERIMENT)
    folder.write_record({"experiment": EXPERIMENT})
    folder.check_experiment(EXPERIMENT)
    with pytest.raises(UserError, match=named):
        folder.check_experiment(EXPERIMENT | changed)


@pytest.fixture
def subject(tmp_path):
    files = [tmp_path / name for name in ("t1.nii", "seg.nii")]
    for file in files:
        file.write_bytes(b"1234")
    return Subject("a", {"t1": ImageFile(files[0])}, ImageFile(files[1]))


@pytest.fixture
def begun(plan, tmp_path, subject):
    """A folder that began with the files of a subject, and a check of what they are now."""
    folder = Folder(tmp_path / "run")
    folder.begin(plan.config, plan.data.description)
    folder.folds.write_text(json.dumps(folds_content(plan.folds)))
    write_json(folder.states, file_states([subject]))

    def check():
        states = file_states([subject])
        folder.check_unchanged(plan.data.description, folds_content(plan.folds), states)

    return folder, check


def test_the_same_files_go_on_and_those_of_another_size_or_time_are_named(begun, subject):
    folder, check = begun
    check()
    path = subject.segmentation.path
    status = path.stat()
    path.write_bytes(b"12345")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"1 files .* changed .*: \S+seg\.nii"):
        check()
    os.utime(subject.images["t1"].path, ns=(1, 1))
    with pytest.raises(UserError, match=r"2 files .*remove \S+files\.json to go on"):
        check()
    folder.states.unlink()
    check()


def test_files_that_are_gone_or_new_are_named(begun, subject):
    before = file_states([subject])
    fresh = file_states([replace(subject, segmentation=None)])
    gone = [str(subject.segmentation.path)]
    assert changed_files(before, fresh) == changed_files(fresh, before) == gone
    subject.images["t1"].path.unlink()
    with pytest.raises(UserError, match=r"t1\.nii"):
        begun[1]()


def test_the_same_weights_are_the_same_teacher_however_their_file_is_written(tmp_path):
    model, unit = tmp_path / "model.safetensors", UnitFolder(tmp_path / "unit")
    torch.manual_seed(0)
    network = build(STUDENT)
    save_model(model, network, STUDENT)
    unit.write_record({"teachers": {"t": network_digest(model)}})
    save_model(model, network, replace(STUDENT, epoch=3))
    unit.check_teachers({"t": model})
    save_model(model, build(STUDENT), STUDENT)
    with pytest.raises(UserError, match="another network"):
        unit.check_teachers({"t": model})


def test_a_path_may_be_written_in_another_way_where_a_run_goes_on(plan, tmp_path, monkeypatch):
    root = plan.config.data.data_root
    monkeypatch.chdir(root.parent)
    relative = replace(plan.config.data, data_root=Path(root.name))
    plan.files.check_config(replace(plan.config, data=relative))
    other = replace(plan.config.data, data_root=tmp_path)
    with pytest.raises(UserError, match="data_root"):
        plan.files.check_config(replace(plan.config, data=other))


def test_a_folder_that_cannot_be_made_is_named(plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Folder(tmp_path / "file" / "run").begin(plan.config, plan.data.description)


def test_a_run_records_versions_and_seed(plan):
    content = json.loads((plan.root / "environment.json").read_text())
    assert content["versions"]["torch"]
    assert content["seed"] == 0


def test_without_git_there_is_no_revision(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None


def test_a_lock_is_waited_for_and_the_user_is_told(tmp_path):
    said, held = io.StringIO(), threading.Event()

    def hold():
        with FileLock(tmp_path / ".lock"):
            held.set()
            time.sleep(0.3)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    with locked(tmp_path / ".lock", "kdnet is trained", Console(file=said, width=200)):
        other.join(timeout=5)
        assert not other.is_alive()
    assert "kdnet is trained by another process" in said.getvalue()
