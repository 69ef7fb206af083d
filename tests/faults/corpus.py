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


def packed(subject: Path) -> Path:
    return image(subject).with_suffix(".nii.gz")


def append(path: Path, more: bytes) -> None:
    path.write_bytes(path.read_bytes() + more)


def shorten(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def copy_of(path: Path, other: str) -> None:
    """Put the file of another subject in the place of a file."""
    source = path.parent.parent / other / path.name.replace(path.parent.name, other)
    path.write_bytes(source.read_bytes())


@fault("damaged")
def gzip_with_a_flipped_bit(subject):
    content = bytearray(compress(image(subject)).read_bytes())
    content[-500] ^= 0x10
    packed(subject).write_bytes(bytes(content))


@fault("CRC check failed")
def gzip_with_a_wrong_checksum(subject):
    content = bytearray(compress(image(subject)).read_bytes())
    content[-8] ^= 0xFF
    packed(subject).write_bytes(bytes(content))


@fault("more than the 536,870,912 that are read")
def huge_shape_of_nifti_2(subject):
    header = nib.Nifti2Header()
    header["dim"][:4] = 3, 2**40, 2**40, 2**40
    header["vox_offset"], header["magic"] = 544, b"n+2"
    header["datatype"], header["bitpix"] = 4, 16
    image(subject).write_bytes(header.binaryblock + bytes(1000))


@fault("cut short")
def larger_shape_than_gzip_can_unfold_to(subject):
    reshape(image(subject), 800, 800, 800)
    compress(image(subject))


@fault("more than the 536,870,912 that are read")
def gzip_bomb_that_is_announced(subject):
    reshape(image(subject), 1500, 1500, 1500)
    append(compress(image(subject)), ZEROS * 410)


@fault("its axes run LAS, those of most subjects RAS")
def flipped(subject):
    for path in subject.glob("*.nii"):
        save(path, volume_of(path), np.diag([-1.0, 1, 1, 1]))


@fault("sform and qform place voxels up to 3 mm apart")
def two_places(subject):
    save(image(subject), volume_of(image(subject)))
    edit(image(subject), qform_code=1, quatern_b=0, quatern_c=0, quatern_d=0, qoffset_x=3)


@fault("flair, t1, t1ce, t2: the same voxels as in subject good1")
def whole_copy_of_another_subject(subject):
    for path in subject.glob("*.nii"):
        copy_of(path, "good1")


@fault("the same voxels as its image of t1;")
def one_image_twice(subject):
    path = image(subject)
    path.write_bytes(path.with_name(f"{subject.name}_t1.nii").read_bytes())


@fault("modality flair is missing")
def names_that_fit_no_pattern(subject):
    for path in subject.glob("*.nii"):
        path.rename(path.with_name(f"scan-{path.name}"))


def big_endian(subject):
    header = nib.load(image(subject), mmap=False).header.as_byteswapped(">")
    nib.save(nib.Nifti1Image(volume_of(image(subject)), np.eye(4), header), image(subject))


def labels_as_int64(subject):
    labels = volume_of(label_map(subject)).astype(np.int64)
    nib.save(nib.Nifti1Image(labels, np.eye(4), dtype=np.int64), label_map(subject))


def extension_that_lies_about_its_size(subject):
    content = image(subject).read_bytes()
    extension = np.array([2**31 - 16, 4], dtype=np.int32).tobytes() + bytes(8)
    image(subject).write_bytes(content[:348] + b"\1\0\0\0" + extension + content[352:])
    edit(image(subject), vox_offset=368)


def gzip_of_several_members(subject):
    content = image(subject).read_bytes()
    compress(image(subject)).write_bytes(
        gzip.compress(content[:500]) + gzip.compress(content[500:])
    )


def folder_that_is_a_link(subject):
    elsewhere = subject.parent.parent / f"elsewhere-{subject.name}"
    subject.rename(elsewhere)
    subject.symlink_to(elsewhere)


def replaced(make):
    """What takes the place of an image."""

    def put(subject):
        image(subject).unlink()
        make(image(subject))

    return put


def changed(change, path=None):
    """The bytes of an image, or of a label map, otherwise."""
    path = path or image
    return lambda s: path(s).write_bytes(change(path(s).read_bytes()))


def edited(path=None, **values):
    return lambda s: edit((path or image)(s), **values)


def shaped(*shape, path=None):
    return lambda s: reshape((path or image)(s), *shape)


def labelled(value, dtype=np.float32):
    return lambda s: set_value(label_map(s), value, dtype)


def valued(value, dtype=np.float32):
    return lambda s: set_value(image(s), value, dtype)


def filled(value, dtype):
    return lambda s: save(image(s), np.full((SIZE,) * 3, value, dtype=dtype))


COLOURS = [("R", "u1"), ("G", "u1"), ("B", "u1")]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"
PAGE = b"\n<!DOCTYPE html><html><body>Log in</body></html>"
ELSEWHERE = np.eye(4) + 3 * np.eye(4, k=3)
#: Name to what makes the fault, and the words.
TABLE = {
    "empty_file": (changed(lambda _: b""), "the file is empty"),
    "text_file": (changed(lambda _: b"not an image\n" * 100), "does not begin with the header"),
    "png_file": (changed(lambda _: b"\x89PNG\r\n\x1a\n" + bytes(999)), "does not begin with"),
    "shorter_than_a_header": (changed(lambda c: c[:200]), "does not begin with the header"),
    "header_alone": (changed(lambda c: c[:352]), "cut short"),
    "truncated": (changed(lambda c: c[:-100]), "cut short"),
    "truncated_gzip": (lambda s: shorten(compress(image(s)), 700), "cut short"),
    "truncated_label_map": (changed(lambda c: c[:-1], label_map), "cut short"),
    "gzip_bomb_behind_the_voxels": (lambda s: append(compress(image(s)), ZEROS * 256), "goes on"),
    "much_behind_the_voxels": (changed(lambda c: c + bytes(2**21)), "goes on for"),
    "gzip_called_nii": (changed(gzip.compress), "the content is compressed"),
    "nii_called_gzip": (lambda s: image(s).rename(packed(s)), "the content is not compressed"),
    "git_lfs_pointer": (changed(lambda _: LFS), "a Git LFS pointer"),
    "web_page": (lambda s: compress(image(s)).write_bytes(PAGE), "a web page"),
    "wrong_magic": (edited(magic=b"abc"), "found b'abc'"),
    "header_of_a_pair": (edited(magic=b"ni1"), "found b'ni1'"),
    "four_axes": (shaped(12, 12, 6, 2), "expected three axes, found shape (12, 12, 6, 2)"),
    "two_axes": (shaped(12, 144), "expected three axes, found shape (12, 144)"),
    "one_axis": (shaped(1728), "expected three axes, found shape (1728,)"),
    "axis_of_size_zero": (shaped(12, 0, 12), "the header tells of 3 axes"),
    "axis_of_negative_size": (shaped(12, -12, 12), "the header tells of 3 axes"),
    "no_axes": (edited(dim=(0, 0)), "the header tells of 0 axes"),
    "nine_axes": (edited(dim=(0, 9)), "the header tells of 9 axes"),
    "another_shape": (shaped(12, 12, 11), "shape (12, 12, 11), but"),
    "label_map_of_another_shape": (shaped(6, 12, 24, path=label_map), "shape (6, 12, 24), but"),
    "huge_shape": (shaped(32767, 32767, 32767), "more than the 536,870,912 that are read"),
    "larger_shape_than_the_file": (shaped(800, 800, 800), "cut short"),
    "voxels_begin_behind_the_end": (edited(vox_offset=1_000_000), "cut short"),
    "voxels_begin_nowhere": (edited(vox_offset=1e30), "voxels begin at byte 1e+30"),
    "voxels_begin_at_nan": (edited(vox_offset=np.nan), "voxels begin at byte nan"),
    "voxels_begin_in_the_header": (edited(vox_offset=0), "voxels begin at byte 0"),
    "unknown_type": (edited(datatype=999), "a data type 999 that is not known"),
    "wrong_number_of_bits": (edited(bitpix=8), "int16, of 8 bits"),
    "complex_numbers": (filled(1, np.complex64), "complex64"),
    "colours": (filled(1, COLOURS), "expected plain numbers"),
    "infinite_slope": (edited(scl_slope=np.inf), "the header scales voxels by inf"),
    "intercept_that_is_no_number": (edited(scl_slope=2, scl_inter=np.nan), "intercept nan"),
    "enormous_slope": (edited(scl_slope=1e38, scl_inter=0), "too large for single precision"),
    "enormous_values": (valued(1e300, np.float64), "too large for single precision"),
    "all_nan": (filled(np.nan, np.float32), "1728 voxels are not finite"),
    "one_nan": (valued(np.nan), "1 voxels are not finite"),
    "one_infinity": (valued(np.inf), "1 voxels are not finite"),
    "one_negative_infinity": (valued(-np.inf), "1 voxels are not finite"),
    "all_zero": (filled(0, np.int16), "empty, all zero"),
    "constant": (filled(7, np.int16), "every voxel is 7"),
    "label_seven": (labelled(7, np.uint8), "unknown label 7 in 1 voxels"),
    "negative_label": (labelled(-1, np.int16), "unknown label -1 in 1 voxels"),
    "label_between_two": (labelled(1.5), "unknown label 1.5 in 1 voxels"),
    "label_that_is_no_number": (labelled(np.nan), "unknown label nan in 1 voxels"),
    "label_beyond_its_type": (labelled(60000 - 2**16, np.int16), "unknown label -5536"),
    "scaled_labels": (edited(label_map, scl_slope=0.5, scl_inter=0), "unknown label 0.5"),
    "label_almost_whole": (labelled(1.00235), "unknown label 1.00234997 in 1 voxels"),
    "affine_that_is_no_number": (edited(srow_x=(1, np.nan)), "it is not finite"),
    "singular_affine": (edited(srow_y=np.zeros(4)), "it is singular"),
    "affine_beyond_the_moon": (edited(srow_z=(3, 1e30)), "it holds 1e+30 mm"),
    "impossible_rotation": (
        edited(sform_code=0, qform_code=1, quatern_b=2, quatern_c=2),
        "the affine cannot be used",
    ),
    "impossible_rotation_beside_an_sform": (
        edited(qform_code=1, quatern_b=2, quatern_c=2),
        "a qform that cannot be worked out",
    ),
    "voxels_of_size_zero": (edited(pixdim=(1, 0)), "voxels measure 0 x 1 x 1 mm"),
    "voxels_of_negative_size": (edited(pixdim=(1, -1)), "voxels measure -1 x 1 x 1 mm"),
    "voxels_as_large_as_houses": (edited(pixdim=(1, 1e5)), "voxels measure 1e+05 x 1 x 1 mm"),
    "voxels_of_no_size": (edited(pixdim=(1, np.nan)), "voxels measure nan x 1 x 1 mm"),
    "two_voxel_sizes": (edited(pixdim=(3, 4)), "its affine says 1 x 1 x 1 mm"),
    "micrometres": (edited(xyzt_units=3), "distances in micrometres"),
    "shifted": (lambda s: save(image(s), volume_of(image(s)), ELSEWHERE), "affine differs from"),
    "one_flipped_image": (
        lambda s: save(image(s), volume_of(image(s)), np.diag([-1.0, 1, 1, 1])),
        "affine differs from that of",
    ),
    "one_image_of_another_subject": (
        lambda s: copy_of(image(s), "good2"),
        "t1ce: the same voxels as in subject good2",
    ),
    "missing_modality": (
        lambda s: image(s).unlink(),
        "modality t1ce is missing, expected missing_modality/missing_modality_t1ce.nii*",
    ),
    "missing_label_map": (lambda s: label_map(s).unlink(), "the label map is missing"),
    "two_files_for_one_modality": (
        lambda s: packed(s).write_bytes(gzip.compress(image(s).read_bytes())),
        "claims to be modality t1ce too",
    ),
    "two_label_maps": (
        lambda s: label_map(s).with_name(f"{s.name}_seg.nii.old").write_bytes(b""),
        "claims to be the label map too",
    ),
    "loop_of_links": (
        replaced(lambda p: p.symlink_to(p.name)),
        "Too many levels of symbolic links",
    ),
    "link_to_nothing": (replaced(lambda p: p.symlink_to("moved")), "No such file or directory"),
    "folder_called_as_a_file": (replaced(Path.mkdir), "expected a file, found a folder"),
    "pipe": (replaced(os.mkfifo), "a pipe or a device"),
    "link_to_a_device": (replaced(lambda p: p.symlink_to("/dev/zero")), "a pipe or a device"),
}
FAULTS |= TABLE
SOUND |= {
    "nifti_2": lambda s: nib.save(nib.Nifti2Image(volume_of(image(s)), np.eye(4)), image(s)),
    "labels_with_a_slope": edited(label_map, scl_slope=0.99999994, scl_inter=0),
    "fourth_axis_of_one": shaped(SIZE, SIZE, SIZE, 1),
    "labels_as_whole_floats": lambda s: save(
        label_map(s), volume_of(label_map(s)).astype(np.float64)
    ),
    "label_map_without_tumour": lambda s: save(label_map(s), np.zeros((SIZE,) * 3, dtype=np.uint8)),
    "slope_of_zero": edited(scl_slope=0),
    "affine_that_was_rounded": lambda s: save(
        image(s), volume_of(image(s)), np.eye(4) + 1e-5 * np.eye(4, k=3)
    ),
    "slope_that_is_no_number": edited(scl_slope=np.nan),
    "a_few_bytes_behind_the_voxels": changed(lambda c: c + bytes(512)),
} | {
    make.__name__: make
    for make in (
        *(big_endian, labels_as_int64, extension_that_lies_about_its_size),
        *(gzip_of_several_members, folder_that_is_a_link),
    )
}
