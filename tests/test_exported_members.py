import privdistill


def test_every_exported_name_exists_and_is_sorted():
    assert privdistill.__all__ == sorted(privdistill.__all__)
    assert all(hasattr(privdistill, name) for name in privdistill.__all__)


def test_public_names_are_those_of_the_documentation():
    public = {name for name in vars(privdistill) if not name.startswith("_")}
    modules = {"dry_run", "exceptions", "inputs", "losses", "output", "taps", "teachers", "wrapper"}
    assert public - modules == set(privdistill.__all__)
