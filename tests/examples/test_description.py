"""Descriptions of data sets: what YAML may say, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from kdnet.data.description import DATASETS_FOLDER, Description, load_description
from kdnet.errors import UserError

BRATS = load_description("brats2021")
BUILT_IN = sorted(path.stem for path in DATASETS_FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_shipped_description_survives_json(name):
    description = load_description(Path(name))
    assert Description.from_dict(json.loads(json.dumps(description.to_dict()))) == description


@pytest.mark.parametrize("name", ["brats2018", "brats2021", "brats2023", "msd_task01", "phantom"])
def test_brats_descriptions_share_modalities_classes_and_regions(name):
    description = load_description(Path(name))
    assert tuple(description.modalities) == ("flair", "t1", "t1ce", "t2")
    assert description.regions == {"ET": (3,), "TC": (1, 3), "WT": (1, 2, 3)}
    assert list(description.regions) == ["ET", "TC", "WT"]


def test_label_four_becomes_three_and_four_again_on_export():
    assert BRATS.labels == {0: 0, 1: 1, 2: 2, 4: 3}
    assert BRATS.export_labels == {0: 0, 1: 1, 2: 2, 3: 4}
    assert replace(BRATS, labels={0: 0, 1: 1, 5: 1, 2: 2, 4: 3}).export_labels[1] == 1
    # In the decathlon, 1 and 2 stand the other way round.
    assert load_description(Path("msd_task01")).export_labels == {0: 0, 1: 2, 2: 1, 3: 3}


def test_unknown_and_missing_keys_are_all_named():
    values = BRATS.to_dict()
    values["lables"] = values.pop("labels")
    values["girds"] = values.pop("grid")
    with pytest.raises(UserError, match=r"lables, girds.*missing keys labels, grid"):
        Description.from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {1: 1}}, "map 0 to 0"),
        ({"labels": {0: 0, 1: 1}}, "exactly the indices 0 to 3"),
        ({"labels": {0: 0, 1.5: 1}}, "labels holds 1.5"),
        ({"labels": [0, 1]}, "labels"),
        ({"labels": {0: 0, 1: True, 2: 2, 4: 3}}, "labels"),
        ({"regions": {"WT": [4]}}, "region 'WT' joins"),
        ({"regions": {"WT": "123"}}, "regions"),
        ({"regions": {}}, "regions is empty"),
        ({"grid": [64, 64]}, "grid"),
        ({"crop": [0, 64, 64]}, "crop is"),
        ({"spacing": "true"}, "spacing"),
        ({"background": 0}, "background"),
        ({"modalities": {"t1": "t1.nii"}}, r"no \{subject\}"),
        ({"modalities": {}}, "modalities is empty"),
        ({"channels": {"adc": 0}}, "channels names adc"),
        ({"classes": "background"}, "classes"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Description.from_dict(BRATS.to_dict() | change)


def test_a_yaml_file_of_the_user_is_read(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(BRATS.to_dict() | {"name": "Mine"}))
    assert load_description(file) == replace(BRATS, name="Mine")
    for text in ("[1, 2]", "a: [", "", "name: !!python/object/apply:os.getcwd []"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"mine\.yaml"):
            load_description(file)
    with pytest.raises(UserError, match="brats2018, brats2021, brats2023, lgg"):
        load_description(tmp_path / "lgg2.yaml")


def test_a_key_that_stands_twice_is_refused_instead_of_the_last_one_winning(tmp_path):
    file = tmp_path / "mine.yaml"
    text = (DATASETS_FOLDER / "brats2021.yaml").read_text(encoding="utf-8")
    file.write_text(text)
    assert load_description(file).spacing == "header"
    for more in ("spacing: nominal\n", "channels:\n  t1: 0\n  t1: 1\n"):
        file.write_text(text + more)
        with pytest.raises(UserError, match="stands twice"):
            load_description(file)
