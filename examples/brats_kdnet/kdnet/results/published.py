"""Numbers that others published, each with the protocol it was measured under.

Differences between protocols move Dice by more points than most methods do, so no number is shown
without its own. All values are Dice in per cent.
"""

from __future__ import annotations

from dataclasses import dataclass

TABLE_ONE = "Table 1"
TABLE_TWO = "Table 2"
T1CE_ONLY = "BraTS 2018, T1ce alone"

KDNET_PAPER = "Hu, Maillard et al. 2020, arXiv:2106.09564"

PROTOCOLS = {
    "paper": (
        "BraTS 2018 training set, 285 subjects, three folds of 95 (lists not published); central "
        "128³ crop at 64³, apparently scored there, so tumour outside the crop does not count; "
        "choice of epoch, rule for an empty ET and post-processing not stated"
    ),
    "other split": (
        "BraTS 2018, three repeated random splits into 199/29/57 subjects, patches of 112³, full "
        "resolution; another resolution and other subjects than the rows beside it"
    ),
    "random splits": (
        "BraTS 2018, the 199/29/57 lists of Dorent et al. 2019; brain box at 1 mm, sliding window; "
        "last epoch; any false alarm in an empty ET counts about 0; whether ET below 500 voxels "
        "was removed is seldom said"
    ),
    "server": (
        "BraTS 2018, trained on all 285 subjects; the 66 validation subjects scored by the "
        "official server"
    ),
    "server, post-processed": (
        "as before, with small components removed and ET below 500 voxels turned into core"
    ),
    "validation choice": (
        "BraTS 2018, 200/28/57 subjects; 140 x 192 x 192 crop at 1 mm; best epoch on the "
        "validation subjects; both empty counts 1"
    ),
    "test choice": (
        "BraTS 2018, three folds of 95; 160 x 192 x 128 crop; best epoch on the scored fold, "
        "which is a choice on the test subjects"
    ),
    "test choice, HGG alone": (
        "BraTS 2018, 57 subjects that all have high-grade glioma serve for validation and test; "
        "best epoch on them, which is a choice on the test subjects"
    ),
    "not stated": "BraTS 2018; where the number comes from and how it was measured is not stated",
    "overlap": (
        "trained on BraTS 2021, which probably holds the scored BraTS 2018 subjects; mean of five "
        "networks; not comparable"
    ),
}


@dataclass(frozen=True)
class PublishedRow:
    """One row of somebody's table.

    Attributes:
        table: Which table it belongs to.
        row: Name of the row in the tables of this application, or of the method.
        regions: Region to mean and standard deviation over folds, per cent; None where no
            deviation was published.
        protocol: How it was measured, in words.
        source: Where it was read.
    """

    table: str
    row: str
    regions: dict[str, tuple[float, float | None]]
    protocol: str
    source: str


def published(table: str) -> list[PublishedRow]:
    """The published rows of one table."""
    return [row for row in PUBLISHED if row.table == table]


def published_row(table: str, name: str) -> PublishedRow | None:
    """The published numbers of one row."""
    return next((row for row in published(table) if row.row == name), None)


def _row(
    table: str,
    name: str,
    means: tuple[float, float, float],
    protocol: str,
    source: str,
    *,
    sds: tuple[float, float, float] | None = None,
) -> PublishedRow:
    pairs = zip(means, sds or (None, None, None), strict=True)
    values = dict(zip(("ET", "TC", "WT"), pairs, strict=True))
    return PublishedRow(table, name, values, PROTOCOLS[protocol], source)


def _paper(
    table: str,
    name: str,
    means: tuple[float, float, float],
    sds: tuple[float, float, float],
) -> PublishedRow:
    return _row(table, name, means, "paper", f"{KDNET_PAPER}, {table}", sds=sds)


def _t1ce(name: str, means: tuple[float, float, float], protocol: str, source: str) -> PublishedRow:
    return _row(T1CE_ONLY, name, means, protocol, source)


_BASELINE = ((68.10, 80.28, 77.06), (1.27, 2.44, 1.47))
_TEACHER = ((69.47, 80.77, 88.48), (1.86, 1.18, 0.79))
_KDNET = ((71.67, 81.45, 76.98), (1.22, 1.25, 1.54))
_QUOTED = f"{KDNET_PAPER}, Table 1, quoting Dorent et al. 2019"
_SHASPEC = "ShaSpec (CVPR 2023), Table {}, read in a copy"
_DEMOSEG = "DeMoSeg (MICCAI 2024), results of its repository, read from an image"
_PROTOKD = "ProtoKD (ICASSP 2023), results of its repository, read from an image"
_SMUNET = "SMU-Net, results of its repository, read from an image"
_PRISMS = "PRISMS, documentation of a student project"

PUBLISHED: tuple[PublishedRow, ...] = (
    _paper(TABLE_ONE, "baseline", *_BASELINE),
    _paper(TABLE_ONE, "teacher", *_TEACHER),
    _row(TABLE_ONE, "uhved", (65.5, 66.7, 62.4), "other split", _QUOTED),
    _row(TABLE_ONE, "hemis", (60.8, 58.5, 58.5), "other split", _QUOTED),
    _paper(TABLE_ONE, "kdnet", *_KDNET),
    _paper(TABLE_TWO, "baseline", *_BASELINE),
    _paper(TABLE_TWO, "teacher", *_TEACHER),
    _paper(TABLE_TWO, "gt_kl", (70.00, 80.85, 77.08), (1.51, 1.82, 1.29)),
    _paper(TABLE_TWO, "gt_kd", (69.22, 80.54, 76.83), (1.19, 1.66, 1.36)),
    _paper(TABLE_TWO, "kdnet", *_KDNET),
    _paper(TABLE_TWO, "baseline_0skips", (42.95, 69.44, 69.41), (3.42, 1.37, 1.52)),
    _paper(TABLE_TWO, "teacher_0skips", (42.59, 69.79, 75.93), (2.54, 1.63, 0.33)),
    _paper(TABLE_TWO, "gt_kl_0skips", (47.59, 70.96, 71.41), (0.98, 1.73, 1.20)),
    _paper(TABLE_TWO, "gt_kd_0skips", (44.80, 70.12, 70.19), (1.10, 2.42, 1.40)),
    _paper(TABLE_TWO, "kdnet_0skips", (46.23, 70.73, 71.93), (2.91, 2.47, 1.26)),
    _t1ce("KD-Net", _KDNET[0], "paper", f"{KDNET_PAPER}, Table 1"),
    _t1ce("baseline of KD-Net", _BASELINE[0], "paper", f"{KDNET_PAPER}, Table 1"),
    _t1ce("U-HeMIS", (60.8, 58.5, 58.5), "other split", _QUOTED),
    _t1ce("U-HVED", (65.5, 66.7, 62.4), "other split", _QUOTED),
    _t1ce("RFNet", (69.43, 80.99, 74.93), "random splits", _DEMOSEG),
    _t1ce("mmFormer, trained again", (76.02, 80.68, 77.11), "random splits", _DEMOSEG),
    _t1ce("MAVP", (75.87, 80.49, 77.40), "random splits", _DEMOSEG),
    _t1ce("GSS", (77.10, 82.32, 78.47), "random splits", _DEMOSEG),
    _t1ce("DeMoSeg", (78.98, 84.81, 81.99), "random splits", _DEMOSEG),
    _t1ce("U-HeMIS, trained again", (57.08, 62.49, 55.82), "random splits", _PRISMS),
    _t1ce("U-HVED, trained again", (59.49, 67.79, 61.41), "random splits", _PRISMS),
    _t1ce("RobustMSeg, trained again", (63.99, 77.43, 70.66), "random splits", _PRISMS),
    _t1ce("RFNet, trained again", (74.47, 81.88, 76.33), "random splits", _PRISMS),
    _t1ce("mmFormer, trained again", (75.37, 79.01, 75.24), "random splits", _PRISMS),
    _t1ce("PRISMS", (78.92, 82.60, 77.78), "random splits", _PRISMS),
    _t1ce("V-Net", (76.36, 73.30, 71.41), "validation choice", _PROTOKD),
    _t1ce("PMKL", (75.54, 76.92, 70.50), "validation choice", _PROTOKD),
    _t1ce("ProtoKD", (76.01, 81.48, 74.67), "validation choice", _PROTOKD),
    _t1ce(
        "KD-Net, printed by ProtoKD",
        (70.52, 80.83, 78.87),
        "validation choice",
        f"{_PROTOKD}; not said whether trained there or copied",
    ),
    _t1ce("ShaSpec, all subsets", (73.29, 78.65, 73.82), "server", _SHASPEC.format(1)),
    _t1ce("ShaSpec, T1ce alone", (75.91, 84.19, 80.43), "server", _SHASPEC.format(2)),
    _t1ce(
        "ShaSpec, all subsets, post-processed",
        (75.80, 81.40, 74.95),
        "server, post-processed",
        _SHASPEC.format(1),
    ),
    _t1ce(
        "ShaSpec, T1ce alone, post-processed",
        (78.40, 85.47, 80.55),
        "server, post-processed",
        _SHASPEC.format(2),
    ),
    _t1ce("U-HeMIS, printed by ShaSpec", (62.02, 65.29, 61.53), "not stated", _SHASPEC.format(1)),
    _t1ce("U-HVED, printed by ShaSpec", (57.64, 59.59, 53.62), "not stated", _SHASPEC.format(1)),
    _t1ce("RobustMSeg", (67.07, 76.83, 73.31), "not stated", _SHASPEC.format(1)),
    _t1ce("mmFormer", (72.60, 75.41, 72.22), "not stated", _SHASPEC.format(1)),
    _t1ce("KD-Net, printed by ShaSpec", (75.32, 81.89, 76.79), "not stated", _SHASPEC.format(2)),
    _t1ce("ACN, printed by ShaSpec", (78.07, 84.18, 80.52), "not stated", _SHASPEC.format(2)),
    _t1ce("ACN", (78.0, 83.3, 79.8), "test choice", _SMUNET),
    _t1ce("SMU-Net", (78.3, 84.1, 80.3), "test choice, HGG alone", _SMUNET),
    _t1ce("MTCM-KD", (90.7, 91.2, 88.0), "overlap", "MTCM-KD, results files of a fork"),
)
