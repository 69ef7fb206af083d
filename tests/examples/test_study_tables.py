"""Tables of a study: the numbers of a small one, written out."""

from dataclasses import replace

from invented_runs import invented_facts, invented_study
from kdnet.studies.analysis import analyse
from kdnet.studies.rows import Study
from kdnet.studies.tables import all_tables, gain_table, unit_table

TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


def tables(rows, **changes):
    found = all_tables(analyse(Study(invented_facts(**changes), rows), "native", resamples=100))
    return {table.title.split(",")[0]: table for table in found}


def test_all_tables_are_there_in_order():
    assert list(tables(invented_study())) == [
        "Dice",
        "Gain in Dice over the baseline with as many labels",
        "Gain in Dice over the baseline with most labels",
        "Gain in Dice per fold and seed",
        "Gain against the teacher's lead",
        "Gain in Dice per quarter of the teacher's lead",
    ]


def test_constant_gain_is_written_with_its_interval_and_counts():
    rows = invented_study({"chosen": 0.1}, noise=0.0, labelled=(20,))
    (line,) = tables(rows)["Gain in Dice over the baseline with as many labels"].rows
    assert line == [
        *("20 labelled", "chosen recipe", "tumour", "+0.100 (+0.100 to +0.100)"),
        *("< 0.001", "< 0.001", "20 / 0", "100 %", f"2 {TIMES} 2", "40", "20", f"{TIMES} 1.00"),
    ]


def test_dice_have_spread_units_and_steps():
    rows = [replace(row, dice=0.25) for row in invented_study(labelled=(20,))]
    first = tables(rows)["Dice"].rows[0]
    assert first[:5] == ["20 labelled", "baseline", "tumour", "0.250 ± 0.000", "0.250 to 0.250"]
    assert first[5:] == [f"2 {TIMES} 2", "200", "20"]


def test_gains_are_given_per_fold_and_seed():
    rows = [
        replace(row, dice=row.dice + 0.1 * row.fold + 0.02 * row.seed)
        if row.kind == "chosen"
        else row
        for row in invented_study({"chosen": 0.1}, noise=0.0, labelled=(20,))
    ]
    table = tables(rows)["Gain in Dice per fold and seed"]
    assert table.columns[3:] == ["fold", "seed 0", "seed 1", "mean", "teacher's lead"]
    assert [line[3:] for line in table.rows] == [
        ["0", "+0.100", "+0.120", "+0.110", "+0.300"],
        ["1", "+0.200", "+0.220", "+0.210", "+0.300"],
    ]


def test_unit_that_was_not_run_is_a_dash_and_counted():
    rows = [row for row in invented_study() if row.kind != "chosen" or row.unit != (1, 1)]
    found = analyse(Study(invented_facts(), rows), "native", resamples=100)
    assert unit_table(found).rows[1][5] == DASH
    assert gain_table(found).rows[0][8] == f"3 of 2 {TIMES} 2"


def test_few_cases_have_no_interval_and_the_table_says_why():
    table = tables(invented_study(cases=4))["Gain in Dice over the baseline with as many labels"]
    assert table.rows[0][3].endswith("(none)")
    assert table.rows[0][4:6] == [DASH, DASH]
    assert "No interval: 4 cases; at least 6 are needed." in table.notes
    assert "No p: 4 paired cases; at least 6 are needed." in table.notes


def test_one_seed_is_remarked():
    key = "Gain in Dice over the baseline with as many labels"
    remark = "Where there is one seed, the interval holds the choice of cases alone."
    assert remark in tables(invented_study(seeds=(0,)))[key].notes
    assert remark not in tables(invented_study())[key].notes


def test_phantoms_are_called_so_in_every_title():
    found = all_tables(
        analyse(Study(invented_facts(phantom=True), invented_study()), "native", resamples=100)
    )
    assert all(table.title.endswith("native space, PHANTOM") for table in found)
