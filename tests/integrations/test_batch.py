import pytest
import torch

from privdistill import GroundTruth, LatentKL, ObjectiveError, SoftTargetDiceBCE, kdnet
from privdistill.integrations.batch import check_names, check_options, step_arguments

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


@pytest.mark.parametrize(
    ("batch", "there"),
    [
        ({"image": IMAGE, "label": TARGET}, "it has image, label"),
        ({"image": IMAGE, "target": None}, "it has image, target"),
        ({"image": IMAGE, "labelled": torch.tensor([True])}, "it has image, labelled"),
        (IMAGE, "it is an image alone"),
        ([IMAGE], "it is an image alone"),
    ],
)
@pytest.mark.parametrize("objective", [kdnet(), 1.0 * GroundTruth()])
def test_a_reference_that_is_not_found_is_refused(batch, there, objective):
    said = rf"no target, which the objective reads; {there}\. .*names={{'target': entry}}.*labelled"
    with pytest.raises(ObjectiveError, match=said):
        step_arguments(batch, {}, objective)


@pytest.mark.parametrize("labelled", [torch.tensor([False]), [False]])
@pytest.mark.parametrize("names", [{}, {"target": "label"}])
def test_a_batch_may_say_that_it_has_no_reference(labelled, names):
    batch = {"image": IMAGE, "labelled": labelled}
    assert step_arguments(batch, names, kdnet()) == batch


def test_an_objective_that_reads_no_reference_needs_none():
    objective = SoftTargetDiceBCE() + LatentKL()
    assert step_arguments({"image": IMAGE}, {}, objective) == {"image": IMAGE}


@pytest.mark.parametrize(
    ("option", "instead"),
    [("loss_function", r"DistillationWrapper\(objective=...\)"), ("prepare_batch", "names=")],
)
def test_options_that_a_wrapper_stands_in_for_are_refused(option, instead):
    with pytest.raises(ObjectiveError, match=rf"Loop: {option}= is not taken.*{instead}"):
        check_options({"amp": True, option: print}, "Loop")
