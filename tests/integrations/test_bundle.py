"""The MONAI Bundle runs from its command line, on tiny phantoms."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
BUNDLE = EXAMPLES / "monai_bundle"
SMALL = ("--subject_count", "2", "--training_count", "1", "--size", "16", "--epochs", "1")
METADATA = json.loads((BUNDLE / "configs" / "metadata.json").read_text(encoding="utf-8"))


def run(name, folder):
    places = [f"--{entry}" for entry in ("phantoms", "model", "output_dir")]
    paths = [folder / "phantoms", folder / "models" / "model.pt", folder / "predictions"]
    options = [text for pair in zip(places, map(str, paths), strict=True) for text in pair]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", f"configs/{name}.json"]
    return subprocess.run(
        [*command, *SMALL, *options],
        cwd=BUNDLE,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_it_trains_and_segments_t1ce_alone(tmp_path):
    for package in ("monai", "ignite", "fire"):
        pytest.importorskip(package, reason="the extra monai is not installed")
    trained = run("train", tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "'train_latent_kl'" in trained.stdout
    for path in (tmp_path / "phantoms").rglob("*.nii.gz"):
        if not path.name.endswith("_t1ce.nii.gz"):
            path.unlink()
    predicted = run("inference", tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    names = [path.name for path in (tmp_path / "predictions").iterdir()]
    assert names == ["Phantom_0002_t1ce_seg.nii.gz"]


def test_its_metadata_have_what_monais_schema_asks_for():
    # meta_schema_20240725.json, "required"
    assert METADATA.keys() >= {
        *("schema", "version", "monai_version", "pytorch_version", "numpy_version"),
        *("required_packages_version", "task", "description", "authors", "copyright"),
        "network_data_format",
    }
    for tensors in METADATA["network_data_format"].values():
        for tensor in tensors.values():
            needed = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range"}
            assert tensor.keys() >= needed


def test_it_says_that_it_needs_the_application_beside_it(tmp_path):
    scripts = tmp_path / "bundle" / "scripts"
    scripts.mkdir(parents=True)
    text = (BUNDLE / "scripts" / "__init__.py").read_text(encoding="utf-8")
    (scripts / "__init__.py").write_text(text, encoding="utf-8")
    with pytest.raises(ImportError, match="Leave it beside brats_kdnet"):
        exec(compile(text, str(scripts / "__init__.py"), "exec"), {"__file__": str(scripts / "x")})
