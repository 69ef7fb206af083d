"""What a page says about scores."""

from types import SimpleNamespace

import pytest

from invented_runs import invented_scores
from kdnet.results.results import headline, verdict
from kdnet.results.tables import gains


def gain_of(metric, lower, upper, p_holm=0.01):
    interval = SimpleNamespace(lower=lower, upper=upper)
    return SimpleNamespace(metric=metric, interval=interval, p_holm=p_holm)


@pytest.mark.parametrize(
    ("metric", "lower", "upper", "expected"),
    [
        ("dice", 0.01, 0.1, "better"),
        ("dice", -0.1, -0.01, "worse"),
        ("dice", -0.1, 0.1, "open"),
        ("dice", float("nan"), float("nan"), "open"),
        ("hd95", -5.0, -1.0, "better"),
        ("hd95", 1.0, 5.0, "worse"),
    ],
)
def test_verdict_needs_an_interval_without_zero(metric, lower, upper, expected):
    assert verdict(gain_of(metric, lower, upper)) == expected


@pytest.mark.parametrize("p_holm", [0.05, 0.4, float("nan")])
def test_verdict_needs_the_corrected_test_too(p_holm):
    assert verdict(gain_of("dice", 0.01, 0.1, p_holm)) == "open"


def test_headline_says_loss_as_plainly_as_gain():
    (lost, *_) = headline(gains(invented_scores(gain=-0.3)))
    assert "the student is worse than the baseline" in lost
    (unknown, *_) = headline(gains(invented_scores(cases=4)))
    assert unknown.endswith("Nothing can be concluded.")
