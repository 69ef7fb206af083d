from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from kdnet.data.description import load_description
from kdnet.data.inputs import Inputs
from kdnet.data.subjects import ImageFile, Subject
from kdnet.errors import UserError
from kdnet.evaluation.scoring import native_classes
from kdnet.models import build_network
from kdnet.training.checkpoint import ModelMetadata, load_model, save_model
from predict import main

GRID = (16, 16, 16)
SHAPE = (20, 18, 15)
AFFINE = np.array([[0, -1.5, 0, 5], [-1.0, 0, 0, 9], [0, 0, 3.0, -4], [0, 0, 0, 1]])
NETWORK = {"channels": [4, 8], "skip_connections": 1}


def metadata(modalities=("t1ce",), **changes):
    return replace(
        ModelMetadata(
            role="student",
            backbone="kdnet",
            backbone_arguments=NETWORK,
            in_channels=len(modalities),
            out_channels=4,
            modalities=modalities,
            activation="softmax",
            description=load_description("brats2021"),
            crop=None,
            grid=GRID,
        ),
        **changes,
    )


def save(path, **options):
    described = metadata(**options)
    torch.manual_seed(0)
    network = build_network("kdnet", NETWORK, in_channels=described.in_channels, out_channels=4)
    save_model(path, network, described)
    return path


@pytest.fixture
def model(tmp_path):
    return save(tmp_path / "model.safetensors")


def write_image(path, seed=0, shape=SHAPE):
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(0, 500, size=shape).astype(np.int16)
    image = nib.Nifti1Image(voxels, AFFINE)
    image.header.set_slope_inter(0.5, 3)
    image.header["cal_max"] = 900
    nib.save(image, path)
    return path


def run(*arguments):
    # Label maps are compared voxel by voxel, and a GPU rounds in its own way.
    return main([str(argument) for argument in (*arguments, "--device", "cpu")])


def test_one_file_gives_a_label_map_on_its_own_grid(model, tmp_path):
    image = write_image(tmp_path / "in" / "case_t1ce.nii.gz")
    assert run("--model", model, "--input", image, "--out", tmp_path / "out") == 0
    (written,) = (tmp_path / "out").iterdir()
    assert written.name == "case_t1ce_seg.nii.gz"
    labels = nib.load(written)
    assert labels.shape == SHAPE
    np.testing.assert_array_equal(labels.affine, AFFINE)
    assert labels.header["cal_max"] == 0
    assert labels.dataobj.slope == 1


def test_label_three_is_never_written(model, tmp_path):
    image = write_image(tmp_path / "case_t1ce.nii.gz")
    run("--model", model, "--input", image, "--out", tmp_path / "out")
    values = np.unique(np.asarray(nib.load(tmp_path / "out/case_t1ce_seg.nii.gz").dataobj))
    assert set(values) <= {0, 1, 2, 4}
    assert len(values) > 1


def test_same_input_gives_the_same_labels_alone_and_in_a_folder(model, tmp_path):
    for name in ("a", "b"):
        write_image(tmp_path / "in" / name / f"{name}_t1ce.nii.gz", seed=ord(name))
    run("--model", model, "--input", tmp_path / "in", "--out", tmp_path / "folder")
    lone = tmp_path / "in" / "b" / "b_t1ce.nii.gz"
    run("--model", model, "--input", lone, "--out", tmp_path / "lone")
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == ["a_t1ce_seg.nii.gz", "b_t1ce_seg.nii.gz"]
    first, second = (
        np.asarray(nib.load(tmp_path / folder / "b_t1ce_seg.nii.gz").dataobj)
        for folder in ("folder", "lone")
    )
    np.testing.assert_array_equal(first, second)


def find(*inputs, modalities=("t1ce",)):
    return Inputs(load_description("brats2021"), modalities).find([*map(str, inputs)])


def found(inputs, **options):
    subjects = find(*inputs, **options)
    return {
        subject.name: {name: file.path.name for name, file in subject.images.items()}
        for subject in subjects
    }


def test_flat_folder_of_all_modalities_gives_the_one_that_is_seen(tmp_path):
    for name in ("t1", "t1ce", "flair", "seg"):
        write_image(tmp_path / f"case_{name}.nii")
    assert found([tmp_path])["case"]["t1ce"] == "case_t1ce.nii"


def test_flat_folder_of_files_with_names_of_their_own(tmp_path):
    write_image(tmp_path / "anna.nii")
    write_image(tmp_path / "anna_seg.nii")
    write_image(tmp_path / "bert.nii.gz")
    assert found([tmp_path]) == {"anna": {"t1ce": "anna.nii"}, "bert": {"t1ce": "bert.nii.gz"}}


def test_folder_of_brats_2023_names_for_a_network_of_brats_2021(tmp_path):
    write_image(tmp_path / "BraTS-GLI-00000-000" / "BraTS-GLI-00000-000-t1c.nii.gz")
    (images,) = found([tmp_path]).values()
    assert images == {"t1ce": "BraTS-GLI-00000-000-t1c.nii.gz"}


def test_modalities_given_by_name(tmp_path):
    t1ce, flair = write_image(tmp_path / "x.nii"), write_image(tmp_path / "y.nii")
    inputs = [f"flair={flair}", f"t1ce={t1ce}"]
    assert found(inputs, modalities=("t1ce", "flair")) == {"x": {"flair": "y.nii", "t1ce": "x.nii"}}


def test_network_of_two_modalities_writes_one_label_map(tmp_path):
    model = save(tmp_path / "model.safetensors", modalities=("flair", "t1ce"))
    t1ce, flair = write_image(tmp_path / "x.nii"), write_image(tmp_path / "y.nii", seed=1)
    inputs = ("--input", f"flair={flair}", "--input", f"t1ce={t1ce}")
    assert run("--model", model, *inputs, "--out", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["y_seg.nii.gz"]


EVERY = ("flair", "t1", "t1ce", "t2")


@pytest.fixture
def any_subset(tmp_path):
    return save(tmp_path / "any.safetensors", modalities=EVERY, any_subset=True)


@pytest.fixture
def patient(tmp_path):
    """A folder with all modalities of one subject."""
    for seed, name in enumerate(EVERY):
        write_image(tmp_path / "in" / "a" / f"a_{name}.nii.gz", seed=seed)
    return tmp_path / "in" / "a"


def labels_of(out):
    (path,) = out.iterdir()
    return np.asarray(nib.load(path).dataobj)


def labels_with(model, patient, seen):
    """What a network says where the modalities that are not seen are zero."""
    network, described = load_model(model)
    images = {name: ImageFile(patient / f"a_{name}.nii.gz") for name in EVERY}
    image = described.preprocessing()(Subject("a", images))["image"]
    hidden = [name not in seen for name in EVERY]
    image[hidden] = 0
    with torch.no_grad():
        logits = network(image[None])
    classes = native_classes(
        logits, SHAPE, described.preprocessing(), described.description, "softmax"
    )
    return np.array([0, 1, 2, 4])[classes]


@pytest.mark.parametrize("seen", [("t1ce",), ("flair", "t2")])
def test_a_network_for_any_subset_takes_what_there_is(any_subset, patient, tmp_path, capsys, seen):
    expected = labels_with(any_subset, patient, seen)
    for name in set(EVERY) - set(seen):
        (patient / f"a_{name}.nii.gz").unlink()
    assert run("--model", any_subset, "--input", patient, "--out", tmp_path / "folder") == 0
    assert f"Uses {'+'.join(seen)} of a" in capsys.readouterr().out
    np.testing.assert_array_equal(labels_of(tmp_path / "folder"), expected)
    named = [f"{name}={patient / f'a_{name}.nii.gz'}" for name in seen]
    assert run("--model", any_subset, "--input", *named, "--out", tmp_path / "named") == 0
    np.testing.assert_array_equal(labels_of(tmp_path / "named"), expected)


def test_a_network_for_any_subset_knows_a_lone_file_by_its_name(any_subset, patient, tmp_path):
    expected = labels_with(any_subset, patient, ("t2",))
    lone = ("--input", patient / "a_t2.nii.gz")
    assert run("--model", any_subset, *lone, "--out", tmp_path / "out") == 0
    np.testing.assert_array_equal(labels_of(tmp_path / "out"), expected)


def test_all_modalities_are_used_unless_fewer_are_asked_for(any_subset, patient, tmp_path, capsys):
    assert run("--model", any_subset, "--input", patient, "--out", tmp_path / "all") == 0
    assert "Uses flair+t1+t1ce+t2 of a" in capsys.readouterr().out
    every = labels_with(any_subset, patient, EVERY)
    np.testing.assert_array_equal(labels_of(tmp_path / "all"), every)
    # What is not asked for is not read: a damaged file does no harm.
    (patient / "a_flair.nii.gz").write_bytes(b"")
    flags = ("--modalities", "t2,t1ce", "--out", tmp_path / "some")
    assert run("--model", any_subset, "--input", patient, *flags) == 0
    assert "Uses t1ce+t2 of a" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["a_t1ce_seg.nii.gz"]
    assert not np.array_equal(labels_of(tmp_path / "some"), every)


def test_subjects_of_different_modalities_are_segmented_together(any_subset, tmp_path, capsys):
    write_image(tmp_path / "in" / "a" / "a_t1ce.nii.gz")
    write_image(tmp_path / "in" / "b" / "b_flair.nii.gz")
    assert run("--model", any_subset, "--input", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert {"Uses t1ce of a", "Uses flair of b"} <= set(capsys.readouterr().out.splitlines())
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_network_for_any_subset_refuses_what_is_of_none_of_them(
    any_subset, patient, tmp_path, capsys
):
    out = ("--out", tmp_path / "out")
    (patient / "a_t1ce.nii.gz").unlink()
    flags = ("--input", patient.parent, "--modalities", "t1ce")
    assert run("--model", any_subset, *flags, *out) == 2
    assert "modality t1ce is missing" in capsys.readouterr().err
    lone = write_image(tmp_path / "scan.nii")
    assert run("--model", any_subset, "--input", lone, *out) == 2
    assert "found one of no known name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fewer_modalities_than_a_network_needs_cannot_be_asked_for(tmp_path, capsys):
    model = save(tmp_path / "model.safetensors", modalities=("flair", "t1ce"))
    image = write_image(tmp_path / "x.nii")
    for wanted, message in (("t1ce", "needs all that it sees, flair, t1ce"), ("pet", "found pet")):
        flags = ("--input", image, "--modalities", wanted, "--out", tmp_path / "out")
        assert run("--model", model, *flags) == 2
        assert message in capsys.readouterr().err


def test_phantom_model_marks_terminal_and_header(tmp_path, capsys):
    model = save(tmp_path / "model.safetensors", phantom=True)
    image = write_image(tmp_path / "case.nii")
    run("--model", model, "--input", image, "--out", tmp_path / "out")
    assert "trained on phantoms" in capsys.readouterr().out
    header = nib.load(tmp_path / "out" / "case_seg.nii.gz").header
    assert b"phantom" in header["descrip"].tobytes()


def nothing_there(folder):
    return folder / "missing_t1ce.nii.gz", "found nothing there"


def not_nifti(folder):
    path = folder / "case.png"
    path.write_bytes(b"x")
    return path, "expected a NIfTI file"


def another_modality(folder):
    return write_image(folder / "case_flair.nii.gz"), "found one of flair"


def truncated(folder):
    path = write_image(folder / "case_t1ce.nii.gz")
    path.write_bytes(path.read_bytes()[:2000])
    return path, "case_t1ce.nii.gz"


def all_zero(folder):
    path = folder / "case_t1ce.nii"
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, dtype=np.int16), AFFINE), path)
    return path, "empty"


def no_files(folder):
    (folder / "notes.txt").write_text("x")
    return folder, "expected NIfTI files or subject folders with the modality t1ce"


def modality_missing_in_one_subject(folder):
    write_image(folder / "a" / "a_t1ce.nii.gz")
    write_image(folder / "b" / "b_flair.nii.gz")
    return folder, "modality t1ce is missing"


def only_other_modalities(folder):
    write_image(folder / "a_flair.nii.gz")
    return folder, "modality t1ce is missing"


@pytest.mark.parametrize(
    "bad_input",
    [
        nothing_there,
        not_nifti,
        another_modality,
        truncated,
        all_zero,
        no_files,
        modality_missing_in_one_subject,
        only_other_modalities,
    ],
)
def test_bad_input_is_one_message_status_two_and_no_output(bad_input, model, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    path, message = bad_input(tmp_path / "in")
    good = write_image(tmp_path / "good_t1ce.nii.gz")
    out = tmp_path / "out"
    assert run("--model", model, "--input", good, path, "--out", out) == 2
    error = capsys.readouterr().err
    # The table of problems may break a line anywhere.
    assert message.replace(" ", "") in "".join(error.split()).replace("\u2502", "")
    assert "Traceback" not in error
    assert not out.exists()


def test_equal_names_from_two_folders_are_refused(model, tmp_path, capsys):
    paths = [write_image(tmp_path / name / "scan.nii") for name in ("a", "b")]
    assert run("--model", model, "--input", *paths, "--out", tmp_path / "out") == 2
    assert "several inputs would be written to scan_seg.nii.gz" in capsys.readouterr().err


def test_lone_file_for_a_network_of_two_modalities_is_refused(tmp_path):
    image = write_image(tmp_path / "x.nii")
    with pytest.raises(UserError, match="--input flair=FILE --input t1ce=FILE"):
        find(image, modalities=("flair", "t1ce"))


def test_unknown_or_repeated_modality_is_refused(tmp_path):
    image = write_image(tmp_path / "x.nii")
    with pytest.raises(UserError, match="before '=', found 't9'"):
        find(f"t9={image}")
    with pytest.raises(UserError, match="each of t1ce once"):
        find(f"t1ce={image}", f"t1ce={image}")


def test_foreign_model_file_is_refused(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    image = write_image(tmp_path / "x.nii")
    model = tmp_path / "model.safetensors"
    assert run("--model", model, "--input", image, "--out", tmp_path / "out") == 2
    assert "no file of this application" in capsys.readouterr().err


def test_out_that_is_a_file_is_refused(model, tmp_path, capsys):
    image = write_image(tmp_path / "x.nii")
    assert run("--model", model, "--input", image, "--out", image) == 2
    assert "expected a folder" in capsys.readouterr().err


def test_a_volume_turned_otherwise_than_in_training_is_refused(tmp_path, capsys):
    path = save(tmp_path / "turned.safetensors", orientation="LPS")
    image = write_image(tmp_path / "a_t1ce.nii.gz")
    assert run("--model", path, "--input", image, "--out", tmp_path / "out") == 2
    assert "those of the training data LPS" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_that_fit_no_subject_are_named(model, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a_t1ce.nii.gz", "patient [b].nii.gz"):
        write_image(folder / name)
    assert run("--model", model, "--input", folder, "--out", tmp_path / "out") == 2
    assert "1 files fit no subject: patient [b].nii.gz" in capsys.readouterr().err


def test_memory_that_runs_out_ends_with_a_message(tmp_path, model, monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise MemoryError("can't allocate memory")

    monkeypatch.setattr("predict.predict_finite", full)
    image = write_image(tmp_path / "one_t1ce.nii.gz")
    command = ["--model", str(model), "--input", str(image), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "Main memory was not enough" in capsys.readouterr().err


def test_images_unlike_those_of_training_are_told_and_refused_if_strict(tmp_path, capsys):
    """The image here has voxels of 1 x 1.5 x 3 mm, and of its voxels nearly all are not zero."""
    image = write_image(tmp_path / "in" / "case_t1ce.nii.gz")
    for name, spacing, share, warned in (
        ("alike", (1.0, 1.5, 3.0), 0.99, None),
        ("spacing", (1.0, 1.0, 1.0), 0.99, "voxels measure"),
        ("skull", (1.0, 1.5, 3.0), 0.2, "of its voxels are not 0"),
    ):
        model = save(tmp_path / f"{name}.safetensors", spacing=spacing, nonzero=(share,))
        given = ("--model", model, "--input", image, "--out", tmp_path / name)
        assert run(*given) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("--strict" in said) == bool(warned)
        assert run(*given, "--strict") == (2 if warned else 0)
        assert (warned or "") in capsys.readouterr().err
