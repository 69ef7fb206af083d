import pytest
import torch

from privdistill import ObjectiveError
from privdistill.integrations.batch import check_names, step_arguments

IMAGE, TARGET = torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4)


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        ((IMAGE, TARGET), {}),
        ([IMAGE, TARGET], {}),
        ({"image": IMAGE, "target": TARGET, "affine": 1}, {}),
        ({"scan": IMAGE, "label": TARGET}, {"image": "scan", "target": "label"}),
    ],
)
def test_image_and_target_are_found(batch, names):
    assert step_arguments(batch, names) == {"image": IMAGE, "target": TARGET}


@pytest.mark.parametrize("batch", [IMAGE, [IMAGE], {"image": IMAGE}])
def test_a_batch_may_be_without_a_target(batch):
    assert step_arguments(batch, {}) == {"image": IMAGE}


def test_a_missing_entry_is_named_with_those_that_are_there():
    with pytest.raises(ObjectiveError, match="The batch has no label; it has image, seg"):
        step_arguments({"image": IMAGE, "seg": TARGET}, {"target": "label"})


def test_three_in_a_row_are_refused():
    with pytest.raises(ObjectiveError, match=r"gave a tuple of 3; expected \(image, target\)"):
        step_arguments((IMAGE, TARGET, TARGET), {})


def test_names_are_by_argument():
    with pytest.raises(ObjectiveError, match="says where mask lies"):
        check_names({"mask": "image"})


def test_beside_an_entry_labelled_there_may_be_no_target():
    batch = {"image": IMAGE, "labelled": torch.tensor([False])}
    assert step_arguments(batch, {"target": "label"}) == batch
