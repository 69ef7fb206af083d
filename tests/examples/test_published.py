import pytest

from kdnet.results.published import (
    PROTOCOLS,
    PUBLISHED,
    T1CE_ONLY,
    TABLE_ONE,
    TABLE_TWO,
    published,
    published_row,
)


@pytest.mark.parametrize("table", [TABLE_ONE, TABLE_TWO])
def test_gain_of_the_paper_over_its_baseline(table):
    """WT, which the other modalities show best, gains nothing."""
    ours, theirs = published_row(table, "kdnet"), published_row(table, "baseline")
    gain = [round(ours.regions[r][0] - theirs.regions[r][0], 2) for r in ("ET", "TC", "WT")]
    assert gain == [3.57, 1.17, -0.08]


def test_rows_of_both_tables_of_the_paper():
    assert [row.row for row in published(TABLE_ONE)] == [
        "baseline",
        "teacher",
        "uhved",
        "hemis",
        "kdnet",
    ]
    names = ["baseline", "teacher", "gt_kl", "gt_kd", "kdnet"]
    assert [row.row for row in published(TABLE_TWO)] == [
        *names,
        *(f"{name}_0skips" for name in names),
    ]
    assert all(sd is not None for row in published(TABLE_TWO) for _, sd in row.regions.values())


def test_every_number_has_its_protocol_and_source_and_is_per_cent():
    for row in PUBLISHED:
        assert row.protocol in PROTOCOLS.values()
        assert row.source
        assert list(row.regions) == ["ET", "TC", "WT"]
        assert all(10 < mean < 100 for mean, _ in row.regions.values())


def test_every_protocol_is_used():
    assert {row.protocol for row in PUBLISHED} == set(PROTOCOLS.values())


def test_kdnet_circulates_with_three_values():
    values = {row.regions["ET"][0] for row in published(T1CE_ONLY) if row.row.startswith("KD-Net")}
    assert values == {71.67, 75.32, 70.52}


def test_unknown_rows_have_no_numbers():
    assert published_row(TABLE_ONE, "gated_fusion") is None
    assert published("Table 9") == []
