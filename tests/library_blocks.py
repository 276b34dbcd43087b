"""One of each block of timm and torchvision that has a fused form, by name: functions that make them, of C channels."""

from functools import partial

import timm
from timm import layers
from timm.models import _efficientnet_blocks as efficientnet
from timm.models import (
    byobnet,
    cspnet,
    densenet,
    dla,
    dpn,
    efficientformer,
    efficientformer_v2,
    efficientvit_mit,
    efficientvit_msra,
    hgnet,
    levit,
    nasnet,
    nextvit,
    pnasnet,
    regnet,
    repvit,
    res2net,
    resnest,
    resnet,
    resnetv2,
    senet,
    shvit,
    sknet,
    starnet,
    tiny_vit,
    tresnet,
    xception_aligned,
)  # fmt: skip
from torch import nn
from torchvision.models import efficientnet as mbconv
from torchvision.models import mnasnet, mobilenetv2, mobilenetv3
from torchvision.models.googlenet import BasicConv2d as googlenet_unit
from torchvision.models.inception import BasicConv2d as inception_unit
from torchvision.models.quantization.googlenet import QuantizableBasicConv2d as quantizable_googlenet
from torchvision.models.quantization.inception import QuantizableBasicConv2d as quantizable_inception
from torchvision.models.quantization.resnet import QuantizableBasicBlock, QuantizableBottleneck
from torchvision.models.regnet import ResBottleneckBlock, SimpleStemIN
from torchvision.models.segmentation.deeplabv3 import ASPPConv, DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops.misc import Conv2dNormActivation

C = 16


def down(channels, stride, average=False):
    return (resnet.downsample_avg if average else resnet.downsample_conv)(C, channels, 1, stride)


def v2_block(cls, out_channels=C, **options):
    return cls(C, out_channels, conv_layer=layers.create_conv2d, norm_layer=layers.BatchNormAct2d, **options)


BUILDERS = {
    "basic": lambda: resnet.BasicBlock(C, C),
    "basic strided": lambda: resnet.BasicBlock(C, 8, 2, down(8, 2), drop_path=layers.DropPath(0.5)),
    "basic blurred": lambda: resnet.BasicBlock(C, 8, 2, down(8, 2), aa_layer=layers.BlurPool2d),
    "bottleneck": lambda: resnet.Bottleneck(C, 4, drop_path=layers.DropPath(0.5)),
    "bottleneck d": lambda: resnet.Bottleneck(C, 4, 2, down(16, 2, average=True)),
    "bottleneck with attention": lambda: resnet.Bottleneck(
        C, 4, 2, down(16, 2), attn_layer=layers.SEModule, drop_path=layers.DropPath(0.5)
    ),
    "bottleneck blurred": lambda: resnet.Bottleneck(C, 4, 2, down(16, 2, average=True), aa_layer=layers.BlurPool2d),
    "bottleneck with blocks left out": lambda: resnet.Bottleneck(
        C, 4, drop_block=lambda: layers.DropBlock2d(0.3, 3)
    ),
    "regnet": lambda: regnet.Bottleneck(C, 24, 2, group_size=8, se_ratio=0, drop_path_rate=0.5),
    "regnet with attention": lambda: regnet.Bottleneck(C, C, group_size=8),
    "regnet without shortcut": lambda: regnet.Bottleneck(C, 24, downsample=None, se_ratio=0),
    "edge": lambda: efficientnet.EdgeResidual(C, C, exp_ratio=2, drop_path_rate=0.5),
    "edge, strided, same": lambda: efficientnet.EdgeResidual(C, 24, 3, 2, exp_ratio=2, pad_type="same"),
    "edge with attention": lambda: efficientnet.EdgeResidual(C, C, exp_ratio=2, se_layer=efficientnet.SqueezeExcite),
    "inverted": lambda: efficientnet.InvertedResidual(C, C, exp_ratio=2, act_layer=nn.SiLU, drop_path_rate=0.5),
    "inverted, strided, with attention": lambda: efficientnet.InvertedResidual(
        C, 24, 5, 2, exp_ratio=2, act_layer=nn.Hardswish, se_layer=efficientnet.SqueezeExcite, pad_type="same"
    ),
    "inverted, leaky": lambda: efficientnet.InvertedResidual(C, C, exp_ratio=2, act_layer=nn.LeakyReLU),
    "separable": lambda: efficientnet.DepthwiseSeparableConv(C, C, act_layer=nn.SiLU),
    "separable with attention": lambda: efficientnet.DepthwiseSeparableConv(
        C, 24, se_layer=efficientnet.SqueezeExcite, pw_act=True, act_layer=nn.ReLU6
    ),
    "universal": lambda: efficientnet.UniversalInvertedResidual(C, C, 5, 3, exp_ratio=2, drop_path_rate=0.5),
    "universal, strided": lambda: efficientnet.UniversalInvertedResidual(
        C, 24, 0, 5, 3, stride=2, exp_ratio=2, layer_scale_init_value=None
    ),
    "mobilenetv2": lambda: mobilenetv2.InvertedResidual(C, C, 1, 2),
    "mobilenetv2, strided": lambda: mobilenetv2.InvertedResidual(C, 8, 2, 1),
    "mobilenetv3": lambda: mobilenetv3.InvertedResidual(
        mobilenetv3.InvertedResidualConfig(C, 5, 32, C, True, "HS", 1, 1, 1), nn.BatchNorm2d
    ),
    "mbconv": lambda: mbconv.MBConv(mbconv.MBConvConfig(2, 3, 1, C, C, 1, 1, 1), 0.5, nn.BatchNorm2d),
    "fused mbconv": lambda: mbconv.FusedMBConv(mbconv.FusedMBConvConfig(2, 3, 1, C, C, 1), 0.5, nn.BatchNorm2d),
    "mnasnet": lambda: mnasnet._InvertedResidual(C, C, 3, 1, 2),
    "wrapper": lambda: Conv2dNormActivation(C, 8, activation_layer=nn.SiLU),
    "torchvision regnet, stem": lambda: SimpleStemIN(C, 8, nn.BatchNorm2d, nn.ReLU),
    "torchvision regnet": lambda: ResBottleneckBlock(C, 24, 2, nn.BatchNorm2d, nn.ReLU, 8, 1.0, None),
    "torchvision regnet with attention": lambda: ResBottleneckBlock(C, C, 1, nn.BatchNorm2d, nn.ReLU, 8, 1.0, 0.25),
    "unit": lambda: layers.ConvNormAct(C, 8, 3, stride=2),
    "unit, blurred": lambda: layers.ConvNormAct(C, 8, 3, stride=2, aa_layer=layers.BlurPool2d, act_layer=nn.SiLU),
    "unit without activation": lambda: layers.ConvNormAct(C, 8, 1, apply_act=False),
    "unit with gelu": lambda: layers.ConvNormAct(C, 8, 3, act_layer=nn.GELU),
    "unit with skip": lambda: efficientnet.ConvBnAct(C, C, 3, skip=True, drop_path_rate=0.5),
    "levit": lambda: levit.ConvNorm(C, 8, 3, 2, 1),
    "efficientformer": lambda: efficientformer_v2.ConvNorm(C, 8),
    "efficientvit": lambda: efficientvit_msra.ConvNorm(C, 8),
    "tiny vit": lambda: tiny_vit.ConvNorm(C, 8),
    "repvit": lambda: repvit.ConvNorm(C, 8),
    "shvit": lambda: shvit.Conv2dNorm(C, 8),
    "hgnet": lambda: hgnet.ConvBNAct(C, 8, 3, use_lab=True),
    "googlenet": lambda: googlenet_unit(C, 8, kernel_size=3),
    "inception": lambda: inception_unit(C, 8, kernel_size=1),
    "quantizable googlenet": lambda: quantizable_googlenet(C, 8, kernel_size=3),
    "quantizable inception": lambda: quantizable_inception(C, 8, kernel_size=1),
    "quantizable basic": lambda: QuantizableBasicBlock(C, 24, 2, down(24, 2)),
    "quantizable bottleneck": lambda: QuantizableBottleneck(C, 4),
    "segmentation, dilated": lambda: ASPPConv(C, 8, 2),
    "segmentation, FCN": lambda: FCNHead(C, 5),
    "segmentation, DeepLab": lambda: DeepLabHead(C, 5, (2, 4)),
    "efficientformer down": lambda: efficientformer.Downsample(C, 8),
    "efficientformer stem": lambda: efficientformer.Stem4(C, 8),
    "efficientformer mlp": lambda: efficientformer.ConvMlpWithNorm(C, 8, drop=0.3),
    "efficientvit of MIT": lambda: efficientvit_mit.ConvNormAct(C, 8, dropout=0.3),
    "starnet": lambda: starnet.ConvBN(C, 8),
    "nextvit": lambda: nextvit.ConvNormAct(C, 8, 3, 2),
    "nextvit convolution in attention": lambda: nextvit.ConvAttention(C, 8),
    "nextvit patches": lambda: nextvit.PatchEmbed(C, 8, 2),
    "nasnet": lambda: nasnet.ActConvBn(C, 8, 1),
    "pnasnet": lambda: pnasnet.ActConvBn(C, 8, 1),
    "pointwise after depthwise": lambda: layers.SeparableConvNormAct(C, 8, 3, 2, padding=1),
    "pointwise after depthwise, linear": lambda: layers.SeparableConvNormAct(C, C, 3, padding=1, apply_act=False),
    "split attention": lambda: layers.SplitAttn(C, 8, norm_layer=nn.BatchNorm2d),
    "split attention of one": lambda: layers.SplitAttn(C, 8, radix=1, groups=2, norm_layer=nn.BatchNorm2d),
    "split attention, dropped": lambda: layers.SplitAttn(
        C, 8, 3, 2, radix=4, norm_layer=nn.BatchNorm2d, drop_layer=partial(nn.Dropout, 0.3), act_layer=nn.SiLU
    ),
    "byob basic": lambda: byobnet.BasicBlock(C, C, drop_path_rate=0.5),
    "byob bottleneck": lambda: byobnet.BottleneckBlock(
        C, 24, stride=2, bottle_ratio=0.5, group_size=4, downsample="conv1x1", extra_conv=True
    ),
    "byob bottleneck with attention": lambda: byobnet.BottleneckBlock(
        C, C, attn_last=True, layers=byobnet.LayerFn(attn=layers.SEModule, act=nn.SiLU)
    ),
    "byob dark": lambda: byobnet.DarkBlock(C, 24, stride=2),
    "byob edge": lambda: byobnet.EdgeBlock(C, C, linear_out=True),
    "csp bottleneck": lambda: cspnet.BottleneckBlock(C, C, drop_path=0.5),
    "csp dark": lambda: cspnet.DarkBlock(C, C, act_layer=nn.SiLU, drop_path=0.5),
    "csp edge with attention": lambda: cspnet.EdgeBlock(C, C, attn_layer=layers.SEModule),
    "senet with attention": lambda: senet.SEResNeXtBottleneck(C, 4, 2, 4, base_width=64),
    "senet bottleneck with attention": lambda: senet.SEResNetBottleneck(C, 4, 1, 4),
    "senet strided with attention": lambda: senet.SEBottleneck(C, 4, 2, 4, 2, nn.Sequential(
        nn.Conv2d(C, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
    )),
    "senet basic with attention": lambda: senet.SEResNetBlock(C, C, 1, 4),
    "tresnet": lambda: tresnet.BasicBlock(C, C, use_se=False, drop_path_rate=0.5),
    "tresnet with attention": lambda: tresnet.Bottleneck(C, 4, use_se=True),
    "resnest with attention": lambda: resnest.ResNestBottleneck(C, 4, 2, down(16, 2), avd=True),
    "selective kernels with attention": lambda: sknet.SelectiveKernelBottleneck(
        C, 8, 2, layers.ConvNormAct(C, 32, 1, 2, apply_act=False)
    ),
    "xception": lambda: xception_aligned.SeparableConv2d(C, 24, 3, 2),
    "bottleneck with elu": lambda: resnet.Bottleneck(C, 4, act_layer=nn.ELU),
    "regnet with mish and attention": lambda: regnet.Bottleneck(C, C, group_size=8, act_layer=layers.Mish),
    "edge with gelu": lambda: efficientnet.EdgeResidual(C, C, act_layer=nn.GELU),
    "lone": lambda: nn.Sequential(nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
    "lone with mish": lambda: nn.Sequential(nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4), nn.Mish(inplace=True)),
    "dense layer": lambda: densenet.DenseLayer(C, 8, 2, drop_rate=0.3),
    "dense transition": lambda: densenet.DenseTransition(C, 8),
    "dense transition, blurred": lambda: densenet.DenseTransition(C, 8, aa_layer=layers.BlurPool2d),
    "dual path": lambda: dpn.BnActConv2d(C, 8, 3, 2),
    "v2 basic": lambda: v2_block(resnetv2.PreActBasic, drop_path_rate=0.5),
    "v2 basic, strided": lambda: v2_block(resnetv2.PreActBasic, 24, stride=2, proj_layer=resnetv2.DownsampleConv),
    "v2 bottleneck": lambda: v2_block(resnetv2.PreActBottleneck, drop_path_rate=0.5),
    "v2 bottleneck, averaged": lambda: v2_block(
        resnetv2.PreActBottleneck, 24, stride=2, proj_layer=resnetv2.DownsampleAvg
    ),
    "res2net": lambda: res2net.Bottle2neck(C, 4, norm_layer=nn.BatchNorm2d, base_width=64, scale=4),
    "res2net, strided": lambda: res2net.Bottle2neck(
        C, 4, 2, down(16, 2), norm_layer=nn.BatchNorm2d, base_width=64, scale=3
    ),
    "res2net with attention": lambda: res2net.Bottle2neck(
        C, 4, norm_layer=nn.BatchNorm2d, base_width=64, attn_layer=layers.SEModule
    ),
    "res2net in dla": lambda: dla.DlaBottle2neck(C, C, cardinality=2, base_width=32),
    "dla basic": lambda: dla.DlaBasic(C, C),
    "dla bottleneck": lambda: dla.DlaBottleneck(C, C),
    "dla tree": lambda: dla.DlaTree(2, dla.DlaBasic, C, 24, level_root=True, root_shortcut=True),
    "resnet": lambda: resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), 8, C, channels=(8, 8, 8, 8)),
    "resnet, deep stem": lambda: resnet.ResNet(
        resnet.BasicBlock, (1, 1, 1, 1), 8, C, channels=(8, 8, 8, 8), stem_type="deep", stem_width=4
    ),
    "resnet, replaced pool": lambda: resnet.ResNet(
        resnet.BasicBlock, (1, 1, 1, 1), 8, C, channels=(8, 8, 8, 8), replace_stem_pool=True
    ),
    "resnet, deep stem, replaced pool": lambda: resnet.ResNet(
        resnet.BasicBlock, (1, 1, 1, 1), 8, C, channels=(8, 8, 8, 8), stem_type="deep", stem_width=4,
        replace_stem_pool=True,
    ),
    "efficientnet with attention": lambda: timm.create_model("test_efficientnet", in_chans=C, num_classes=8),
    "row": lambda: nn.Sequential(
        nn.Conv2d(C, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
    ),
    "row and others": lambda: nn.Sequential(
        nn.Conv2d(C, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8),
        nn.Conv2d(8, 4, 3), nn.GELU(),
    ),
}  # fmt: skip
