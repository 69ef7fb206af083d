import json

import pytest

from kdnet.config import parse_config
from kdnet.errors import UserError
from kdnet.runs import run_folder
from kdnet.runs.run_folder import RunFolder


def test_the_same_configuration_continues_a_run(tmp_path):
    run, config = RunFolder(tmp_path / "run"), parse_config([])
    assert not run.holds(config)
    run.begin(config)
    assert run.holds(config)


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.begin(parse_config([]))
    with pytest.raises(UserError, match=r"(?s)epochs: \d+ there, 3 now\n  seed: 0 there, 5 now"):
        run.holds(parse_config(["--epochs", "3", "--seed", "5"]))


def test_a_run_from_before_an_option_existed_had_its_default(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.begin(parse_config([]))
    kept = [line for line in run.config.read_text().splitlines() if "slices" not in line]
    run.config.write_text("\n".join(kept))
    assert run.holds(parse_config([]))
    with pytest.raises(UserError, match="slices: None there, 'axial' now"):
        run.holds(parse_config(["--slices", "axial"]))


def test_keys_that_change_no_number_may_change(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.begin(parse_config([]))
    assert run.holds(parse_config(["--workers", "7", "--predictions", "false", "--out", "y"]))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder(tmp_path).holds(parse_config([]))
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder(tmp_path / "letters.txt").holds(parse_config([]))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").begin(parse_config([]))


def test_environment_records_versions_seed_and_choices(tmp_path):
    run = RunFolder(tmp_path)
    assert run.resolved() == {}
    run.write_environment(seed=3, resolved={"precision": "32-true"})
    content = json.loads(run.environment.read_text())
    assert content["versions"]["torch"]
    assert content["seed"] == 3
    assert run.resolved() == {"precision": "32-true"}


def test_outside_git_there_is_no_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "run_folder.py"))
    assert run_folder.git_revision() is None
    monkeypatch.setenv("PATH", "")
    assert run_folder.git_revision() is None


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("just words")
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        RunFolder(tmp_path).holds(parse_config([]))
