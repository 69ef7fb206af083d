from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from quick import STUDENT

import predict
from kdnet.data.description import load_description
from kdnet.data.inputs import Inputs
from kdnet.data.subjects import ImageFile, Subject
from kdnet.errors import UserError
from kdnet.evaluation.scoring import native_classes
from kdnet.runs.networks import build
from kdnet.training.checkpoint import load_model, save_model

SHAPE = (20, 18, 15)
AFFINE = np.array([[0, -1.5, 0, 5], [-1.0, 0, 0, 9], [0, 0, 3.0, -4], [0, 0, 0, 1]])


def save(path, modalities=("t1ce",), **changes):
    described = replace(STUDENT, modalities=modalities, in_channels=len(modalities), **changes)
    torch.manual_seed(0)
    save_model(path, build(described), described)
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
    return predict.main([str(argument) for argument in (*arguments, "--device", "cpu")])


def labels_of(out):
    (path,) = out.iterdir()
    return np.asarray(nib.load(path).dataobj)


def test_one_file_gives_a_label_map_on_its_own_grid_with_the_labels_of_training(model, tmp_path):
    image = write_image(tmp_path / "in" / "case_t1ce.nii.gz")
    assert run("--model", model, "--input", image, "--out", tmp_path / "out") == 0
    labels = nib.load(tmp_path / "out" / "case_t1ce_seg.nii.gz")
    assert labels.shape == SHAPE
    np.testing.assert_array_equal(labels.affine, AFFINE)
    assert labels.header["cal_max"] == 0
    assert labels.dataobj.slope == 1
    # Class 3 is written as 4.
    values = {*np.unique(labels_of(tmp_path / "out")).tolist()}
    assert values <= {0, 1, 2, 4}
    assert len(values) > 1


def test_same_input_gives_the_same_labels_alone_and_in_a_folder(model, tmp_path):
    for name in ("a", "b"):
        write_image(tmp_path / "in" / name / f"{name}_t1ce.nii.gz", seed=ord(name))
    run("--model", model, "--input", tmp_path / "in", "--out", tmp_path / "folder")
    lone = tmp_path / "in" / "b" / "b_t1ce.nii.gz"
    run("--model", model, "--input", lone, "--out", tmp_path / "lone")
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == ["a_t1ce_seg.nii.gz", "b_t1ce_seg.nii.gz"]
    together = np.asarray(nib.load(tmp_path / "folder" / "b_t1ce_seg.nii.gz").dataobj)
    np.testing.assert_array_equal(together, labels_of(tmp_path / "lone"))


def find(*inputs, modalities=("t1ce",)):
    return Inputs(load_description("brats2021"), modalities).find([*map(str, inputs)])


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["case_t1.nii", "case_t1ce.nii", "case_seg.nii"], {"case": "case_t1ce.nii"}),
        (["anna.nii", "anna_seg.nii", "b.nii.gz"], {"anna": "anna.nii", "b": "b.nii.gz"}),
        (["x-GLI-0/x-GLI-0-t1c.nii.gz"], {"x-GLI-0": "x-GLI-0-t1c.nii.gz"}),
    ],
    ids=["flat folder", "names of their own", "layout of 2023"],
)
def test_folders_of_other_layouts_give_the_modality_that_is_seen(tmp_path, written, expected):
    for name in written:
        write_image(tmp_path / name)
    assert {one.name: one.images["t1ce"].path.name for one in find(tmp_path)} == expected


def test_modalities_given_by_name_write_one_label_map(tmp_path):
    model = save(tmp_path / "model.safetensors", modalities=("flair", "t1ce"))
    t1ce, flair = write_image(tmp_path / "x.nii"), write_image(tmp_path / "y.nii", seed=1)
    inputs = ("--input", f"flair={flair}", "--input", f"t1ce={t1ce}")
    assert run("--model", model, *inputs, "--out", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["y_seg.nii.gz"]
    with pytest.raises(UserError, match="--input flair=FILE --input t1ce=FILE"):
        find(t1ce, modalities=("flair", "t1ce"))
    with pytest.raises(UserError, match="before '=', found 't9'"):
        find(f"t9={t1ce}")
    with pytest.raises(UserError, match="each of t1ce once"):
        find(f"t1ce={t1ce}", f"t1ce={t1ce}")


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


def labels_with(model, patient, seen):
    """What a network says where the modalities that are not seen are zero."""
    network, described = load_model(model)
    images = {name: ImageFile(patient / f"a_{name}.nii.gz") for name in EVERY}
    image = described.preprocessing()(Subject("a", images))["image"]
    image[[name not in seen for name in EVERY]] = 0
    with torch.no_grad():
        logits = network(image[None])
    classes = native_classes(logits, SHAPE, described.preprocessing(), "softmax")
    return np.array([0, 1, 2, 4])[classes]


@pytest.mark.parametrize("seen", [("t1ce",), ("flair", "t2")])
def test_a_network_for_any_subset_takes_what_there_is(any_subset, patient, tmp_path, capsys, seen):
    expected = labels_with(any_subset, patient, seen)
    for name in set(EVERY) - set(seen):
        (patient / f"a_{name}.nii.gz").unlink()
    named = [f"{name}={patient / f'a_{name}.nii.gz'}" for name in seen]
    # A lone file says by its name what it is.
    lone = [[patient / f"a_{seen[0]}.nii.gz"]] if len(seen) == 1 else []
    for number, given in enumerate([[patient], named, *lone]):
        out = tmp_path / str(number)
        assert run("--model", any_subset, "--input", *given, "--out", out) == 0
        assert f"Uses {'+'.join(seen)} of a" in capsys.readouterr().out
        np.testing.assert_array_equal(labels_of(out), expected)


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


def test_what_is_of_no_known_modality_is_refused(any_subset, patient, tmp_path, refusal):
    given = ("--model", any_subset, "--out", tmp_path / "out", "--input")
    (patient / "a_t1ce.nii.gz").unlink()
    message = refusal(predict, *given, patient.parent, "--modalities", "t1ce")
    assert "modality t1ce is missing" in message
    message = refusal(predict, *given, write_image(tmp_path / "scan.nii"))
    assert "found one of no known name" in message
    assert not (tmp_path / "out").exists()


def test_fewer_modalities_than_a_network_needs_cannot_be_asked_for(tmp_path, refusal):
    model = save(tmp_path / "model.safetensors", modalities=("flair", "t1ce"))
    image = write_image(tmp_path / "x.nii")
    for wanted, message in (("t1ce", "needs all that it sees, flair, t1ce"), ("pet", "found pet")):
        flags = ("--input", image, "--modalities", wanted, "--out", tmp_path / "out")
        assert message in refusal(predict, "--model", model, *flags)


def test_phantom_model_marks_terminal_and_header(tmp_path, capsys):
    phantoms = load_description("phantom")
    model = save(tmp_path / "model.safetensors", description=phantoms)
    image = write_image(tmp_path / "case.nii")
    run("--model", model, "--input", image, "--out", tmp_path / "out")
    assert "trained on phantoms" in capsys.readouterr().out
    header = nib.load(tmp_path / "out" / "case_seg.nii.gz").header
    assert b"phantom" in header["descrip"].tobytes()


def truncate(path):
    path.write_bytes(write_image(path).read_bytes()[:2000])


def empty(path):
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, dtype=np.int16), AFFINE), path)


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ({}, "missing_t1ce.nii.gz", "found nothing there"),
        ({"case.png": lambda path: path.write_bytes(b"x")}, "case.png", "expected a NIfTI file"),
        ({"case_flair.nii.gz": write_image}, "case_flair.nii.gz", "found one of flair"),
        ({"case_t1ce.nii.gz": truncate}, "case_t1ce.nii.gz", "case_t1ce.nii.gz"),
        ({"case_t1ce.nii": empty}, "case_t1ce.nii", "empty"),
        ({"notes.txt": lambda path: path.write_text("x")}, ".", "expected NIfTI files or subject"),
        ({"a/a_t1ce.nii": write_image, "b/b_flair.nii": write_image}, ".", "t1ce is missing"),
        ({"a_flair.nii.gz": write_image}, ".", "modality t1ce is missing"),
        ({"a_t1ce.nii": write_image, "b [c].nii": write_image}, ".", "no subject: b [c].nii"),
    ],
)
def test_bad_input_is_told_and_gives_no_output(files, given, message, model, tmp_path, refusal):
    (tmp_path / "in").mkdir()
    for name, write in files.items():
        write(tmp_path / "in" / name)
    good, out = write_image(tmp_path / "good_t1ce.nii.gz"), tmp_path / "out"
    images = (good, tmp_path / "in" / given)
    assert message in refusal(predict, "--model", model, "--input", *images, "--out", out)
    assert not out.exists()


def test_where_folders_alone_name_subjects_label_maps_are_called_after_both(tmp_path):
    own = replace(load_description("brats2021"), modalities={"t1ce": "scans/{subject}/T1ce.nii*"})
    model = save(tmp_path / "model.safetensors", description=own)
    root, out = tmp_path / "in", tmp_path / "out"
    first, _ = (write_image(root / f"scans/{name}/T1ce.nii.gz", ord(name)) for name in "ab")
    assert run("--model", model, "--input", root, "--out", out / "all") == 0
    names = sorted(path.name for path in (out / "all").iterdir())
    assert names == ["a_T1ce_seg.nii.gz", "b_T1ce_seg.nii.gz"]
    assert run("--model", model, "--input", first, "--out", out / "one") == 0
    expected = nib.load(out / "all" / "a_T1ce_seg.nii.gz").get_fdata()
    np.testing.assert_array_equal(labels_of(out / "one"), expected)


def test_what_cannot_be_written_or_opened_is_refused(model, tmp_path, refusal):
    first, second = (write_image(tmp_path / name / "scan.nii") for name in ("a", "b"))
    given = ("--model", model, "--input", first)
    message = refusal(predict, *given, second, "--out", tmp_path / "out")
    assert "several inputs would be written to scan_seg.nii.gz" in message
    assert "expected a folder" in refusal(predict, *given, "--out", second)
    model.write_bytes(b"something else")
    assert "no file of this application" in refusal(predict, *given, "--out", tmp_path / "out")


def test_a_volume_turned_otherwise_than_in_training_is_refused(tmp_path, refusal):
    path = save(tmp_path / "turned.safetensors", orientation="LPS")
    image = write_image(tmp_path / "a_t1ce.nii.gz")
    message = refusal(predict, "--model", path, "--input", image, "--out", tmp_path / "out")
    assert "those of the training data LPS" in message
    assert not (tmp_path / "out").exists()


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
        assert ("--strict" in capsys.readouterr().out) == bool(warned)
        assert run(*given, "--strict") == (2 if warned else 0)
        assert (warned or "") in capsys.readouterr().err
