"""The trials of searches are stored and shown, the best first."""

import json

import pytest

from kdnet.errors import UserError
from kdnet.studies.trials import Trial, read_searches, search_folder, trials_table, write_trials

SETTINGS = {"labelled": 15, "seeds": [0, 1], "folds": [0], "options": {"latent_weight": 0.0}}
TRIALS = [
    Trial(0, {"imitation": 0.5, "imitation_start": None}, 0.25, -0.0125),
    Trial(1, {"imitation": 0.9, "imitation_start": 1.0}, 0.375, 0.1125),
]


@pytest.fixture
def root(tmp_path):
    folder = search_folder(tmp_path, "few")
    folder.mkdir()
    (folder / "search.json").write_text(json.dumps(SETTINGS))
    write_trials(folder, TRIALS)
    return tmp_path


def test_what_is_written_is_read_again_with_the_best_first(root):
    (tried,) = read_searches(root)
    assert (tried.name, tried.settings, tried.trials) == ("few", SETTINGS, TRIALS[::-1])


def test_equal_trials_keep_their_order(root):
    write_trials(search_folder(root, "few"), [Trial(n, {}, 0.5, 0.1) for n in (2, 0, 1)])
    assert [trial.number for trial in read_searches(root)[0].trials] == [0, 1, 2]


def test_the_table_shows_every_trial_in_points(root):
    shown = trials_table(read_searches(root)[0]).markdown()
    best, worst = (line for line in shown.splitlines() if line.startswith("| imitation"))
    assert best == "| imitation 0.9, imitation_start 1.0 | 1 | 0.375 | +11.2 |"
    assert worst == "| imitation 0.5, imitation_start none | 0 | 0.250 | \N{MINUS SIGN}1.2 |"
    assert "seeds 0, 1" in shown
    assert "All trials: latent_weight 0.0." in shown


def test_a_study_without_searches_has_no_trials(tmp_path):
    assert read_searches(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trials.json", "["),
        ("trials.json", '[{"number": 0}]'),
        ("trials.json", '[{"number": 0, "options": 3, "dice": 0.1, "gain": 0.1}]'),
        ("trials.json", '[{"number": 0, "options": {}, "dice": "much", "gain": 0.1}]'),
        ("search.json", "[1]"),
        ("search.json", '{"seeds": 3}'),
    ],
)
def test_damaged_files_are_one_message(root, name, content):
    (search_folder(root, "few") / name).write_text(content)
    with pytest.raises(UserError, match="are not those of a search"):
        read_searches(root)
