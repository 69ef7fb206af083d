import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from privdistill import LayerNotFoundError
from privdistill.sides.heads import find_heads
from privdistill.taps.location import locate_bottleneck

IMAGE = torch.zeros(1, 1, 16, 16)


def locate(net):
    with torch.no_grad():
        return locate_bottleneck(net.eval(), IMAGE, find_heads)


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
        found = locate_bottleneck(
            tiny_unet(1, axes=3).eval(), torch.zeros(1, 1, 8, 8, 8), find_heads
        )
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
        assert locate_bottleneck(net, torch.zeros(1, 1, 4, 4), find_heads).name == "2"


class Flat(nn.Module):
    """Layers that are attributes of the network itself, run one after the other, then resampled."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        y = x
        for layer in self.children():
            y = layer(y)
        return F.interpolate(y, size=x.shape[2:])


class Residual(nn.Module):
    """The block of a dilated ResNet: its first convolution still works at the finer resolution."""

    def __init__(self, i, o, stride=1):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(i, o, 1), nn.Conv2d(o, o, 3, stride, 1)
        self.skip = nn.Conv2d(i, o, 1, stride)

    def forward(self, x):
        return self.skip(x) + self.conv2(self.conv1(x).relu())


def test_a_flat_segmenter_has_its_bottleneck_before_the_head():
    found = locate(
        Flat(l1=nn.Conv2d(1, 8, 3, 4, 1), l2=nn.Conv2d(8, 8, 3, 1, 1), cls=nn.Conv2d(8, 2, 1))
    )
    assert found.name == "l2"
    assert "nothing finer follows" in found.how


def dilated():
    return {
        "conv1": down(1, 4),
        "layer1": Residual(4, 4),
        "layer2": Residual(4, 8, 2),
        "layer3": Residual(8, 8),
        "layer4": Residual(8, 8),
    }


def test_a_dilated_residual_network_gives_the_same_layer_flat_and_nested():
    head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    assert locate(Flat(**dilated(), head=head)).name == "layer4"
    assert locate(nn.Sequential(Flat(**dilated(), head=head))).name == "0.layer4"
    nested = Flat(backbone=nn.Sequential(*dilated().values()), head=head)
    assert locate(nested).name == "backbone"


@pytest.mark.parametrize("stem", [nn.Conv2d(1, 8, 4, 4), nn.Sequential(down(1, 8), down(8, 8))])
def test_a_flat_transformer_gives_its_last_block(stem):
    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = stem
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x):
            maps = self.patch_embed(x)
            tokens = self.head(self.norm(self.blocks(maps.flatten(2).transpose(1, 2))))
            return F.interpolate(tokens.transpose(1, 2).unflatten(2, maps.shape[2:]), size=16)

    assert locate(ViT()).name == "norm"


def test_a_head_that_is_rearranged_into_voxels_is_no_bottleneck():
    class Net(Flat):
        def forward(self, x):
            return F.pixel_shuffle(self.head(self.body(self.stem(x))), 4)

    net = Net(stem=nn.Conv2d(1, 8, 4, 4), body=nn.Conv2d(8, 8, 1), head=nn.Conv2d(8, 32, 1))
    assert locate(net).name == "body"


class Returning(nn.Module):
    """A segmenter that returns more than its logits."""

    def __init__(self, form):
        super().__init__()
        self.down, self.deep, self.head = down(1, 4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.further, self.form = nn.Sequential(down(4, 4), nn.Conv2d(4, 2, 1)), form

    def forward(self, x):
        features = self.deep(self.down(x))
        logits = F.interpolate(self.head(features), size=x.shape[2:])
        others = {"features": features, "further": self.further(features)}
        return {
            "tuple": (logits, *others.values()),
            "mapping": {"out": logits, **others},
            "alone": logits,
        }[self.form]


@pytest.mark.parametrize("form", ["alone", "tuple", "mapping"])
def test_what_a_network_returns_besides_its_logits_changes_nothing(form):
    assert locate(Returning(form)).name == "deep"


def test_the_selector_says_what_the_logits_are():
    net = Returning("tuple").eval()
    with torch.no_grad():
        found = locate_bottleneck(net, IMAGE, lambda output, _axes: [output[2]])
    assert found.name == "further.0"


def test_an_axis_of_size_one_inside_changes_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.deep = (
                nn.Conv3d(1, 4, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
                nn.Conv3d(4, 4, 1),
            )
            self.up, self.head = nn.Upsample(scale_factor=(1, 2, 2)), nn.Conv3d(4, 2, 1)

        def forward(self, x):
            return self.head(self.up(self.deep(self.down(x[:, :, None]))))[:, :, 0]

    found = locate(Net())
    assert (found.name, found.shape) == ("deep", (1, 4, 1, 8, 8))


def test_class_scores_that_are_summed_up_are_no_bottleneck():
    class Net(nn.Module):
        """Scores of two levels, as in FCN-16s."""

        def __init__(self):
            super().__init__()
            self.pool1, self.pool2 = down(1, 4), down(4, 8)
            self.score1, self.score2 = nn.Conv2d(4, 2, 3, 1, 1), nn.Conv2d(8, 2, 3, 1, 1)
            self.up = nn.ConvTranspose2d(2, 2, 2, 2)

        def forward(self, x):
            first = self.pool1(x)
            summed = self.up(self.score2(self.pool2(first))) + self.score1(first)
            return F.interpolate(summed, size=x.shape[2:])

    assert locate(Net()).name == "pool2"


def levels(**further):
    return Flat(down1=down(1, 2), down2=down(2, 4), deep=nn.Conv2d(4, 4, 3, 1, 1), **further)


def test_a_module_that_ends_in_upsampling_is_a_decoder():
    up = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Upsample(scale_factor=2))
    assert locate(levels(up=up, head=nn.Conv2d(4, 2, 1))).name == "deep"


class TopDown(nn.Module):
    """Lateral projections, summed from coarse to fine."""

    def __init__(self):
        super().__init__()
        self.lateral1, self.lateral2 = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1)
        self.smooth2 = nn.Conv2d(4, 4, 3, 1, 1)

    def forward(self, fine, coarse):
        coarse = self.lateral2(coarse)
        merged = F.interpolate(coarse, size=fine.shape[2:]) + self.lateral1(fine)
        return merged + F.interpolate(self.smooth2(coarse), size=fine.shape[2:])


class Pyramid(TopDown):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.head = down(1, 2), down(2, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        fine = self.down1(x)
        return F.interpolate(self.head(super().forward(fine, self.down2(fine))), size=x.shape[2:])


def test_lateral_projections_are_no_bottleneck():
    assert locate(Pyramid()).name == "down2"


def test_a_bottleneck_of_kernel_one_that_a_plain_skip_waits_for_is_no_lateral_projection():
    class Net(Flat):
        def forward(self, x):
            fine = self.down1(x)
            deep = self.narrow(self.down2(fine))
            return self.head(F.interpolate(deep, scale_factor=2) + fine)

    layers = {"down1": down(1, 2), "down2": down(2, 4)}
    layers |= {"narrow": nn.Conv2d(4, 2, 1), "head": nn.Conv2d(2, 2, 1)}
    assert locate(Net(**layers)).name == "narrow"


def test_encoder_and_pyramid_may_share_a_module():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pyramid = nn.ModuleList([down(1, 2), down(2, 4)]), TopDown()

        def forward(self, x):
            fine = self.body[0](x)
            return self.pyramid(fine, self.body[1](fine))

    assert locate(Flat(backbone=Backbone(), head=nn.Conv2d(4, 2, 1))).name == "backbone.body.1"


def test_a_flat_network_with_pyramid_pooling_gives_what_was_pooled():
    class Net(Flat):
        def forward(self, x):
            deep = self.deep(self.down2(self.down1(x)))
            pooled = F.interpolate(self.bin(F.adaptive_avg_pool2d(deep, 1)), size=deep.shape[2:])
            joined = self.project(torch.cat((self.branch(deep), pooled), 1))
            return F.interpolate(self.head(joined), size=x.shape[2:])

    layers = {
        "down1": down(1, 2), "down2": down(2, 4), "deep": nn.Conv2d(4, 4, 3, 1, 1),
        "branch": nn.Conv2d(4, 4, 1), "bin": nn.Conv2d(4, 4, 1),
        "project": nn.Conv2d(8, 4, 1), "head": nn.Conv2d(4, 2, 1),
    }  # fmt: skip
    assert locate(Net(**layers)).name == "deep"


def test_a_learned_layer_that_runs_several_times_is_left_out():
    class Net(Flat):
        def forward(self, x):
            deep = self.shared(self.down2(self.shared(self.down1(x))))
            return self.head(F.interpolate(deep, size=x.shape[2:]))

    net = Net(
        down1=down(1, 4), down2=down(4, 4), shared=nn.Conv2d(4, 4, 1), head=nn.Conv2d(4, 2, 1)
    )
    assert locate(net).name == "down2"


def test_unpadded_convolutions_are_measured_by_their_stride():
    """The decoder ends with fewer voxels than the bottleneck."""
    up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 13))
    net = Flat(down=nn.Conv2d(1, 4, 2, 2), deep=nn.Conv2d(4, 4, 1), up=up)
    assert locate(net).name == "deep"
    assert locate(net).shape == (1, 4, 8, 8)


def test_a_bottleneck_may_hold_its_own_upsampling():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc1, self.enc2 = nn.Conv2d(1, 2, 1), down(2, 4)
            up = nn.ConvTranspose2d(8, 4, 2, 2)
            self.center = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, 1, 1), nn.ReLU(), up)
            self.dec2, self.dec1 = nn.Conv2d(8, 2, 3, 1, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            first = self.enc1(x)
            second = self.enc2(first)
            wide = self.dec2(torch.cat((second, self.center(second)), 1))
            return self.dec1(torch.cat((first, F.interpolate(wide, size=x.shape[2:])), 1))

    assert locate(Net()).name == "center.2"


def test_of_heads_of_one_size_the_one_that_depends_on_most_counts():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.down1, self.down2, self.up2 = down(1, 4), down(4, 4), nn.Conv2d(4, 4, 1)
            self.heads = nn.ModuleList([nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)])

        def forward(self, x):
            first = self.down1(x)
            second = first + self.up2(F.interpolate(self.down2(first), size=first.shape[2:]))
            maps = zip(self.heads, (first, second), strict=True)
            return [F.interpolate(head(m), size=x.shape[2:]) for head, m in maps]

    assert locate(Nested()).name == "down2"


def test_a_network_whose_coarser_layers_run_twice_is_refused():
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(down(1, 4), nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 1))

        def forward(self, x):
            return self.net(x) + self.net(x.flip(-1)).flip(-1)

    with pytest.raises(LayerNotFoundError, match="runs only once"):
        locate(Averaged())


def test_an_error_lists_at_most_eight_candidates():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList([down(1, 1) for _ in range(12)])
            self.head = nn.Conv2d(12, 2, 1)

        def forward(self, x):
            maps = torch.cat([branch(x) for branch in self.branches], 1)
            return self.head(F.interpolate(maps, size=x.shape[2:]))

    with pytest.raises(LayerNotFoundError, match=r"branches\.11") as error:
        locate(Net())
    assert sum(line.startswith("  ") for line in str(error.value).splitlines()) <= 8
    assert "5 others" in str(error.value)


def test_what_follows_the_last_pooling_of_a_flat_encoder_is_its_decoder():
    def conv(inside, out):
        return nn.Conv2d(inside, out, 3, padding=1)

    encoder = [conv(1, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 8), nn.ReLU(), nn.MaxPool2d(2)]
    decoder = [nn.Upsample(scale_factor=2), conv(8, 8), nn.ReLU(), nn.Upsample(scale_factor=2)]
    assert locate(nn.Sequential(*encoder, *decoder, conv(8, 3))).name == "4"


@pytest.mark.parametrize("half", [True, False])
def test_frequencies_are_no_bottleneck(half):
    class Fourier(nn.Module):
        """A convolution over frequencies, as in Fourier neural operators and LaMa."""

        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            there = torch.fft.rfft2 if half else torch.fft.fft2
            turned = there(x)
            real, imaginary = self.mix(torch.cat((turned.real, turned.imag), 1)).chunk(2, 1)
            mixed = torch.complex(real, imaginary)
            if half:
                return x + torch.fft.irfft2(mixed, s=x.shape[2:])
            return x + torch.fft.ifft2(mixed).real

    class Net(Flat):
        def forward(self, x):
            deep = self.fourier(self.down(x))
            return self.head(F.interpolate(deep, size=x.shape[2:]))

    net = Net(down=down(1, 4), fourier=Fourier(), head=nn.Conv2d(4, 2, 1))
    assert locate(net).name == "fourier"


@pytest.mark.parametrize("fused", [True, False])
def test_a_context_that_attention_gathers_is_no_bottleneck(fused):
    class Context(nn.Module):
        """One weighted mean of all places, which is added to each, as in GCNet."""

        def __init__(self):
            super().__init__()
            self.score, self.mix = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 4, 1)
            self.query = nn.Parameter(torch.zeros(1, 1, 1, 4))

        def forward(self, x):
            places = x.flatten(2)
            if fused:
                tokens = places.transpose(1, 2)
                heads = tokens.unsqueeze(1).contiguous()
                query = self.query + heads[:, :, :1]
                mean = F.scaled_dot_product_attention(query, heads, heads)[:, 0].transpose(1, 2)
            else:
                mean = places @ self.score(x).flatten(2).softmax(-1).transpose(1, 2)
            return x + self.mix(mean.unsqueeze(3))

    class Net(Flat):
        def forward(self, x):
            return self.head(F.interpolate(self.deep(x), size=x.shape[2:]))

    net = Net(deep=nn.Sequential(down(1, 4), Context()), head=nn.Conv2d(4, 2, 1))
    assert locate(net).name == "deep"


@pytest.mark.parametrize("way", ["split", "slices", "pooled queries"])
def test_heads_of_attention_are_no_resolution(way):
    class Heads(nn.Module):
        """Queries, keys and values are cut from each head's channels; queries may be pooled."""

        def __init__(self):
            super().__init__()
            self.qkv, self.projection = nn.Linear(128, 384), nn.Linear(128, 128)
            self.pool = down(16, 16)

        def forward(self, tokens):
            heads = self.qkv(tokens).unflatten(2, (8, 48)).transpose(1, 2)
            if way == "slices":
                query, key, value = heads[..., :16], heads[..., 16:32], heads[..., 32:]
            else:
                query, key, value = heads.chunk(3, -1)
            if way == "pooled queries":
                maps = query.transpose(2, 3).unflatten(3, (4, 4)).flatten(0, 1)
                query = self.pool(maps).flatten(2).transpose(1, 2).unflatten(0, (-1, 8))
            mixed = F.scaled_dot_product_attention(query, key, value)
            return self.projection(mixed.transpose(1, 2).flatten(2))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp = Heads(), nn.Linear(128, 128)

        def forward(self, maps):
            skip = F.max_pool2d(maps, 2) if way == "pooled queries" else maps
            skipped = skip.flatten(2).transpose(1, 2)
            tokens = skipped + self.attention(maps.flatten(2).transpose(1, 2))
            return (tokens + self.mlp(tokens)).transpose(1, 2).reshape(skip.shape)

    class Net(Flat):
        def forward(self, x):
            fine = self.stem(x)
            deep = self.deep(self.down(fine))
            return self.head(F.interpolate(deep, size=fine.shape[2:]) + fine)

    side = 4 if way == "pooled queries" else 8
    net = Net(
        stem=nn.Conv2d(1, 128, 2, 2),
        down=nn.Conv2d(128, 128, side, side),
        deep=Block(),
        head=nn.Conv2d(128, 2, 1),
    )
    with torch.no_grad():
        assert locate_bottleneck(net.eval(), torch.zeros(1, 1, 32, 32), find_heads).name == "deep"


def test_a_map_that_is_padded_for_windows_and_cropped_keeps_its_resolution():
    class Window(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.mlp = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, maps):
            x = maps.movedim(1, -1)
            x = x + self.mix(F.pad(x, (0, 0, 0, 2, 0, 2)))[:, :2, :2].contiguous()
            return (x + self.mlp(x)).movedim(-1, 1)

    stage = nn.Sequential(down(1, 16), nn.Conv2d(16, 16, 4, stride=4), Window())
    assert locate(nn.Sequential(stage, nn.Upsample(16), nn.Conv2d(16, 2, 1))).name == "0"


class Split(nn.Module):
    """A level, and one that is coarser."""

    def __init__(self):
        super().__init__()
        self.stem, self.transition = down(1, 4), down(4, 8)

    def forward(self, x):
        fine = self.stem(x)
        return [fine, self.transition(fine)]


class Exchange(nn.Module):
    """A stage of an HRNet: one layer at each level, then each level is joined with the other."""

    def __init__(self, width=8):
        super().__init__()
        self.fine, self.deep = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(8, width, 3, 1, 1)
        self.up, self.down = nn.Conv2d(width, 4, 1), down(4, width)

    def forward(self, levels):
        fine, deep = self.fine(levels[0]), self.deep(levels[1])
        return [fine + F.interpolate(self.up(deep), scale_factor=2), deep + self.down(fine)]


class Widen(nn.Module):
    """One more layer at each level, as timm's HRNet has."""

    def __init__(self):
        super().__init__()
        self.fine, self.deep = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, levels):
        return [self.fine(levels[0]), self.deep(levels[1])]


class Read(nn.Module):
    """Logits from the finer of two levels, of four channels, or from both."""

    def __init__(self, channels):
        super().__init__()
        self.count, self.head = 1 + (channels > 4), nn.Conv2d(channels, 2, 1)

    def forward(self, levels):
        maps = [F.interpolate(level, size=16) for level in levels[: self.count]]
        return self.head(torch.cat(maps, 1))


@pytest.mark.parametrize(
    ("stages", "channels", "name"),
    [
        # The coarse level after its exchange is not needed, so its features before it are last.
        ([Split, Exchange], 4, "1.deep"),
        ([Split, Exchange, Exchange], 4, "2.deep"),
        ([Split, Exchange, Widen], 4, "1.deep"),
        ([Split, Exchange], 12, "1"),
        ([Split, Exchange, Exchange], 12, "2"),
        ([Split, Exchange, Widen], 12, "2.deep"),
        ([Split, partial(Exchange, 6)], 10, "1"),
    ],
)
def test_stages_that_exchange_levels_are_encoder_flat_and_nested(stages, channels, name):
    flat = locate(nn.Sequential(*(stage() for stage in stages), Read(channels)))
    assert (flat.name, flat.select) == (name, 1 if len(name) == 1 else None)
    nested = locate(nn.Sequential(nn.Sequential(*(stage() for stage in stages)), Read(channels)))
    # An encoder that ends in such a stage gives the very same tensor.
    assert nested.name == ("0" if len(name) == 1 else f"0.{name}")
    assert (nested.select, nested.shape) == (flat.select, flat.shape)


def test_levels_that_a_decoder_exchanges_are_decoder():
    assert locate(nn.Sequential(Split(), nn.Sequential(Exchange(), Read(4)))).name == "0.transition"


WIDTHS = (4, 8, 16, 32)


class Stem(nn.Module):
    """The finest of several levels."""

    def __init__(self):
        super().__init__()
        self.step = nn.Conv2d(1, 4, 3, 1, 1)

    def forward(self, x):
        return [self.step(x)]


class Deepen(nn.Module):
    """One level more than before, from the coarsest."""

    def __init__(self, levels):
        super().__init__()
        self.step = down(WIDTHS[levels - 1], WIDTHS[levels])

    def forward(self, maps):
        return [*maps, self.step(maps[-1])]


def tie(start, end):
    """From one level to another."""
    if end < start:
        up = nn.Upsample(scale_factor=2 ** (start - end))
        return nn.Sequential(nn.Conv2d(WIDTHS[start], WIDTHS[end], 1), up)
    return nn.Sequential(*(down(*WIDTHS[step : step + 2]) for step in range(start, end)))


class Mesh(nn.Module):
    """A layer at each level; what is given back, the finest levels or all, are sums of all."""

    def __init__(self, levels, given):
        super().__init__()
        self.arms = nn.ModuleList(nn.Conv2d(w, w, 3, 1, 1) for w in WIDTHS[:levels])
        self.ties = nn.ModuleList(
            nn.ModuleList(tie(start, end) for start in range(levels)) for end in range(given)
        )

    def forward(self, maps):
        maps = [arm(level) for arm, level in zip(self.arms, maps, strict=True)]
        return [sum(tie(m) for tie, m in zip(row, maps, strict=True)) for row in self.ties]


def meshed(levels, meshes, given):
    """Stages of up to so many levels; the last has so many meshes and gives so many levels."""
    stages = [Stem()]
    for count in range(2, levels):
        stages += [Deepen(count - 1), Mesh(count, count)]
    last = [Mesh(levels, levels) for _ in range(meshes - 1)]
    return [*stages, Deepen(levels - 1), *last, Mesh(levels, given)]


class Unrolled(nn.Sequential):
    """Layers, some of which are lists that do not run themselves."""

    def forward(self, maps):
        for layer in self:
            for step in layer if isinstance(layer, nn.ModuleList) else [layer]:
                maps = step(maps)
        return maps


def nest(layers, form):
    """The same layers one after another: flat, as a body, or with the last stage as a part."""
    if form == "body":
        return nn.Sequential(nn.Sequential(*layers), Read(4))
    first = 1 + max(i for i, layer in enumerate(layers) if isinstance(layer, Deepen))
    last = {
        "flat": layers[first:],
        "stage": [nn.Sequential(*layers[first:])],
        "list": [nn.ModuleList(layers[first:])],
    }
    return Unrolled(*layers[:first], *last[form], Read(4))


def assert_lists(net, layer):
    """Assert that a network is refused with at most eight layers, of which one is the right one."""
    with pytest.raises(LayerNotFoundError, match=r"taps=") as caught:
        locate(net)
    listed = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert any(f"'{layer}'" in line for line in listed)
    assert 2 <= len(listed) <= 8


STAGES = [(2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (4, 2)]


def last_arm(net, levels):
    return [name for name, _ in net.named_modules() if name.endswith(f"arms.{levels - 1}")][-1]


@pytest.mark.parametrize("form", ["flat", "body", "stage", "list"])
@pytest.mark.parametrize(("levels", "meshes"), STAGES)
def test_a_last_stage_that_gives_its_finest_level_alone_is_an_error_that_lists_it(
    levels, meshes, form
):
    """What it does at the coarsest level may be an encoder's."""
    net = nest(meshed(levels, meshes, 1), form)
    arm = last_arm(net, levels)
    assert_lists(net, arm)
    # Where it gives all levels back, none of them is a decoder's alone.
    assert locate(nest(meshed(levels, meshes, levels), form)).name == arm


class Runs(nn.Sequential):
    """Layers whose meshes run inside the parent's own forward."""

    def forward(self, maps):
        for layer in self:
            maps = layer.forward(maps) if isinstance(layer, Mesh) else layer(maps)
        return maps


@pytest.mark.parametrize("form", ["flat", "body"])
@pytest.mark.parametrize("all_levels", [False, True])
@pytest.mark.parametrize(("levels", "meshes"), STAGES)
def test_a_stage_that_its_parent_runs_is_an_error_that_lists_its_layer(
    levels, meshes, all_levels, form
):
    layers = meshed(levels, meshes, levels if all_levels else 1)
    net = Runs(*layers, Read(4)) if form == "flat" else nn.Sequential(Runs(*layers), Read(4))
    assert_lists(net, last_arm(net, levels))


class Apart(nn.Module):
    """Layers whose meshes run inside the parent's own forward, and are held in two lists."""

    def __init__(self, layers, head):
        super().__init__()
        meshes = [layer for layer in layers if isinstance(layer, Mesh)]
        self.arms = nn.ModuleList(mesh.arms for mesh in meshes)
        self.ties = nn.ModuleList(mesh.ties for mesh in meshes)
        self.steps = nn.ModuleList(layer for layer in layers if layer not in meshes)
        self.layers, self.head = tuple(layers), head

    def forward(self, maps):
        return self.head(Runs.forward(self.layers, maps))


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_layers_of_stages_that_are_held_apart_are_found_or_listed(levels):
    arm = f"arms.{levels - 1}.{levels - 1}"
    assert locate(Apart(meshed(levels, 2, 1), Read(4))).name == arm
    assert_lists(nn.Sequential(Apart(meshed(levels, 2, 1), nn.Identity()), Read(4)), f"0.{arm}")


def test_a_module_that_gives_the_levels_of_stages_it_runs_is_listed():
    assert_lists(nn.Sequential(Runs(*meshed(2, 2, 2)), Read(12)), "0")


@pytest.mark.parametrize("change", ["copies", "identity", "kernel of one", "width"])
def test_a_last_stage_is_one_whatever_its_layers(change):
    class Copies(nn.Module):
        def forward(self, maps):
            return [level.clone() for level in maps]

    *layers, mesh = meshed(3, 1, 1)
    if change == "copies":
        layers.append(Copies())
    elif change == "identity":
        mesh.arms[2] = nn.Sequential(nn.Identity(), mesh.arms[2])
    elif change == "kernel of one":
        mesh.arms[2] = nn.Conv2d(16, 16, 1)
    else:
        mesh.arms[2], mesh.ties[0][2][0] = nn.Conv2d(16, 12, 3, 1, 1), nn.Conv2d(12, 4, 1)
    net = nn.Sequential(*layers, mesh, Read(4))
    assert_lists(net, f"{len(layers)}.arms.2")


class Arms(Mesh):
    """A layer at each level alone."""

    def __init__(self, levels):
        super().__init__(levels, 0)

    def forward(self, maps):
        return [arm(level) for arm, level in zip(self.arms, maps, strict=True)]


class Ties(Mesh):
    """Levels joined without further layers at any of them."""

    def __init__(self, levels, given):
        super().__init__(levels, given)
        self.arms = nn.ModuleList(nn.Identity() for _ in range(levels))


@pytest.mark.parametrize("levels", [3, 4])
def test_what_only_projects_exchanged_levels_is_no_stage(levels):
    found = locate(
        nn.Sequential(*meshed(levels, 1, levels), Arms(levels), Ties(levels, 1), Read(4))
    )
    assert found.name.endswith(f"arms.{levels - 1}")
    assert isinstance(found.name, str)


def test_two_levels_of_more_may_end_in_a_module_of_any_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.top, self.stem, self.deepen = nn.Conv2d(1, 4, 1), Stem(), Deepen(1)
            self.mesh, self.head = Mesh(2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            (y,) = self.mesh(self.deepen(self.stem(x)))
            return self.head(y + self.top(x))

    assert locate(Net()).name == "deepen.step"


def test_a_decoder_of_two_levels_may_have_a_layer_at_the_coarsest():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.center, self.join = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(12, 4, 1)

        def forward(self, maps):
            wide = F.interpolate(self.center(maps[1]), scale_factor=2)
            return [self.join(torch.cat((maps[0], wide), 1))]

    assert locate(nn.Sequential(Stem(), Deepen(1), Decoder(), Read(4))).name == "1.step"


def test_levels_that_an_encoder_exchanges_may_end_in_a_decoder_of_any_layers():
    encoder = nn.Sequential(*meshed(3, 1, 3))
    found = locate(nn.Sequential(encoder, Mesh(3, 1), Read(4)))
    assert (found.name, found.select) == ("0", 2)


def test_levels_of_a_pyramid_may_end_in_a_module_of_any_layers():
    """Coarse levels were brought up, and none came down again beside them."""

    class Neck(nn.Module):
        def __init__(self):
            super().__init__()
            self.ups, self.lateral = nn.ModuleList([tie(1, 0), tie(2, 1)]), nn.Conv2d(16, 16, 1)

        def forward(self, maps):
            deep = self.lateral(maps[2])
            mid = maps[1] + self.ups[1](deep)
            return [maps[0] + self.ups[0](mid), mid, deep]

    layers = [Stem(), Deepen(1), Deepen(2), Neck(), Mesh(3, 1), Read(4)]
    assert locate(nn.Sequential(*layers)).name == "2.step"


def test_levels_that_were_all_made_of_one_may_end_in_a_module_of_any_layers():
    """Features of a transformer, enlarged and reduced."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.block = nn.Conv2d(1, 8, 4, 4), nn.Conv2d(8, 8, 1)
            self.up, self.keep = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 8, 1)
            self.reduce, self.mesh, self.head = down(8, 16), Mesh(3, 1), Read(4)

        def forward(self, x):
            maps = self.block(self.patches(x))
            return self.head(self.mesh([self.up(maps), self.keep(maps), self.reduce(maps)]))

    assert locate(Net()).name == "reduce"


class Prefixed(nn.Module):
    """A transformer of patches, with tokens before those of the image."""

    def __init__(self, patch, prefix):
        super().__init__()
        padding = -(-(-64 % patch) // 2)
        self.patches = nn.Conv2d(1, 8, patch, stride=patch, padding=padding)
        self.prefix = nn.Parameter(torch.zeros(1, prefix, 8))
        self.block, self.head = nn.Linear(8, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        maps = self.patches(x)
        tokens = torch.cat((self.prefix, maps.flatten(2).transpose(1, 2)), 1)
        tokens = self.block(tokens)[:, self.prefix.shape[1] :]
        return F.interpolate(self.head(tokens.transpose(1, 2).reshape(maps.shape)), size=64)


@pytest.mark.parametrize("prefix", [0, 1, 3, 9, 16])
def test_tokens_behind_any_few_others_are_a_map(prefix):
    with torch.no_grad():
        net = Prefixed(16, prefix).eval()
        found = locate_bottleneck(net, torch.zeros(1, 1, 64, 64), find_heads)
    assert (found.name, found.shape) == ("block", (1, 16 + prefix, 8))
    assert "16 voxels" in found.how


def test_tokens_of_several_levels_in_a_row_are_no_map():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.mid, self.deep = nn.Conv2d(1, 8, 8, stride=8), down(8, 8), down(8, 8)
            self.mix, self.head = nn.Linear(8, 8), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            fine = self.fine(x)
            mid = self.mid(fine)
            levels = [self.deep(mid), mid, fine]
            row = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
            tokens = self.mix(row)[:, -64:]
            return F.interpolate(self.head(tokens.transpose(1, 2).reshape(fine.shape)), size=64)

    with torch.no_grad():
        found = locate_bottleneck(Net().eval(), torch.zeros(1, 1, 64, 64), find_heads)
    assert found.name == "deep"


@pytest.mark.parametrize("deep", [nn.Conv2d(1, 8, 1), nn.Conv2d(1, 8, 4, stride=4)])
def test_an_undecided_network_without_logits_is_told_that_none_were_found(deep):
    class Masks(nn.Module):
        """Queries and a mask of each, of which no logits are made."""

        def __init__(self):
            super().__init__()
            self.one, self.two, self.queries = deep, copy.deepcopy(deep), nn.Linear(16, 4)

        def forward(self, x):
            masks = torch.cat((self.one(x), self.two(x)), 1)
            return {"masks": masks, "queries": self.queries(masks.mean((2, 3)))}

    with pytest.raises(LayerNotFoundError, match=r"select_logits=(.|\n)*taps="):
        locate(Masks())
