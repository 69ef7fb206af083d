# ruff: noqa: E501  (rows of a table)
"""Networks that nobody here wrote: how to build each, and what a specialist would tap in it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from kdnet.models import KDNet, MultiResUNet

# What these packages deprecate while they are imported is not ours to mend.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import monai.networks.nets as monai
    import segmentation_models_pytorch as smp
    import timm
    import torchvision.models.segmentation as torchvision
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
    from torchvision.models import resnet


@dataclass(frozen=True)
class Network:
    """One row of the matrix.

    Attributes:
        name: As the page shows it.
        library: Where it comes from.
        make: Builds it for a number of input channels, with two classes.
        size: Spatial size of the example.
        bottleneck: The latent representation between encoder and decoder, by name, written down
            from the architecture before it was run.
        by_hand: Why the layer is named by hand; empty where it is located.
        output: The form in which it returns its logits in train mode.
    """

    name: str
    library: str
    make: Callable[[int], nn.Module]
    size: tuple[int, ...]
    bottleneck: str
    by_hand: str = ""
    output: str = "tensor"


class PlainDecoder(nn.Module):
    """A timm encoder that returns its feature maps, and the smallest decoder."""

    def __init__(self, encoder: str, channels: int, *, channels_last: bool = False, **options: Any):
        super().__init__()
        self.channels_last = channels_last
        options |= {"features_only": True, "in_chans": channels}
        self.encoder = timm.create_model(encoder, **options)
        widths = self.encoder.feature_info.channels()
        self.lateral = nn.ModuleList([nn.Conv2d(width, 8, 1) for width in widths])
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.encoder(x)
        if self.channels_last:
            maps = [features.movedim(-1, 1) for features in maps]
        merged = self.lateral[-1](maps[-1])
        for convolution, features in zip(self.lateral[-2::-1], maps[-2::-1], strict=True):
            size = features.shape[2:]
            merged = nn.functional.interpolate(merged, size=size) + convolution(features)
        return self.head(nn.functional.interpolate(merged, size=x.shape[2:]))


class Signal(nn.Module):
    """A U-Net of two levels for signals of one axis."""

    def __init__(self, channels: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(channels, 4, 3, padding=1), nn.ReLU())
        self.down = nn.Conv1d(4, 8, 2, stride=2)
        self.bottleneck = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose1d(8, 4, 2, stride=2)
        self.head = nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.encoder(x)
        return self.head(torch.cat((skip, self.up(self.bottleneck(self.down(skip)))), dim=1))


def monai_unet(axes: int) -> Callable[[int], nn.Module]:
    options: dict[str, Any] = {"channels": (4, 8, 16), "strides": (2, 2), "num_res_units": 1}
    return lambda c: monai.UNet(spatial_dims=axes, in_channels=c, out_channels=2, **options)


def dyn_unet(axes: int, *, deep: bool, res: bool = False) -> Callable[[int], nn.Module]:
    def make(channels: int) -> nn.Module:
        return monai.DynUNet(
            spatial_dims=axes,
            in_channels=channels,
            out_channels=2,
            kernel_size=[3] * 4,
            strides=[1, 2, 2, 2],
            upsample_kernel_size=[2] * 3,
            filters=[4, 8, 8, 8],
            deep_supervision=deep,
            deep_supr_num=2 if deep else 1,
            res_block=res,
        )

    return make


def nnu_net(kind: Any, *, deep: bool, axes: int = 3) -> Callable[[int], nn.Module]:
    conv, norm = (nn.Conv3d, nn.InstanceNorm3d) if axes == 3 else (nn.Conv2d, nn.InstanceNorm2d)
    blocks = {"n_blocks_per_stage": 1} if kind is ResidualEncoderUNet else {"n_conv_per_stage": 1}

    def make(channels: int) -> nn.Module:
        return kind(
            input_channels=channels,
            n_stages=4,
            features_per_stage=[4, 8, 8, 8],
            conv_op=conv,
            kernel_sizes=3,
            strides=[1, 2, 2, 2],
            num_classes=2,
            n_conv_per_stage_decoder=1,
            conv_bias=True,
            norm_op=norm,
            norm_op_kwargs={"affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=deep,
            **blocks,
        )

    return make


def smp_net(kind: str, encoder: str = "resnet18", **options: Any) -> Callable[[int], nn.Module]:
    def make(channels: int) -> nn.Module:
        architecture = getattr(smp, kind)
        return architecture(
            encoder, encoder_weights=None, in_channels=channels, classes=2, **options
        )

    return make


def torchvision_net(kind: str, *, aux: bool = False) -> Callable[[int], nn.Module]:
    def make(channels: int) -> nn.Module:
        options = {} if kind.startswith("lraspp") else {"aux_loss": aux}
        # One block per stage instead of 3, 4, 6, 3: the same network, quicker to make.
        with mock.patch.object(resnet, "ResNet", shallow):
            net = getattr(torchvision, kind)(
                weights=None, weights_backbone=None, num_classes=2, **options
            )
        name, first = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
        other = nn.Conv2d(
            channels, first.out_channels, first.kernel_size, first.stride, first.padding, bias=False
        )
        net.set_submodule(name, other)
        return net

    return make


RESNET = resnet.ResNet


def shallow(block: type, layers: list[int], **options: Any) -> nn.Module:
    return RESNET(block, [1] * len(layers), **options)


def swin(channels: int) -> nn.Module:
    small = {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (1, 1, 1, 1)}
    heads = {"num_heads": (1, 2, 2, 2)}
    name = "swin_tiny_patch4_window7_224"
    return PlainDecoder(name, channels, channels_last=True, **small, **heads)


def dpt(channels: int) -> nn.Module:
    slim = {"decoder_intermediate_channels": (16, 16, 16, 16), "decoder_fusion_channels": 16}
    return smp_net("DPT", "tu-vit_tiny_patch16_224", dynamic_img_size=True, **slim)(channels)


def high_res_net(channels: int) -> nn.Module:
    layers = [
        {"name": "conv_0", "n_features": 4, "kernel_size": 3},
        {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 1},
        {"name": "res_2", "n_features": 8, "kernels": (3, 3), "repeat": 1},
        {"name": "conv_1", "n_features": 8, "kernel_size": 1},
        {"name": "conv_2", "kernel_size": 1},
    ]
    return monai.HighResNet(in_channels=channels, out_channels=2, layer_params=layers)


MONAI, SMP, TV = "MONAI", "segmentation_models.pytorch", "torchvision"
NNUNET, TIMM, OURS = "nnU-Net (dynamic_network_architectures)", "timm", "this project"
LIST, STACKED, MAPPING = "list of heads", "stacked heads", "mapping"
SQUARE, CUBE = (64, 64), (32, 32, 32)

NETWORKS = [
    Network("UNet 2-D", MONAI, monai_unet(2), (32, 32), "model.1.submodule.1.submodule"),
    Network("UNet 3-D", MONAI, monai_unet(3), CUBE, "model.1.submodule.1.submodule"),
    Network("BasicUNet 2-D", MONAI, lambda c: monai.BasicUNet(2, c, 2, features=(4, 4, 8, 8, 8, 4)), SQUARE, "down_4"),
    Network("BasicUNet 3-D", MONAI, lambda c: monai.BasicUNet(3, c, 2, features=(4, 4, 8, 8, 8, 4)), CUBE, "down_4"),
    Network("BasicUNet++ 2-D", MONAI, lambda c: monai.BasicUNetPlusPlus(2, c, 2, features=(4, 4, 8, 8, 8, 4)), SQUARE, "conv_4_0", output="list of one"),
    Network("BasicUNet++ 3-D, deep supervision", MONAI, lambda c: monai.BasicUNetPlusPlus(3, c, 2, features=(4, 4, 4, 4, 8, 4), deep_supervision=True), (32, 16, 16), "conv_4_0", output=LIST),
    Network("DynUNet 2-D", MONAI, dyn_unet(2, deep=False), SQUARE, "bottleneck"),
    Network("DynUNet 3-D", MONAI, dyn_unet(3, deep=False), CUBE, "bottleneck"),
    Network("DynUNet 3-D, deep supervision", MONAI, dyn_unet(3, deep=True, res=True), CUBE, "bottleneck", output=STACKED),
    Network("AttentionUnet 2-D", MONAI, lambda c: monai.AttentionUnet(2, c, 2, channels=(4, 8, 16), strides=(2, 2)), SQUARE, "model.1.submodule.1.submodule"),
    Network("AttentionUnet 3-D", MONAI, lambda c: monai.AttentionUnet(3, c, 2, channels=(4, 8, 16), strides=(2, 2)), CUBE, "model.1.submodule.1.submodule"),
    Network("SegResNet 2-D", MONAI, lambda c: monai.SegResNet(2, 8, c, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1)), SQUARE, "down_layers.2"),
    Network("SegResNet 3-D", MONAI, lambda c: monai.SegResNet(3, 8, c, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1)), CUBE, "down_layers.2"),
    Network("SegResNetVAE 3-D", MONAI, lambda c: monai.SegResNetVAE(CUBE, vae_nz=8, spatial_dims=3, init_filters=8, in_channels=c, out_channels=2, blocks_down=(1, 1, 1, 1), blocks_up=(1, 1, 1)), CUBE, "down_layers.3", output="tuple with a loss"),
    Network("SegResNetDS 3-D", MONAI, lambda c: monai.SegResNetDS(3, 4, c, 2, blocks_down=(1, 1, 1), dsdepth=2), CUBE, "encoder.layers.2.blocks", output=LIST),
    Network("VNet 2-D", MONAI, lambda c: monai.VNet(2, c, 2), (32, 32), "down_tr256"),
    Network("UNETR 3-D", MONAI, lambda c: monai.UNETR(c, 2, CUBE, feature_size=4, hidden_size=16, mlp_dim=32, num_heads=2), CUBE, "vit.norm"),
    Network("UNETR 2-D", MONAI, lambda c: monai.UNETR(c, 2, SQUARE, feature_size=4, hidden_size=16, mlp_dim=32, num_heads=2, spatial_dims=2), SQUARE, "vit.norm"),
    Network("SwinUNETR 3-D", MONAI, lambda c: monai.SwinUNETR(c, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), window_size=4, norm_name="batch"), CUBE, "encoder10"),
    Network("SwinUNETR 2-D", MONAI, lambda c: monai.SwinUNETR(c, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), spatial_dims=2), SQUARE, "encoder10"),
    Network("FlexibleUNet 2-D", MONAI, lambda c: monai.FlexibleUNet(c, 2, "resnet18", decoder_channels=(16, 8, 8, 8, 8)), SQUARE, "encoder.layer4"),
    Network("RegUNet 3-D", MONAI, lambda c: monai.RegUNet(3, c, 4, 2, out_channels=2, out_kernel_initializer="kaiming_uniform"), CUBE, "bottom_block"),
    Network("AHNet 2-D", MONAI, lambda c: monai.AHNet((1, 1, 1, 1), 2, in_channels=c, out_channels=2, psp_block_num=2), (32, 32), "layer4"),
    Network("AutoEncoder 2-D", MONAI, lambda c: monai.AutoEncoder(2, c, 2, (4, 8, 8), (2, 2, 2)), SQUARE, "encode"),
    Network("MedNeXt 3-D", MONAI, lambda c: monai.MedNeXt(3, 4, c, 2, kernel_size=3), CUBE, "bottleneck"),
    Network("MedNeXt 2-D, deep supervision", MONAI, lambda c: monai.MedNeXt(2, 4, c, 2, deep_supervision=True), SQUARE, "bottleneck", output=LIST),
    Network("QuickNAT 2-D", MONAI, lambda c: monai.Quicknat(2, c, 8), SQUARE, "model.1.submodule.1.submodule.1.submodule.1.submodule.layers2"),
    Network("HighResNet 3-D", MONAI, high_res_net, (16, 16, 16), "blocks.3", by_hand="never downsamples"),
    Network("Unet, ResNet-18", SMP, smp_net("Unet"), SQUARE, "encoder.layer4"),
    Network("Unet, EfficientNet-B0", SMP, smp_net("Unet", "efficientnet-b0"), SQUARE, "encoder._blocks.15"),
    Network("Unet, timm MobileNetV3", SMP, smp_net("Unet", "tu-mobilenetv3_small_100"), SQUARE, "encoder.model.blocks.5"),
    Network("Unet, timm ConvNeXt", SMP, smp_net("Unet", "tu-convnext_atto", decoder_channels=(32, 16, 8, 8, 8)), SQUARE, "encoder.model.stages_3"),
    Network("Unet, timm PVT v2", SMP, smp_net("Unet", "tu-pvt_v2_b0", decoder_channels=(32, 16, 8, 8, 8)), SQUARE, "encoder.model.stages_3"),
    Network("Unet, timm HRNet", SMP, smp_net("Unet", "tu-hrnet_w18_small"), SQUARE, "encoder.model.incre_modules.3"),
    Network("Unet++, ResNet-18", SMP, smp_net("UnetPlusPlus", decoder_channels=(32, 16, 8, 8, 8)), SQUARE, "encoder.layer4"),
    Network("MAnet, ResNet-18", SMP, smp_net("MAnet", decoder_channels=(32, 16, 8, 8, 8)), SQUARE, "encoder.layer4"),
    Network("Linknet, ResNet-18", SMP, smp_net("Linknet"), SQUARE, "encoder.layer4"),
    Network("FPN, ResNet-18", SMP, smp_net("FPN"), SQUARE, "encoder.layer4"),
    Network("PSPNet, ResNet-18", SMP, smp_net("PSPNet"), SQUARE, "encoder.layer2"),
    Network("PSPNet, timm HRNet", SMP, smp_net("PSPNet", "tu-hrnet_w18_small"), SQUARE, "encoder.model.stage4.0.branches.3"),
    Network("PSPNet, MiT-B0", SMP, smp_net("PSPNet", "mit_b0"), SQUARE, "encoder.norm2"),
    Network("DeepLabV3, ResNet-18", SMP, smp_net("DeepLabV3", decoder_channels=32), SQUARE, "encoder.layer4"),
    Network("DeepLabV3+, ResNet-18", SMP, smp_net("DeepLabV3Plus", decoder_channels=32), SQUARE, "encoder.layer4"),
    Network("PAN, ResNet-18", SMP, smp_net("PAN"), (128, 128), "encoder.layer4"),
    Network("UPerNet, ResNet-18", SMP, smp_net("UPerNet", decoder_channels=32), SQUARE, "encoder.layer4"),
    Network("Segformer, MiT-B0", SMP, smp_net("Segformer", "mit_b0", decoder_segmentation_channels=32), SQUARE, "encoder.norm4"),
    Network("Unet, MiT-B0", SMP, smp_net("Unet", "mit_b0"), SQUARE, "encoder.norm4"),
    Network("DPT, ViT-tiny", SMP, dpt, SQUARE, "encoder.model.blocks.11", by_hand="its decoder goes on to a coarser grid than its encoder's tokens"),
    Network("FCN, ResNet-14", TV, torchvision_net("fcn_resnet50"), (32, 32), "backbone.layer4", output=MAPPING),
    Network("FCN, ResNet-14, auxiliary head", TV, torchvision_net("fcn_resnet50", aux=True), (32, 32), "backbone.layer4", output="mapping with an auxiliary head"),
    Network("DeepLabV3, ResNet-14", TV, torchvision_net("deeplabv3_resnet50"), (32, 32), "backbone.layer4", output=MAPPING),
    Network("LR-ASPP, MobileNetV3", TV, torchvision_net("lraspp_mobilenet_v3_large"), SQUARE, "backbone.16", output=MAPPING),
    Network("features of ResNet-10t", TIMM, lambda c: PlainDecoder("resnet10t", c), SQUARE, "encoder.layer4"),
    Network("features of EfficientNet-Lite0", TIMM, lambda c: PlainDecoder("tf_efficientnet_lite0", c), SQUARE, "encoder.blocks.6"),
    Network("features of Swin (channels last)", TIMM, swin, SQUARE, "encoder.layers_3"),
    Network("PlainConvUNet 3-D", NNUNET, nnu_net(PlainConvUNet, deep=False), CUBE, "encoder.stages.3"),
    Network("PlainConvUNet 2-D, deep supervision", NNUNET, nnu_net(PlainConvUNet, deep=True, axes=2), SQUARE, "encoder.stages.3", output=LIST),
    Network("PlainConvUNet 3-D, deep supervision", NNUNET, nnu_net(PlainConvUNet, deep=True), CUBE, "encoder.stages.3", output=LIST),
    Network("ResidualEncoderUNet 3-D", NNUNET, nnu_net(ResidualEncoderUNet, deep=False), CUBE, "encoder.stages.3"),
    Network("ResidualEncoderUNet 3-D, deep supervision", NNUNET, nnu_net(ResidualEncoderUNet, deep=True), CUBE, "encoder.stages.3", output=LIST),
    Network("MultiResUNet 3-D", OURS, lambda c: MultiResUNet(c, 2, (4, 8, 8, 16, 16)), (32, 16, 16), "bottleneck"),
    Network("MultiResUNet 2-D", OURS, lambda c: MultiResUNet(c, 2, (4, 8, 8, 16, 16), spatial_dims=2), SQUARE, "bottleneck"),
    Network("KDNet 3-D", OURS, lambda c: KDNet(c, 2, (4, 8, 16, 16, 32)), CUBE, "bottleneck"),
    Network("U-Net 1-D", OURS, Signal, (64,), "bottleneck"),
]  # fmt: skip
