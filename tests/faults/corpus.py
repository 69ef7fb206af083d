"""Broken subjects, made by code: one function per fault, and the words a report must hold.

Every fault starts from a sound subject of 12 x 12 x 12 voxels in the layout of BraTS 2021. No image
of anybody is involved.
"""

import gzip
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

SIZE = 12
MODALITIES = ("flair", "t1", "t1ce", "t2")
#: A file of compressed zeros may consist of any number of these: 16 MiB each, 16 kB on disk.
ZEROS = gzip.compress(bytes(2**24), compresslevel=6)

Fault = Callable[[Path], None]
#: Name of a fault to what makes it and what the report must say of it.
FAULTS: dict[str, tuple[Fault, str]] = {}
#: Subjects that look odd and are sound.
SOUND: dict[str, Fault] = {}
#: Faults that lie in the name of the subject itself.
NAMES = {
    "new\nline": "cannot be printed",
    "escape\x1b[31m": "cannot be printed",
    "right\u202eleft": "cannot be printed",
    os.fsdecode(b"no-text-\xff"): "cannot be printed",
    "long-" + "x" * 230: "longer than 180 bytes",
}
SOUND_NAMES = (
    "name with spaces",
    "Ünïcode-脑",
    "[red]markup",
    "<script>alert(1)<",
    "a=b;c&d",
)


def fault(words: str) -> Callable[[Fault], Fault]:
    """Enter a function into the table under its own name."""

    def enter(function: Fault) -> Fault:
        FAULTS[function.__name__] = (function, words)
        return function

    return enter


def sound(function: Fault) -> Fault:
    """Enter a function into the table of the odd and sound."""
    SOUND[function.__name__] = function
    return function


def write_subject(folder: Path) -> Path:
    """Write a sound subject; its name, that of the folder, decides about its voxels."""
    rng = np.random.default_rng(zlib.crc32(os.fsencode(folder.name)))
    folder.mkdir(parents=True)
    for modality in MODALITIES:
        volume = rng.integers(1, 1000, (SIZE,) * 3).astype(np.int16)
        save(folder / f"{folder.name}_{modality}.nii", volume)
    labels = np.zeros((SIZE,) * 3, dtype=np.uint8)
    labels[2:10, 2:10, 2:10], labels[4:8, 4:8, 4:8], labels[5:7, 5:7, 5:7] = 2, 4, 1
    save(folder / f"{folder.name}_seg.nii", labels)
    return folder


def write_corpus(root: Path, good: int = 4) -> Path:
    """Write sound subjects, odd ones, and one for every fault; each is called as its fault."""
    for number in range(good):
        write_subject(root / f"good{number}")
    for name in SOUND_NAMES:
        write_subject(root / name)
    for name, make in SOUND.items():
        make(write_subject(root / name))
    for name, (make, _) in FAULTS.items():
        make(write_subject(root / name))
    for name in NAMES:
        write_subject(root / name)
    return root


def save(path: Path, volume: np.ndarray, affine: np.ndarray | None = None) -> None:
    nib.save(nib.Nifti1Image(volume, np.eye(4) if affine is None else affine), path)


def volume_of(path: Path) -> np.ndarray:
    """Read whole, as the file is to be written over."""
    return np.asarray(nib.load(path, mmap=False).dataobj)


def image(subject: Path) -> Path:
    return subject / f"{subject.name}_t1ce.nii"


def label_map(subject: Path) -> Path:
    return subject / f"{subject.name}_seg.nii"


def edit(path: Path, **values) -> None:
    """Change fields of a header in place, whatever sense that makes; `dim=(place, number)`."""
    content = path.read_bytes()
    header = nib.Nifti1Header(content[:348], check=False)
    for name, value in values.items():
        if isinstance(value, tuple):
            header[name][value[0]] = value[1]
        else:
            header[name] = value
    path.write_bytes(header.binaryblock + content[348:])


def reshape(path: Path, *shape: int) -> None:
    """Let the header promise another shape than the file holds."""
    edit(path, dim=np.array([len(shape), *shape, *[1] * (7 - len(shape))]))


def set_value(path: Path, value: float, dtype=np.float32, index=(0, 0, 0)) -> None:
    volume = volume_of(path).astype(dtype)
    volume[index] = value
    save(path, volume)


def compress(path: Path) -> Path:
    """Exchange a file for its compressed form."""
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return target


# --- files that are no NIfTI, or only the beginning of one


@fault("the file is empty")
def empty_file(subject):
    image(subject).write_bytes(b"")


@fault("does not begin with the header of a NIfTI file")
def text_file(subject):
    image(subject).write_text("not an image\n" * 100)


@fault("does not begin with the header of a NIfTI file")
def png_file(subject):
    image(subject).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))


@fault("does not begin with the header")
def shorter_than_a_header(subject):
    image(subject).write_bytes(image(subject).read_bytes()[:200])


@fault("cut short")
def header_alone(subject):
    image(subject).write_bytes(image(subject).read_bytes()[:352])


@fault("the magic of NIfTI files is n+1 or n+2")
def wrong_magic(subject):
    edit(image(subject), magic=b"abc")


@fault("voxels lie in another file")
def header_of_a_pair(subject):
    edit(image(subject), magic=b"ni1")


@fault("cut short")
def truncated(subject):
    content = image(subject).read_bytes()
    image(subject).write_bytes(content[:-100])


@fault("cut short")
def truncated_gzip(subject):
    path = compress(image(subject))
    path.write_bytes(path.read_bytes()[:-700])


@fault("damaged")
def gzip_with_a_flipped_bit(subject):
    path = compress(image(subject))
    content = bytearray(path.read_bytes())
    content[-500] ^= 0x10
    path.write_bytes(bytes(content))


@fault("CRC check failed")
def gzip_with_a_wrong_checksum(subject):
    path = compress(image(subject))
    content = bytearray(path.read_bytes())
    content[-8] ^= 0xFF
    path.write_bytes(bytes(content))


@fault("the name does not end in .gz")
def gzip_called_nii(subject):
    image(subject).write_bytes(gzip.compress(image(subject).read_bytes()))


@fault("the content is not gzip-compressed")
def nii_called_gzip(subject):
    image(subject).rename(image(subject).with_suffix(".nii.gz"))


# --- shapes


@fault("expected three axes, found shape (12, 12, 6, 2)")
def four_axes(subject):
    reshape(image(subject), 12, 12, 6, 2)


@fault("expected three axes, found shape (12, 144)")
def two_axes(subject):
    reshape(image(subject), 12, 144)


@fault("expected three axes, found shape (1728,)")
def one_axis(subject):
    reshape(image(subject), 1728)


@fault("the header tells of 3 axes")
def axis_of_size_zero(subject):
    reshape(image(subject), 12, 0, 12)


@fault("the header tells of 3 axes")
def axis_of_negative_size(subject):
    reshape(image(subject), 12, -12, 12)


@fault("the header tells of 0 axes")
def no_axes(subject):
    edit(image(subject), dim=(0, 0))


@fault("the header tells of 9 axes")
def nine_axes(subject):
    edit(image(subject), dim=(0, 9))


@fault("shape (12, 12, 11), but")
def another_shape(subject):
    reshape(image(subject), 12, 12, 11)


# --- promises that would exhaust memory, disk or patience


@fault("more than the 536,870,912 that are read")
def huge_shape(subject):
    reshape(image(subject), 32767, 32767, 32767)


@fault("more than the 536,870,912 that are read")
def huge_shape_of_nifti_2(subject):
    header = nib.Nifti2Header()
    header["dim"][:4] = 3, 2**40, 2**40, 2**40
    header["vox_offset"], header["magic"] = 544, b"n+2"
    header["datatype"], header["bitpix"] = 4, 16
    image(subject).write_bytes(header.binaryblock + bytes(1000))


@fault("cut short")
def larger_shape_than_the_file(subject):
    reshape(image(subject), 800, 800, 800)


@fault("cut short")
def larger_shape_than_gzip_can_unfold_to(subject):
    reshape(image(subject), 800, 800, 800)
    compress(image(subject))


@fault("more than the 536,870,912 that are read")
def gzip_bomb_that_is_announced(subject):
    reshape(image(subject), 1500, 1500, 1500)
    path = compress(image(subject))
    path.write_bytes(path.read_bytes() + ZEROS * 410)


@fault("goes on for")
def gzip_bomb_behind_the_voxels(subject):
    path = compress(image(subject))
    path.write_bytes(path.read_bytes() + ZEROS * 256)


@fault("goes on for")
def much_behind_the_voxels(subject):
    image(subject).write_bytes(image(subject).read_bytes() + bytes(2**21))


@fault("cut short")
def voxels_begin_behind_the_end(subject):
    edit(image(subject), vox_offset=1_000_000)


@fault("voxels begin at byte 1e+30")
def voxels_begin_nowhere(subject):
    edit(image(subject), vox_offset=1e30)


@fault("voxels begin at byte nan")
def voxels_begin_at_nan(subject):
    edit(image(subject), vox_offset=np.nan)


@fault("voxels begin at byte 0")
def voxels_begin_in_the_header(subject):
    edit(image(subject), vox_offset=0)


# --- types and scales


@fault("data type 999")
def unknown_type(subject):
    edit(image(subject), datatype=999)


@fault("int16, of 8 bits")
def wrong_number_of_bits(subject):
    edit(image(subject), bitpix=8)


@fault("expected plain numbers, complex64")
def complex_numbers(subject):
    save(image(subject), np.ones((SIZE,) * 3, dtype=np.complex64))


@fault("expected plain numbers")
def colours(subject):
    save(image(subject), np.ones((SIZE,) * 3, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]))


@fault("the header scales voxels by inf")
def infinite_slope(subject):
    edit(image(subject), scl_slope=np.inf)


@fault("invalid intercept nan")
def intercept_that_is_no_number(subject):
    edit(image(subject), scl_slope=2, scl_inter=np.nan)


@fault("too large for single precision")
def enormous_slope(subject):
    edit(image(subject), scl_slope=1e38, scl_inter=0)


@fault("too large for single precision")
def enormous_values(subject):
    set_value(image(subject), 1e300, np.float64)


# --- values


@fault("1728 voxels are not finite")
def all_nan(subject):
    save(image(subject), np.full((SIZE,) * 3, np.nan, dtype=np.float32))


@fault("1 voxels are not finite")
def one_nan(subject):
    set_value(image(subject), np.nan)


@fault("1 voxels are not finite")
def one_infinity(subject):
    set_value(image(subject), np.inf)


@fault("1 voxels are not finite")
def one_negative_infinity(subject):
    set_value(image(subject), -np.inf)


@fault("empty, all zero")
def all_zero(subject):
    save(image(subject), np.zeros((SIZE,) * 3, dtype=np.int16))


@fault("every voxel is 7")
def constant(subject):
    save(image(subject), np.full((SIZE,) * 3, 7, dtype=np.int16))


@fault("unknown label 7 in 1 voxels")
def label_seven(subject):
    set_value(label_map(subject), 7, np.uint8)


@fault("unknown label -1 in 1 voxels")
def negative_label(subject):
    set_value(label_map(subject), -1, np.int16)


@fault("unknown label 1.5 in 1 voxels")
def label_between_two(subject):
    set_value(label_map(subject), 1.5)


@fault("unknown label nan in 1 voxels")
def label_that_is_no_number(subject):
    set_value(label_map(subject), np.nan)


@fault("unknown label -5536 in 1 voxels")
def label_beyond_its_type(subject):
    set_value(label_map(subject), np.uint16(60000).astype(np.int16), np.int16)


@fault("unknown label 0.5")
def scaled_labels(subject):
    edit(label_map(subject), scl_slope=0.5, scl_inter=0)


@fault("unknown label 1.00234997 in 1 voxels")
def label_almost_whole(subject):
    set_value(label_map(subject), 1.00235)


@fault("a Git LFS pointer")
def git_lfs_pointer(subject):
    image(subject).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")


@fault("a web page")
def web_page(subject):
    compress(image(subject)).write_text("\n<!DOCTYPE html><html><body>Log in</body></html>")


@sound
def labels_with_a_slope(subject):
    edit(label_map(subject), scl_slope=0.99999994, scl_inter=0)


@fault("cut short")
def truncated_label_map(subject):
    label_map(subject).write_bytes(label_map(subject).read_bytes()[:-1])


@fault("shape (6, 12, 24), but")
def label_map_of_another_shape(subject):
    reshape(label_map(subject), 6, 12, 24)


# --- places


@fault("affine differs from that of")
def shifted(subject):
    affine = np.eye(4)
    affine[0, 3] = 3
    save(image(subject), volume_of(image(subject)), affine)


@fault("affine differs from that of")
def one_flipped_image(subject):
    volume = volume_of(image(subject))
    save(image(subject), volume, np.diag([-1.0, 1, 1, 1]))


@fault("its axes run LAS, those of most subjects RAS")
def flipped(subject):
    for path in subject.glob("*.nii"):
        save(path, volume_of(path), np.diag([-1.0, 1, 1, 1]))


@fault("the affine is not finite")
def affine_that_is_no_number(subject):
    edit(image(subject), srow_x=(1, np.nan))


@fault("the affine is singular")
def singular_affine(subject):
    edit(image(subject), srow_y=np.zeros(4))


@fault("the affine holds 1e+30 mm")
def affine_beyond_the_moon(subject):
    edit(image(subject), srow_z=(3, 1e30))


@fault("the affine cannot be worked out")
def impossible_rotation(subject):
    edit(image(subject), sform_code=0, qform_code=1, quatern_b=2, quatern_c=2)


@fault("voxels measure 0 x 1 x 1 mm")
def voxels_of_size_zero(subject):
    edit(image(subject), pixdim=(1, 0))


@fault("voxels measure -1 x 1 x 1 mm")
def voxels_of_negative_size(subject):
    edit(image(subject), pixdim=(1, -1))


@fault("voxels measure 1e+05 x 1 x 1 mm")
def voxels_as_large_as_houses(subject):
    edit(image(subject), pixdim=(1, 1e5))


@fault("voxels measure nan x 1 x 1 mm")
def voxels_of_no_size(subject):
    edit(image(subject), pixdim=(1, np.nan))


@fault("its affine says 1 x 1 x 1 mm")
def two_voxel_sizes(subject):
    edit(image(subject), pixdim=(3, 4))


@fault("sform and qform place voxels up to 3 mm apart")
def two_places(subject):
    save(image(subject), volume_of(image(subject)))
    edit(image(subject), qform_code=1, quatern_b=0, quatern_c=0, quatern_d=0, qoffset_x=3)


@fault("a qform that cannot be worked out")
def impossible_rotation_beside_an_sform(subject):
    edit(image(subject), qform_code=1, quatern_b=2, quatern_c=2)


@fault("distances in micrometres")
def micrometres(subject):
    edit(image(subject), xyzt_units=3)


# --- copies; that is told of the later one in the order of names


def copy_of(path: Path, other: str) -> None:
    """Put the file of another subject in the place of a file."""
    source = path.parent.parent / other / path.name.replace(path.parent.name, other)
    path.write_bytes(source.read_bytes())


@fault("flair, t1, t1ce, t2: the same voxels as in subject good1")
def whole_copy_of_another_subject(subject):
    for path in subject.glob("*.nii"):
        copy_of(path, "good1")


@fault("t1ce: the same voxels as in subject good2")
def one_image_of_another_subject(subject):
    copy_of(image(subject), "good2")


@fault("the same voxels as its image of t1;")
def one_image_twice(subject):
    path = image(subject)
    path.write_bytes(path.with_name(f"{subject.name}_t1.nii").read_bytes())


# --- files and folders


@fault("modality t1ce is missing")
def missing_modality(subject):
    image(subject).unlink()


@fault("the label map is missing")
def missing_label_map(subject):
    label_map(subject).unlink()


@fault("modality flair is missing")
def names_that_fit_no_pattern(subject):
    for path in subject.glob("*.nii"):
        path.rename(path.with_name(f"scan-{path.name}"))


@fault("claims to be modality t1ce too")
def two_files_for_one_modality(subject):
    image(subject).with_suffix(".nii.gz").write_bytes(gzip.compress(image(subject).read_bytes()))


@fault("claims to be the label map too")
def two_label_maps(subject):
    label_map(subject).with_name(f"{subject.name}_seg.nii.old").write_bytes(b"")


@fault("Too many levels of symbolic links")
def loop_of_links(subject):
    image(subject).unlink()
    image(subject).symlink_to(image(subject).name)


@fault("No such file or directory")
def link_to_nothing(subject):
    image(subject).unlink()
    image(subject).symlink_to("moved away")


@fault("expected a file, found a folder")
def folder_called_as_a_file(subject):
    image(subject).unlink()
    image(subject).mkdir()


@fault("found a pipe or a device")
def pipe(subject):
    image(subject).unlink()
    os.mkfifo(image(subject))


@fault("found a pipe or a device")
def link_to_a_device(subject):
    image(subject).unlink()
    image(subject).symlink_to("/dev/zero")


# --- odd and sound


@sound
def big_endian(subject):
    header = nib.load(image(subject), mmap=False).header.as_byteswapped(">")
    nib.save(nib.Nifti1Image(volume_of(image(subject)), np.eye(4), header), image(subject))


@sound
def fourth_axis_of_one(subject):
    reshape(image(subject), SIZE, SIZE, SIZE, 1)


@sound
def nifti_2(subject):
    volume = volume_of(image(subject))
    nib.save(nib.Nifti2Image(volume, np.eye(4)), image(subject))


@sound
def labels_as_int64(subject):
    labels = volume_of(label_map(subject)).astype(np.int64)
    nib.save(nib.Nifti1Image(labels, np.eye(4), dtype=np.int64), label_map(subject))


@sound
def labels_as_whole_floats(subject):
    save(label_map(subject), volume_of(label_map(subject)).astype(np.float64))


@sound
def label_map_without_tumour(subject):
    save(label_map(subject), np.zeros((SIZE,) * 3, dtype=np.uint8))


@sound
def slope_of_zero(subject):
    edit(image(subject), scl_slope=0)


@sound
def slope_that_is_no_number(subject):
    edit(image(subject), scl_slope=np.nan)


@sound
def extension_that_lies_about_its_size(subject):
    content = image(subject).read_bytes()
    extension = np.array([2**31 - 16, 4], dtype=np.int32).tobytes() + bytes(8)
    image(subject).write_bytes(content[:348] + b"\1\0\0\0" + extension + content[352:])
    edit(image(subject), vox_offset=368)


@sound
def a_few_bytes_behind_the_voxels(subject):
    image(subject).write_bytes(image(subject).read_bytes() + bytes(512))


@sound
def gzip_of_several_members(subject):
    content = image(subject).read_bytes()
    path = compress(image(subject))
    path.write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]))


@sound
def folder_that_is_a_link(subject):
    elsewhere = subject.parent.parent / f"elsewhere-{subject.name}"
    subject.rename(elsewhere)
    subject.symlink_to(elsewhere)
