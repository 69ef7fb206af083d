import pytest
import torch
import torch.nn.functional as F
from torch import nn

from privdistill import LayerNotFoundError
from privdistill.taps.location import locate_bottleneck

IMAGE = torch.zeros(1, 1, 16, 16)


def locate(net):
    with torch.no_grad():
        return locate_bottleneck(net.eval(), IMAGE)


def down(i, o):
    return nn.Conv2d(i, o, 3, stride=2, padding=1)


def test_named_bottleneck_of_a_unet(tiny_unet):
    found = locate(tiny_unet(1))
    assert found.name == "bottleneck"
    assert found.shape == (1, 8, 8, 8)


def test_decoder_layers_at_the_same_resolution_are_not_the_encoder():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(down(1, 2), down(2, 4))
            self.decoder = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Upsample(16), nn.Conv2d(2, 2, 1))

        def forward(self, x):
            return self.decoder(self.encoder(x))

    found = locate(Net())
    assert found.name == "encoder"
    assert "decoder.0" in found.candidates


def test_a_bottleneck_behind_the_encoder_is_kept():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(down(1, 2), down(2, 4))
            self.bottleneck = nn.Conv2d(4, 4, 1)
            self.decoder = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Upsample(16), nn.Conv2d(2, 2, 1))

        def forward(self, x):
            return self.decoder(self.bottleneck(self.encoder(x)))

    assert locate(Net()).name == "bottleneck"


def test_squeeze_excitation_is_no_bottleneck():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.squeeze = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return x * self.squeeze(F.adaptive_avg_pool2d(x, 1)).sigmoid()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = nn.Sequential(down(1, 4), Gate())
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head(F.interpolate(self.deep(x), scale_factor=2))

    assert locate(Net()).name == "deep"


def test_head_that_is_only_resampled_is_no_bottleneck():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(down(1, 4), nn.Conv2d(4, 4, 1))
            self.classifier = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))

        def forward(self, x):
            return F.interpolate(self.classifier(self.backbone(x)), size=x.shape[2:])

    assert locate(Net()).name == "backbone"


def test_branch_that_the_logits_do_not_need_is_left_out(tiny_unet):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny_unet(1)
            self.auxiliary = nn.Sequential(down(1, 2), down(2, 2), down(2, 2))

        def forward(self, x):
            self.auxiliary(x)
            return self.body(x)

    assert locate(Net()).name == "body.bottleneck"


def test_network_inside_a_wrapper_is_searched_like_the_network(tiny_unet):
    assert locate(nn.Sequential(tiny_unet(1))).name == "0.bottleneck"


def test_nested_skip_connections_of_monai_are_seen_through():
    unet = pytest.importorskip("monai.networks.nets").UNet
    found = locate(unet(2, 1, 2, channels=(2, 4, 8), strides=(2, 2)))
    assert found.name == "model.1.submodule.1.submodule"
    assert found.shape == (1, 8, 4, 4)


def test_network_that_never_downsamples_is_an_error():
    with pytest.raises(LayerNotFoundError, match="no layer has a coarser output"):
        locate(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)))


def test_two_independent_encoders_are_an_error_that_lists_both():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = down(1, 2), down(1, 2)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            both = torch.cat((self.left(x), self.right(x)), dim=1)
            return self.head(F.interpolate(both, scale_factor=2))

    with pytest.raises(LayerNotFoundError, match=r"'right' \(.*\n\s+'left'"):
        locate(Net())


def test_three_dimensional_networks(tiny_unet):
    with torch.no_grad():
        found = locate_bottleneck(tiny_unet(1, axes=3).eval(), torch.zeros(1, 1, 8, 8, 8))
    assert (found.name, found.shape) == ("bottleneck", (1, 8, 4, 4, 4))


def test_no_hook_is_left_behind(tiny_unet):
    net = tiny_unet(1)
    locate(net)
    assert not any(module._forward_hooks for module in net.modules())


def test_bins_of_pyramid_pooling_are_no_bottleneck():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(down(1, 2), down(2, 4))
            self.bins = nn.ModuleList([nn.Conv2d(4, 2, 1) for _ in range(2)])
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            f = self.features(x)
            context = [
                F.interpolate(conv(F.adaptive_avg_pool2d(f, bins)), size=f.shape[2:])
                for conv, bins in zip(self.bins, (1, 2), strict=True)
            ]
            return self.head(F.interpolate(torch.cat((f, *context), 1), size=x.shape[2:]))

    assert locate(Net()).name == "features"


def test_the_activation_that_ends_a_flat_stage_is_taken():
    stage = [down(1, 4), nn.InstanceNorm2d(4), nn.LeakyReLU()]
    found = locate(nn.Sequential(*stage, nn.Upsample(16), nn.Conv2d(4, 2, 1)))
    assert found.name == "2"


def test_an_activation_in_place_is_followed():
    net = nn.Sequential(down(1, 4), nn.ReLU(inplace=True), nn.Upsample(16), nn.Conv2d(4, 2, 1))
    assert locate(net).name == "1"


def test_metadata_tensors_do_not_hide_the_flow(tiny_unet):
    assert locate(tiny_unet(1)).name == "bottleneck"


def test_a_map_that_only_gates_another_is_no_bottleneck():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(down(1, 2), down(2, 4))
            self.attention = nn.Sequential(down(4, 4), down(4, 4))
            self.decoder = nn.Sequential(nn.Upsample(16), nn.Conv2d(4, 2, 1))

        def forward(self, x):
            deep = self.encoder(x)
            return self.decoder(deep * F.interpolate(self.attention(deep), size=deep.shape[2:]))

    assert locate(Net()).name == "encoder"


def test_a_context_module_before_a_head_without_decoder_is_left_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(down(1, 2), down(2, 4))
            self.context = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
            self.head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Upsample(16))

        def forward(self, x):
            return self.head(self.context(self.encoder(x)))

    assert locate(Net()).name == "encoder"


def test_a_decoder_that_goes_deeper_than_the_encoder_is_an_error_that_lists_both():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.deeper, self.fuse = down(4, 4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.fuse(F.interpolate(self.deeper(x), size=x.shape[2:]) + x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Sequential(down(1, 2), down(2, 4)), Decoder()

        def forward(self, x):
            return self.decoder(self.encoder(x))

    with pytest.raises(LayerNotFoundError, match=r"'encoder' \(1, 4, 4, 4\)\n  'decoder.deeper'"):
        locate(Net())


class Tokens(nn.Module):
    """Patches of 4 x 4 voxels, normalised as tokens or with channels last, and upsampled."""

    def __init__(self, form):
        super().__init__()
        self.patches, self.norm, self.form = nn.Conv2d(1, 24, 4, stride=4), nn.LayerNorm(24), form
        self.decoder = nn.Sequential(nn.Upsample(16), nn.Conv2d(24, 2, 1))

    def forward(self, x):
        maps = self.patches(x)
        if self.form == "tokens":
            maps = self.norm(maps.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(maps.shape)
        else:
            maps = self.norm(maps.movedim(1, -1)).movedim(-1, 1)
        return self.decoder(maps)


@pytest.mark.parametrize("form", ["tokens", "channels last"])
def test_tokens_and_channels_last_features_count_with_their_grid(form):
    found = locate(Tokens(form))
    assert found.name == "norm"
    assert "patches" in found.candidates
    assert found.how == "last encoder output at the coarsest resolution, 16 voxels"


def test_window_partitions_are_no_features():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.window = nn.Conv2d(1, 8, 4, stride=4), nn.Linear(8, 8)
            self.decoder = nn.Sequential(nn.Upsample(16), nn.Conv2d(8, 2, 1))

        def forward(self, x):
            maps = self.patches(x)
            windows = maps.unflatten(3, (2, 2)).permute(0, 3, 2, 4, 1).reshape(2, -1, 8)
            windows = self.window(windows).reshape(1, 2, 4, 2, 8).permute(0, 4, 2, 1, 3)
            return self.decoder(windows.reshape(maps.shape) + maps)

    assert locate(Windows()).name == "patches"


def test_a_part_that_is_one_layer_counts_as_a_part():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = down(1, 4)
            self.decoder = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Upsample(16), nn.Conv2d(2, 2, 1))

        def forward(self, x):
            return self.decoder(self.encoder(x))

    assert locate(Net()).name == "encoder"


def test_two_networks_side_by_side_are_an_error_that_lists_both(tiny_unet):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = tiny_unet(1), tiny_unet(1)

        def forward(self, x):
            return self.one(x) + self.two(x)

    with pytest.raises(
        LayerNotFoundError, match=r"'one.bottleneck' \(.*\n(.*\n)*  'two.bottleneck'"
    ):
        locate(Net())


class Attention(nn.Module):
    """Self-attention whose keys and values are taken at half the resolution, as in MiT and PVT."""

    def __init__(self, fused):
        super().__init__()
        self.reduce, self.fused = down(8, 8), fused
        self.q, self.kv, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, maps):
        tokens, fewer = (m.flatten(2).transpose(1, 2) for m in (maps, self.reduce(maps)))
        query, keys = self.q(tokens), self.kv(fewer)
        if self.fused:
            looked_up = F.scaled_dot_product_attention(query, keys, keys)
        else:
            looked_up = (query @ keys.transpose(1, 2)).softmax(-1) @ keys
        return maps + self.out(looked_up).transpose(1, 2).reshape(maps.shape)


@pytest.mark.parametrize("fused", [True, False])
def test_keys_and_values_of_attention_are_no_bottleneck(fused):
    stage = nn.Sequential(nn.Conv2d(1, 8, 4, stride=4), Attention(fused))
    found = locate(nn.Sequential(stage, nn.Upsample(16), nn.Conv2d(8, 2, 1)))
    assert found.name == "0"
    assert found.shape == (1, 8, 4, 4)


def test_attention_in_a_decoder_depends_on_the_encoder():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Conv2d(1, 8, 4, stride=4)
            self.decoder = nn.ModuleList([Attention(True), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)])

        def forward(self, x):
            attention, fuse, head = self.decoder
            wide = F.interpolate(attention(self.encoder(x)), scale_factor=2)
            return head(F.interpolate(fuse(wide), scale_factor=2))

    assert locate(Net()).name == "encoder"


def test_an_activation_used_in_several_places_has_no_one_output():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.top, self.deep = nn.ReLU(), nn.Conv2d(1, 4, 1), down(4, 4)
            self.up, self.head = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head(self.up(self.relu(self.deep(self.relu(self.top(x))))))

    assert locate(Net()).name == "deep"


class Block(nn.Module):
    """A residual block that gives its features among other things, as transformers' blocks do."""

    def __init__(self, form):
        super().__init__()
        self.mlp, self.form = nn.Conv2d(4, 4, 1), form

    def forward(self, x):
        features = x + self.mlp(x)
        return {"mapping": {"size": 8, "features": features}, "tuple": (8, features)}[self.form]


@pytest.mark.parametrize(("form", "entry"), [("tuple", 1), ("mapping", "features")])
def test_features_among_other_things_are_found_with_their_entry(form, entry):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = down(1, 4), Block(form)
            self.decoder = nn.Sequential(nn.Upsample(16), nn.Conv2d(4, 2, 1))

        def forward(self, x):
            return self.decoder(self.block(self.stem(x))[entry])

    found = locate(Net())
    assert (found.name, found.select) == ("block", entry)
    assert found.shape == (1, 4, 8, 8)


def test_a_layer_is_preferred_to_an_encoder_that_lists_its_output():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList([down(1, 4), down(4, 8)])

        def forward(self, x):
            first = self.stages[0](x)
            # copied, as the mix transformers of SegFormer are
            return [first, self.stages[1](first).permute(0, 2, 3, 1).permute(0, 3, 1, 2).clone()]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = Encoder(), nn.Conv2d(12, 2, 1)

        def forward(self, x):
            maps = [F.interpolate(m, size=x.shape[2:]) for m in self.encoder(x)]
            return self.decoder(torch.cat(maps, dim=1))

    found = locate(Net())
    assert (found.name, found.select) == ("encoder.stages.1", None)


def test_a_single_token_is_no_map():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.readout = nn.Conv2d(1, 8, 4, stride=4), nn.Linear(8, 8)
            self.decoder = nn.Sequential(nn.Upsample(16), nn.Conv2d(8, 2, 1))

        def forward(self, x):
            maps = self.patches(x)
            class_token = maps.flatten(2).transpose(1, 2)[:, :1]
            return self.decoder(maps + self.readout(class_token).transpose(1, 2)[..., None])

    assert locate(Net()).name == "patches"


class CoarseDecoder(nn.Module):
    """A decoder whose first layer works at the coarsest resolution, below a level of its own."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(down(1, 2), down(2, 4))
        self.decoder = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Upsample(16), nn.Conv2d(2, 2, 1))

    def forward(self, x):
        return self.decoder(self.encoder(x))


def test_parts_are_told_apart_inside_a_wrapper_too():
    assert locate(nn.Sequential(CoarseDecoder())).name == "0.encoder"


def test_a_pyramid_of_the_input_is_no_encoder():
    class Net(CoarseDecoder):
        def __init__(self):
            super().__init__()
            self.pyramid, self.fuse = nn.AvgPool2d(4), nn.Conv2d(5, 4, 1)

        def forward(self, x):
            small = self.pyramid(x)
            return self.decoder(self.fuse(torch.cat((self.encoder(x), small), dim=1)))

    assert locate(Net()).name == "fuse"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_among_numbered_layers_is_no_bottleneck(dtype):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(down(1, 4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Upsample(16))

        def forward(self, x):
            return self.body(x).to(dtype)

    assert locate(Net()).name == "body.1"


def test_levels_side_by_side_are_one_encoder():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.down1, self.down2, self.down3 = down(1, 2), down(2, 4), down(4, 8)
            self.up = nn.Sequential(nn.Upsample(16), nn.Conv2d(8, 2, 1))

        def forward(self, x):
            return self.up(self.down3(self.down2(self.down1(x))))

    assert locate(Net()).name == "down3"


def test_pooling_to_one_voxel_is_a_level_where_the_image_is_small():
    level = [nn.Conv2d(1, 4, 1), nn.MaxPool2d(4), nn.Conv2d(4, 8, 1)]
    net = nn.Sequential(*level, nn.Upsample(4), nn.Conv2d(8, 2, 1)).eval()
    with torch.no_grad():
        assert locate_bottleneck(net, torch.zeros(1, 1, 4, 4)).name == "2"
