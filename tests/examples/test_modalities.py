import torch

from kdnet.models.modalities import draw_subset, every_subset, find_present


def test_a_modality_of_zeros_is_absent():
    image = torch.zeros(2, 3, 4, 4)
    image[0, 1, 2, 3] = -1.0
    image[1] = 1.0
    assert find_present(image).tolist() == [[False, True, False], [True, True, True]]


def test_every_subset_of_three_is_equally_likely_and_none_is_empty():
    drawn = draw_subset(torch.ones(7000, 3, dtype=torch.bool))
    counts = (drawn.long() * torch.tensor([1, 2, 4])).sum(1).bincount(minlength=8)
    assert counts[0] == 0
    # 1000 are expected of each, with a standard deviation of 29.
    assert ((counts[1:] - 1000).abs() < 120).all()


def test_a_subset_keeps_to_what_a_sample_has():
    present = torch.tensor([[False, True, False, True]]).expand(300, 4)
    drawn = draw_subset(present)
    assert not (drawn & ~present).any()
    assert {tuple(row) for row in drawn[:, [1, 3]].tolist()} == {
        (True, False),
        (False, True),
        (True, True),
    }


def test_one_modality_is_kept_and_none_stays_none():
    present = torch.tensor([[False, True], [False, False]])
    assert draw_subset(present).tolist() == present.tolist()


def test_four_modalities_have_fifteen_subsets():
    subsets = every_subset(4)
    assert len(set(subsets)) == 15
    assert all(any(subset) for subset in subsets)
