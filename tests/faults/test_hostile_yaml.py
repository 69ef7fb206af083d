"""No file that the application reads can have Python objects made or functions called."""

import ast
import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

import train
from kdnet.config import changed, parse_config
from kdnet.data.description import load_description
from kdnet.errors import UserError
from kdnet.files import read_mapping
from kdnet.rows import read_rows
from kdnet.runs.folder import Folder
from kdnet.studies.design import read_design

APPLICATION = Path(train.__file__).parent
SOURCES = [
    path
    for folder in (APPLICATION, APPLICATION.parents[1] / "privdistill")
    for path in sorted(folder.rglob("*.py"))
]
MARK = "made-by-yaml"
#: Each would leave the file MARK in the working folder if it were obeyed.
TAGS = (
    f"!!python/object/apply:os.system ['touch {MARK}']",
    f"!!python/object/apply:subprocess.check_output [[touch, {MARK}]]",
    f"!!python/object/new:os.system ['touch {MARK}']",
    "!!python/name:os.system",
    "!!python/module:os",
    f"!!python/object/apply:builtins.open ['{MARK}', 'w']",
)


@pytest.fixture(autouse=True)
def nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / MARK).exists()


@pytest.fixture(scope="module")
def calls():
    """Every call in a source, as it is written, and the source."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    nodes = [(node, path) for path, tree in trees.items() for node in ast.walk(tree)]
    return [(ast.unparse(node), path) for node, path in nodes if isinstance(node, ast.Call)]


def test_sources_read_files_in_safe_ways_alone(calls):
    for call, _ in calls:
        name = call.partition("(")[0]
        assert name not in {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}
        assert name not in {"pickle.load", "pickle.loads", "os.system", "os.popen", "__import__"}
        assert name != "torch.load" or "weights_only=True" in call
        assert name != "np.load" or "allow_pickle=False" in call
        assert "shell=True" not in call


def test_what_is_imported_by_a_name_that_is_no_constant_is_a_network(calls):
    imports = {
        str(path.relative_to(APPLICATION.parents[1]))
        for call, path in calls
        if "import_module(" in call and not re.search(r"import_module\('[a-z_.]+'\)", call)
    }
    # The first for files of others behind models.trust, the others with names that they spell out.
    assert imports == {
        "examples/brats_kdnet/kdnet/models/__init__.py",
        "examples/brats_kdnet/kdnet/exported.py",
        "privdistill/__init__.py",
    }


@pytest.mark.parametrize("tag", TAGS)
def test_a_configuration_makes_no_objects(tmp_path, tag):
    path = tmp_path / "config.yaml"
    for key in ("epochs", "backbone_arguments"):
        path.write_text(f"{key}: {tag}\n")
        with pytest.raises(UserError):
            parse_config(["--config", str(path)])
    with suppress(UserError):
        # What is no YAML that is safe may only be taken as the words that it is.
        config = parse_config(["--student-modalities", tag])
        assert all(isinstance(name, str) for name in config.data.student_modalities)


@pytest.mark.parametrize("tag", TAGS)
def test_descriptions_rows_and_run_folders_make_no_objects(tmp_path, tag):
    path = tmp_path / "file.yaml"
    for text in (f"name: {tag}\n", f"rows: {{mine: {tag}}}\n", tag):
        path.write_text(text)
        for read in (load_description, read_rows, read_mapping):
            with pytest.raises(UserError):
                read(path)
    (tmp_path / "config.yaml").write_text(f"epochs: {tag}\n")
    with pytest.raises(UserError):
        Folder(tmp_path).check_config(parse_config([]))


def test_no_class_is_imported_in_place_of_a_row_or_a_recipe(tmp_path, monkeypatch):
    (tmp_path / "canary.py").write_text(f"open({MARK!r}, 'w').close()\nclass Net:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = {"class_path": "canary.Net", "init_args": {"name": "x"}}
    plan = {"kind": "train", "title": "x", "rows": [spec]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"plan\.json"):
        Folder(tmp_path).read_plan()
    study = {"title": "x", "options": {}, "recipes": {"a": {"label": "a"}}, "blocks": []}
    for place in ({"recipes": {"a": spec}}, {"blocks": [spec]}, {"searches": {"a": spec}}):
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(study | place))
        with pytest.raises(UserError, match=r"own\.yaml"):
            read_design(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    "spec",
    [
        {"class_path": "canary.Net", "init_args": {}},
        {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", MARK]}},
    ],
    ids=lambda spec: spec["class_path"],
)
def test_a_class_path_stays_the_words_that_it_is(tmp_path, monkeypatch, spec):
    """jsonargparse would make an object of it where a type asks for one; no option has such."""
    (tmp_path / "canary.py").write_text(f"open({MARK!r}, 'w').close()\nclass Net:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"backbone_arguments": {"act": spec}, "epochs": 3}))
    config = parse_config(["--config", str(path)])
    assert config.network.backbone_arguments["act"] == spec
    again = changed(config, {"backbone_arguments": {"act": spec}})
    assert again.network.backbone_arguments["act"] == spec
    path.write_text(yaml.safe_dump({"rows": {"mine": {"options": {"backbone_arguments": spec}}}}))
    rows, _ = read_rows(path)
    assert rows["mine"].options["backbone_arguments"] == spec
    for name in ("backbone", "data_root", "epochs", "student_modalities"):
        path.write_text(yaml.safe_dump({name: spec}))
        with pytest.raises(UserError):
            parse_config(["--config", str(path)])
    with pytest.raises(UserError):
        parse_config(["--backbone", json.dumps(spec), "--epochs", "none"])
