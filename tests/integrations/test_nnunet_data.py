"""A data set of nnU-Net as teacher and student see it."""

from copy import deepcopy

import numpy as np
import pytest

from privdistill import LifecycleError

pytest.importorskip("nnunetv2", reason="the extra nnunet is not installed")

from privdistill.integrations.nnunet_data import student_cases, whole_data

BASE = {"patch_size": [4, 4], "spacing": [1.0, 1.0], "architecture": {}}


class Cases:
    def __init__(self, data):
        self.data = data

    def load_case(self, identifier):
        return self.data, "labels", None, {"of": identifier}


def plans(**changes):
    return {"configurations": {"base": BASE, "own": {"inherits_from": "base"} | changes}}


def test_a_configuration_is_given_with_what_it_inherits_and_plans_stay_as_they_are():
    given, dataset = plans(spacing=[2.0, 2.0]), {"channel_names": {"0": "t1"}}
    before = deepcopy(given)
    whole = whole_data(given, "own", dataset)
    assert (whole.plans, whole.dataset) == (before, dataset)
    assert whole.configuration.patch_size == [4, 4]
    assert whole.configuration.spacing == [2.0, 2.0]
    assert given == before


def test_the_second_stage_of_a_cascade_is_no_data_to_distil():
    with pytest.raises(LifecycleError, match="own is the second stage of a cascade"):
        whole_data(plans(previous_stage="base"), "own", {})


def test_cases_have_the_students_channels_in_their_order():
    data = np.arange(12).reshape(3, 2, 2)
    cases = student_cases(Cases, [2, 0])(data)
    seen, *rest = cases.load_case("case1")
    assert isinstance(cases, Cases)
    assert np.array_equal(seen, data[[2, 0]])
    assert rest == ["labels", None, {"of": "case1"}]
