from types import ModuleType

import privdistill


def test_every_exported_name_exists_and_is_sorted():
    assert privdistill.__all__ == sorted(privdistill.__all__)
    assert all(hasattr(privdistill, name) for name in privdistill.__all__)


def test_nothing_else_is_public():
    public = {
        name
        for name, value in vars(privdistill).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    later = {"Diagnosis", "assert_no_leak", "describe", "diagnose"}
    later |= {"fit_temperature", "target_agreement"}  # imported when they are asked for
    assert public | later == set(privdistill.__all__)


def test_what_is_not_there_is_an_error_as_ever():
    assert not hasattr(privdistill, "distil")
