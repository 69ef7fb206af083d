"""What both pages share."""

import pytest

from kdnet.errors import UserError
from kdnet.results.page import duration, flat, read_mapping


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.26, "0.3 s"),
        (59.4, "59.4 s"),
        (61, "1 min 1 s"),
        (3600, "1 h 0 min"),
        (7325, "2 h 2 min"),
    ],
)
def test_times_are_said_in_the_unit_that_fits(seconds, said):
    assert duration(seconds) == said


def test_nested_values_are_brought_to_one_level():
    assert flat({"a": 1, "b": {"c": 2, "d": {"e": [3]}}}) == {"a": 1, "b: c": 2, "b: d: e": [3]}


def test_missing_file_is_empty(tmp_path):
    assert read_mapping(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [("[1, 2]", "expected keys and values, found list"), ("{", "expected YAML or JSON")],
)
def test_damaged_file_is_explained(tmp_path, content, said):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_mapping(path)
