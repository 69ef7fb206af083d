import pytest
import torch
from torch import nn

from privdistill import ShapeMismatchError, Tap, describe


def test_rows_are_what_a_tap_needs(tiny_unet):
    table = describe(tiny_unet(1), torch.zeros(1, 1, 8, 16))
    found = {row.name: row for row in table}
    assert list(found)[:4] == ["encoder.0", "encoder.1", "encoder", "down"]
    assert found["bottleneck"].type == "Sequential"
    assert found["bottleneck"].shape == (1, 8, 4, 8)
    assert found["bottleneck"].reduction == (2, 2)
    assert found["bottleneck"].note == "<- bottleneck"
    assert Tap(table[0].name, table[0].name)


def test_the_network_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    describe(net, torch.zeros(1, 1, 4, 4))
    assert net.training
    assert net[1].num_batches_tracked == 0
    assert not any(module._forward_hooks for module in net.modules())


def test_tokens_tuples_and_vectors_are_told():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(1, 6, 4, stride=4)
            self.tokens = nn.Flatten(2)
            self.norm = nn.LayerNorm(6)
            self.pair = Pair()
            self.vector = nn.Linear(6, 2)

        def forward(self, x):
            tokens = self.norm(self.tokens(self.patches(x)).transpose(1, 2))
            self.pair(x)
            self.vector(tokens.mean(1))
            return tokens.transpose(1, 2).reshape(1, 6, 2, 2)

    class Pair(nn.Module):
        def forward(self, x):
            return x, None

    found = {row.name: row for row in describe(Mixed(), torch.zeros(1, 1, 8, 8))}
    assert found["norm"].note.startswith("tokens, (2, 2)")
    assert found["norm"].reduction == (4, 4)
    assert found["pair"].note == "tuple of 2: (1, 1, 8, 8), NoneType"
    assert found["vector"].reduction == ()


def test_a_network_without_bottleneck_is_listed_all_the_same():
    table = describe(nn.Sequential(nn.Conv2d(1, 2, 1)), torch.zeros(1, 1, 4, 4))
    assert [row.note for row in table] == [""]
    assert "1 x 2 x 4 x 4" in repr(table)


def test_the_bottleneck_is_on_the_path_to_the_logits_that_the_wrapper_is_told_of():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.shallow, self.deep = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(1, 4, 3, 4, 1)
            self.head, self.other = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            deep, shallow = self.head(self.deep(x)), self.other(self.shallow(x))
            return tuple(nn.functional.interpolate(y, size=x.shape[2:]) for y in (deep, shallow))

    def marked(**options):
        return [r.name for r in describe(Two(), torch.zeros(1, 1, 8, 8), **options) if r.note]

    assert marked() == ["deep"]
    assert marked(select_logits=lambda output: output[1]) == ["shallow"]


@pytest.mark.parametrize("wrong", [None, torch.zeros(4), (1, 1, 8, 8)])
def test_an_example_that_is_no_image_is_refused(wrong):
    with pytest.raises(ShapeMismatchError, match=r"describe: the example is"):
        describe(nn.Conv2d(1, 2, 1), wrong)


def test_a_network_that_fails_is_told_its_input():
    with pytest.raises(ShapeMismatchError, match=r"network failed on its view.*\(1, 1, 4, 4\)"):
        describe(nn.Conv2d(2, 2, 1), torch.zeros(1, 1, 4, 4))


def test_no_bottleneck_is_marked_where_nothing_tells_which_tensors_are_logits():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep, self.head = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 2, 1)
            self.other = nn.Conv2d(1, 3, 1)

        def forward(self, x):
            deep = nn.functional.interpolate(self.deep(x), size=x.shape[2:])
            return self.head(deep), self.other(x)

    table = describe(Two(), torch.zeros(1, 1, 8, 8))
    assert [row.name for row in table] == ["deep", "head", "other"]
    assert not any(row.note for row in table)
