import pytest

from privdistill import exceptions


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (exceptions.LayerNotFoundError, ValueError),
        (exceptions.ShapeMismatchError, ValueError),
        (exceptions.ModalityError, ValueError),
        (exceptions.ObjectiveError, ValueError),
        (exceptions.LifecycleError, RuntimeError),
    ],
)
def test_each_error_is_also_a_builtin(error, builtin):
    assert issubclass(error, exceptions.PrivDistillError)
    assert issubclass(error, builtin)
