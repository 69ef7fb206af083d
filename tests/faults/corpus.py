"""Broken subjects, made by code: what makes each fault, and the words that a report must hold.

Every fault starts from a sound subject of 12 x 12 x 12 voxels.
"""

import gzip
import os
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from written import SIZE, write_subject, write_volume

#: A file of compressed zeros may consist of any number of these: 16 MiB each, 16 kB on disk.
ZEROS = gzip.compress(bytes(2**24), compresslevel=6)
#: Faults that lie in the name of the subject itself.
NAMES = {
    "new\nline": "cannot be printed",
    "escape\x1b[31m": "cannot be printed",
    "right\u202eleft": "cannot be printed",
    os.fsdecode(b"no-text-\xff"): "cannot be printed",
    "long-" + "x" * 230: "longer than 180 bytes",
}
SOUND_NAMES = ("name with spaces", "Ünïcode-脑", "[red]markup", "<script>alert(1)<", "a=b;c&d")


def write_corpus(root, good=4):
    """Write sound subjects, odd ones, and one for every fault; each is called as its fault."""
    for name in (*(f"good{number}" for number in range(good)), *SOUND_NAMES, *NAMES):
        write_subject(root / name)
    for name, make in (SOUND | {name: make for name, (make, _) in FAULTS.items()}).items():
        make(write_subject(root / name))
    return root


def volume_of(path):
    """Read whole, as the file is to be written over."""
    return np.asarray(nib.load(path, mmap=False).dataobj)


def image(subject):
    return subject / f"{subject.name}_t1ce.nii"


def label_map(subject):
    return subject / f"{subject.name}_seg.nii"


def packed(subject):
    return image(subject).with_suffix(".nii.gz")


def copy_of(path, other):
    """Put the file of another subject in the place of a file."""
    source = path.parent.parent / other / path.name.replace(path.parent.name, other)
    path.write_bytes(source.read_bytes())


# Functions that give what makes a fault.


def changed(change, path=image):
    """The bytes of an image, or of a label map, otherwise."""
    return lambda s: path(s).write_bytes(change(path(s).read_bytes()))


def zipped(change=bytes):
    """The compressed form instead of an image, with other bytes."""

    def make(subject):
        packed(subject).write_bytes(change(gzip.compress(image(subject).read_bytes())))
        image(subject).unlink()

    return make


def flip(place, bits):
    return lambda content: content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]


def edited(path=image, **values):
    """Other fields of a header, whatever sense that makes; `dim=(place, number)`."""

    def edit(content):
        header = nib.Nifti1Header(content[:348], check=False)
        for name, value in values.items():
            if isinstance(value, tuple):
                header[name][value[0]] = value[1]
            else:
                header[name] = value
        return header.binaryblock + content[348:]

    return changed(edit, path)


def shaped(*shape, path=image):
    """A header that promises another shape than the file holds."""
    return edited(path, dim=np.array([len(shape), *shape, *[1] * (7 - len(shape))]))


def stored(volume=None, affine=None, path=image):
    """Another volume, or the same one elsewhere."""
    return lambda s: write_volume(path(s), volume_of(path(s)) if volume is None else volume, affine)


def filled(value, dtype):
    return stored(np.full((SIZE,) * 3, value, dtype=dtype))


def valued(value, dtype=np.float32, path=image):
    """One voxel of another value."""

    def make(subject):
        volume = volume_of(path(subject)).astype(dtype)
        volume[0, 0, 0] = value
        write_volume(path(subject), volume)

    return make


labelled = partial(valued, path=label_map)


def replaced(make):
    """What takes the place of an image."""

    def put(subject):
        image(subject).unlink()
        make(image(subject))

    return put


def together(*makes):
    return lambda s: [make(s) for make in makes]


def of_all(make):
    """The same with every file of a subject."""
    return lambda s: [make(path) for path in sorted(s.glob("*.nii"))]


def huge_shape_of_nifti_2(subject):
    header = nib.Nifti2Header()
    header["dim"][:4] = 3, 2**40, 2**40, 2**40
    header["vox_offset"], header["magic"] = 544, b"n+2"
    header["datatype"], header["bitpix"] = 4, 16
    image(subject).write_bytes(header.binaryblock + bytes(1000))


def big_endian(subject):
    header = nib.load(image(subject), mmap=False).header.as_byteswapped(">")
    nib.save(nib.Nifti1Image(volume_of(image(subject)), np.eye(4), header), image(subject))


def labels_as_int64(subject):
    labels = volume_of(label_map(subject)).astype(np.int64)
    nib.save(nib.Nifti1Image(labels, np.eye(4), dtype=np.int64), label_map(subject))


def with_an_extension(content):
    """That lies about its size."""
    extension = np.array([2**31 - 16, 4], dtype=np.int32).tobytes() + bytes(8)
    return content[:348] + b"\1\0\0\0" + extension + content[352:]


def in_two_members(content):
    content = gzip.decompress(content)
    return gzip.compress(content[:500]) + gzip.compress(content[500:])


def folder_that_is_a_link(subject):
    elsewhere = subject.parent.parent / f"elsewhere-{subject.name}"
    subject.rename(elsewhere)
    subject.symlink_to(elsewhere)


COLOURS = [("R", "u1"), ("G", "u1"), ("B", "u1")]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"
PAGE = b"\n<!DOCTYPE html><html><body>Log in</body></html>"
ELSEWHERE, MIRRORED = np.eye(4) + 3 * np.eye(4, k=3), np.diag([-1.0, 1, 1, 1])
QFORM = {"qform_code": 1, "quatern_b": 0, "quatern_c": 0, "quatern_d": 0, "qoffset_x": 3}
TOO_LARGE = "more than the 536,870,912 that are read"
#: Name of a fault to what makes it and what the report must say of it.
FAULTS = {
    "empty_file": (changed(lambda _: b""), "the file is empty"),
    "text_file": (changed(lambda _: b"not an image\n" * 100), "does not begin with the header"),
    "png_file": (changed(lambda _: b"\x89PNG\r\n\x1a\n" + bytes(999)), "does not begin with"),
    "shorter_than_a_header": (changed(lambda c: c[:200]), "does not begin with the header"),
    "header_alone": (changed(lambda c: c[:352]), "cut short"),
    "truncated": (changed(lambda c: c[:-100]), "cut short"),
    "truncated_gzip": (zipped(lambda c: c[:-700]), "cut short"),
    "truncated_label_map": (changed(lambda c: c[:-1], label_map), "cut short"),
    "gzip_bomb_behind_the_voxels": (zipped(lambda c: c + ZEROS * 256), "goes on"),
    "much_behind_the_voxels": (changed(lambda c: c + bytes(2**21)), "goes on for"),
    "gzip_bomb_that_is_announced": (
        together(shaped(1500, 1500, 1500), zipped(lambda c: c + ZEROS * 410)),
        TOO_LARGE,
    ),
    "larger_shape_than_gzip_can_unfold_to": (
        together(shaped(800, 800, 800), zipped()),
        "cut short",
    ),
    "gzip_with_a_flipped_bit": (zipped(flip(-500, 0x10)), "damaged"),
    "gzip_with_a_wrong_checksum": (zipped(flip(-8, 0xFF)), "CRC check failed"),
    "gzip_called_nii": (changed(gzip.compress), "the content is compressed"),
    "nii_called_gzip": (lambda s: image(s).rename(packed(s)), "the content is not compressed"),
    "git_lfs_pointer": (changed(lambda _: LFS), "a Git LFS pointer"),
    "web_page": (zipped(lambda _: PAGE), "a web page"),
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
    "huge_shape_of_nifti_2": (huge_shape_of_nifti_2, TOO_LARGE),
    "huge_shape": (shaped(32767, 32767, 32767), TOO_LARGE),
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
    "shifted": (stored(affine=ELSEWHERE), "affine differs from"),
    "one_flipped_image": (stored(affine=MIRRORED), "affine differs from that of"),
    "flipped": (
        of_all(lambda p: write_volume(p, volume_of(p), MIRRORED)),
        "its axes run LAS, those of most subjects RAS",
    ),
    "two_places": (
        together(stored(), edited(**QFORM)),
        "sform and qform place voxels up to 3 mm apart",
    ),
    "whole_copy_of_another_subject": (
        of_all(lambda p: copy_of(p, "good1")),
        "flair, t1, t1ce, t2: the same voxels as in subject good1",
    ),
    "one_image_twice": (
        lambda s: image(s).write_bytes((s / f"{s.name}_t1.nii").read_bytes()),
        "the same voxels as its image of t1;",
    ),
    "names_that_fit_no_pattern": (
        of_all(lambda p: p.rename(p.with_name(f"scan-{p.name}"))),
        "modality flair is missing",
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
#: Subjects that look odd and are sound.
SOUND = {
    "nifti_2": lambda s: nib.save(nib.Nifti2Image(volume_of(image(s)), np.eye(4)), image(s)),
    "labels_with_a_slope": edited(label_map, scl_slope=0.99999994, scl_inter=0),
    "fourth_axis_of_one": shaped(SIZE, SIZE, SIZE, 1),
    "labels_as_whole_floats": labelled(0, np.float64),
    "label_map_without_tumour": stored(np.zeros((SIZE,) * 3, dtype=np.uint8), path=label_map),
    "slope_of_zero": edited(scl_slope=0),
    "affine_that_was_rounded": stored(affine=np.eye(4) + 1e-5 * np.eye(4, k=3)),
    "slope_that_is_no_number": edited(scl_slope=np.nan),
    "a_few_bytes_behind_the_voxels": changed(lambda c: c + bytes(512)),
    "big_endian": big_endian,
    "labels_as_int64": labels_as_int64,
    "extension_that_lies_about_its_size": together(
        changed(with_an_extension), edited(vox_offset=368)
    ),
    "gzip_of_several_members": zipped(in_two_members),
    "folder_that_is_a_link": folder_that_is_a_link,
}
