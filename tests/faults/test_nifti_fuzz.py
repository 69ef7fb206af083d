"""Whatever bytes lie under a name, reading ends with numbers or with a reason, soon and in bounds.

200 examples each in `make test`; HYPOTHESIS_PROFILE=nightly looks through 10,000.
"""

import gzip
import io
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kdnet.data.checks import check_subjects
from kdnet.data.description import load_description
from kdnet.data.subjects import ImageFile, Subject
from kdnet.data.volumes import LARGEST_VOLUME, UnreadableVolumeError, read_geometry, read_volume
from kdnet.errors import UserError

#: The files here are below 10 kB, and so deflate could make 10 MB of them at most.
BOUND = 32 * 2**20
VOLUME = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
FIELDS = {
    name: (offset, dtype.base, dtype.shape[0] if dtype.shape else 1)
    for name, (dtype, offset, *_) in nib.Nifti1Header().structarr.dtype.fields.items()
}
NUMBERS = (
    *(0, 1, -1, 2, 3, 4, 7, 8, 16, 64, 127, 128, 255, 256, 348, 352, 540, 32767, -32768),
    *(2**31 - 1, -(2**31), 0.5, 1e-30, 1e30, 3e38, float("nan"), float("inf"), float("-inf")),
)


def stored(kind: type = nib.Nifti1Image) -> bytes:
    stream = io.BytesIO()
    kind(VOLUME, np.eye(4)).to_stream(stream)
    return stream.getvalue()


SOUND = {"1": stored(), "2": stored(nib.Nifti2Image)}


def read(path) -> str:
    """What comes of a file: a reason, or nothing if it holds a volume; anything else is raised."""
    file = ImageFile(path)
    tracemalloc.start()
    try:
        geometry = read_geometry(file)
        volume = read_volume(file)
    except UnreadableVolumeError as error:
        return error.reason or "?"
    else:
        assert volume.shape == geometry.shape
        assert len(geometry.orientation) == 3
        assert volume.dtype.kind in "iuf"
        return ""
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < BOUND, f"{peak / 2**20:.0f} MiB for a file of {path.stat().st_size} bytes"


def check(path) -> None:
    """The check of a data set tells the same, and whatever values there are."""
    description = load_description("brats2021")
    subject = Subject("case", {"t1": ImageFile(path)}, ImageFile(path))
    for problem in check_subjects(
        description, [subject], workers=1, progress=False, modalities=("t1",)
    ):
        assert problem.reason.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def written(folder, content: bytes, compressed: bool):
    path = folder / ("case.nii.gz" if compressed else "case.nii")
    path.write_bytes(gzip.compress(content, 1) if compressed else content)
    return path


def as_bytes(number: float, dtype: np.dtype) -> bytes:
    """A number in a field, or the nearest that there is room for."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        number = min(max(int(np.nan_to_num(number)), limits.min), limits.max)
    with np.errstate(over="ignore"):
        return np.array(number).astype(dtype).tobytes()


edits = st.lists(
    st.tuples(st.sampled_from(sorted(FIELDS)), st.integers(0, 79), st.sampled_from(NUMBERS)).filter(
        lambda edit: FIELDS[edit[0]][1].kind != "S"
    ),
    min_size=1,
    max_size=4,
)


@given(edits, st.booleans())
@example([("dim", 0, 3), ("dim", 1, 32767), ("dim", 2, 32767), ("dim", 3, 32767)], True)
@example([("sform_code", 0, 0), ("qform_code", 0, 1), ("quatern_b", 0, 3e38)], False)
def test_changed_fields_of_a_header(folder, changes, compressed):
    content = bytearray(SOUND["1"])
    for name, place, number in changes:
        offset, dtype, count = FIELDS[name]
        start = offset + dtype.itemsize * (place % count)
        content[start : start + dtype.itemsize] = as_bytes(number, dtype)
    path = written(folder, bytes(content), compressed)
    read(path)
    check(path)


@given(
    st.sampled_from(sorted(SOUND)),
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=8),
    st.booleans(),
)
def test_changed_bytes_of_a_file(folder, version, changes, compressed):
    content = bytearray(SOUND[version])
    for place, byte in changes:
        content[place % len(content)] = byte
    path = written(folder, bytes(content), compressed)
    read(path)
    if compressed:
        content = bytearray(path.read_bytes())
        for place, byte in changes:
            content[place % len(content)] = byte
        path.write_bytes(bytes(content))
        read(path)


@given(st.integers(0, 10_000), st.booleans())
def test_a_file_that_ends_anywhere_is_no_volume(folder, length, compressed):
    path = written(folder, SOUND["1"], compressed)
    content = path.read_bytes()
    path.write_bytes(content[: length % len(content)])
    assert read(path)


@given(st.binary(max_size=700), st.sampled_from((".nii", ".nii.gz", ".nii.bz2", ".NII.GZ", "")))
def test_any_bytes_under_any_ending(folder, content, ending):
    path = folder / f"case{ending}"
    for beginning in (b"", b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c", b"\x1c\x02\x00\x00"):
        changed = beginning + content
        path.write_bytes(changed[:344] + b"n+1\0" + changed[348:] if beginning else changed)
        read(path)


@given(
    st.sampled_from(("u1", "i1", "<i2", ">i2", "<u2", "<i4", ">f4", "<f4", "<f8", "<i8")),
    st.tuples(*[st.integers(1, 6)] * 3),
    st.sampled_from(((None, None), (2.0, 0.0), (0.5, -3.0), (1.0, 0.0), (-1.0, 1e6))),
    st.booleans(),
)
def test_sound_files_are_read_as_nibabel_reads_them(folder, dtype, shape, scaling, compressed):
    header = nib.Nifti1Header(endianness=dtype[0] if dtype[0] in "<>" else "<")
    header.set_data_dtype(np.dtype(dtype).newbyteorder("="))
    numbers = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    path = folder / ("sound.nii.gz" if compressed else "sound.nii")
    header.set_data_shape(shape)
    header["vox_offset"], header["magic"], header["pixdim"][0] = 352, b"n+1", 1
    header["scl_slope"], header["scl_inter"] = (np.nan if s is None else s for s in scaling)
    values = numbers.astype(header.get_data_dtype()).tobytes(order="F")
    content = header.binaryblock + bytes(4) + values
    path.write_bytes(gzip.compress(content) if compressed else content)
    expected = np.asarray(nib.load(path, mmap=False).dataobj)
    found = read_volume(ImageFile(path))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype.newbyteorder("=")


def test_one_channel_of_four_axes_is_read_as_nibabel_reads_it(folder):
    stack = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
    for name in ("stack.nii", "stack.nii.gz"):
        nib.save(nib.Nifti1Image(stack, np.eye(4)), folder / name)
        for channel in (0, 5):
            found = read_volume(ImageFile(folder / name, channel))
            np.testing.assert_array_equal(found, stack[..., channel])


def test_the_limit_is_a_number_of_voxels_that_can_be_set(folder, monkeypatch):
    path = written(folder, SOUND["1"], False)
    assert LARGEST_VOLUME > 512 * 512 * 2000
    monkeypatch.setenv("PRIVDISTILL_LARGEST_VOLUME", "120")
    assert read(path) == ""
    monkeypatch.setenv("PRIVDISTILL_LARGEST_VOLUME", "119")
    assert "4 x 5 x 6 voxels, more than the 119 that are read" in read(path)
    monkeypatch.setenv("PRIVDISTILL_LARGEST_VOLUME", "much")
    with pytest.raises(UserError, match="PRIVDISTILL_LARGEST_VOLUME is 'much'"):
        read(path)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "room"), [("i8", 8 + 8), ("f8", 8 + 8), ("i2", 2 + 8)])
def test_scaling_takes_no_second_copy(tmp_path, order, kind, room):
    """Bytes per voxel at the peak: the stored ones and the scaled ones."""
    volume = (np.arange(2**20) % 1000).reshape(128, 128, 64).astype(kind)
    image = nib.Nifti1Image(volume, np.eye(4), dtype=kind)
    image.header.set_data_dtype(kind)
    path = tmp_path / "scaled.nii"
    content = image.header.copy().as_byteswapped(order)
    content["scl_slope"], content["scl_inter"], content["vox_offset"] = 0.1, 7, 352
    content["magic"] = b"n+1"
    path.write_bytes(content.binaryblock + bytes(4) + volume.astype(order + kind).tobytes("F"))
    tracemalloc.start()
    try:
        found = read_volume(ImageFile(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found, nib.load(path).get_fdata())
    # The file is read in blocks of 1 MiB, two of which are there at a time.
    assert peak < room * volume.size + 3 * 2**20
