"""A table of other libraries' blocks, described by the names of their parts; `described.py` says what that means."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """A convolution: dotted names, inside the block, of it, of its BatchNorm, and of the modules called after that, in
    order. What is absent, None or an Identity is left out; a convolution then with all that belongs to it. relu: the
    forward itself calls ReLU after the BatchNorm."""

    conv: str
    norm: str
    after: tuple[str, ...] = ()
    relu: bool = False


class BlockDescription(NamedTuple):
    """A block by the names of its parts, whose forward is what the docstring of `described.py` says.

    before: modules called on x before the first convolution, in order.
    row: in the place of parts, a Sequential of them, in which others may lie, and what is called between them.
    attention: modules on the last BatchNorm's output. shortcut: None where there is none; else a module on x, an
    identity where that is None or its name is "" (or, with none_adds_nothing, nothing). skips: an attribute that says
    whether x is added, in blocks without a module for it. activation: after the sum; relu: the forward itself calls
    ReLU there.
    """

    parts: tuple[Part, ...] = ()
    attention: tuple[str, ...] = ()
    drop_path: str | None = None
    shortcut: str | None = None
    none_adds_nothing: bool = False
    skips: str | None = None
    activation: str | None = None
    row: str | None = None
    relu: bool = False
    adds: str | None = None
    before: tuple[str, ...] = ()


def wrapper(name: str, then: tuple[str, ...] = ()) -> Part:
    """A timm ConvNormAct, the activation of which is inside its BatchNorm."""
    return Part(f"{name}.conv", f"{name}.bn", (f"{name}.aa", *then))


def unit(conv: str, norm: str = "bn", *after: str, before: tuple[str, ...] = (), relu=False) -> BlockDescription:
    """A module around one convolution."""
    return BlockDescription((Part(conv, norm, after, relu),), before=before)


def byob(*parts: Part) -> BlockDescription:
    """A block of timm's ByobNet."""
    return BlockDescription(parts, ("attn_last",), "drop_path", "shortcut", none_adds_nothing=True, activation="act")


def senet(*relus: bool) -> BlockDescription:
    """A block of timm's SENet: whether its one ReLU follows each convolution."""
    parts = (Part(f"conv{i}", f"bn{i}", ("relu",) * follows) for i, follows in enumerate(relus, 1))
    return BlockDescription(tuple(parts), ("se_module",), None, "downsample", activation="relu")


def transformers(*then: tuple[str, ...]) -> BlockDescription:
    """A layer of Hugging Face's ResNets and RegNets: what is called after each convolution's own activation."""
    parts, place = [], 0
    for after in then:
        own = f"layer.{place}"
        parts.append(Part(f"{own}.convolution", f"{own}.normalization", (f"{own}.activation", *after)))
        place += 1 + len(after)
    return BlockDescription(tuple(parts), shortcut="shortcut", activation="activation")


def detectron(count: int) -> BlockDescription:
    """A block of detectron2's ResNets, whose convolutions call their BatchNorms, and whose forward calls ReLU."""
    parts = (Part(f"conv{i}", f"conv{i}.norm", (f"conv{i}.activation",), i < count) for i in range(1, count + 1))
    return BlockDescription(tuple(parts), shortcut="shortcut", relu=True)


IDENTITY = ""  # a shortcut that is no module: x itself
SKIPS = {"drop_path": "drop_path", "skips": "has_skip"}  # EfficientNet's way to add x
BLOCKS = {
    "timm.models.resnet.BasicBlock": BlockDescription(
        (Part("conv1", "bn1", ("drop_block", "act1", "aa")), Part("conv2", "bn2")),
        ("se",), "drop_path", "downsample", activation="act2",
    ),
    "timm.models.resnet.Bottleneck": BlockDescription(
        (Part("conv1", "bn1", ("act1",)), Part("conv2", "bn2", ("drop_block", "act2", "aa")), Part("conv3", "bn3")),
        ("se",), "drop_path", "downsample", activation="act3",
    ),
    "timm.models.regnet.Bottleneck": BlockDescription(
        (wrapper("conv1"), wrapper("conv2", then=("se",)), wrapper("conv3")),
        (), "drop_path", "downsample", none_adds_nothing=True, activation="act3",
    ),
    "timm.models._efficientnet_blocks.EdgeResidual": BlockDescription(
        (Part("conv_exp", "bn1", ("aa", "se")), Part("conv_pwl", "bn2")), (), "drop_path", skips="has_skip",
    ),
    "timm.models._efficientnet_blocks.InvertedResidual": BlockDescription(
        (
            Part("conv_s2d", "bn_s2d"), Part("conv_pw", "bn1"), Part("conv_dw", "bn2", ("aa", "se")),
            Part("conv_pwl", "bn3"),
        ),
        (), "drop_path", skips="has_skip",
    ),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": BlockDescription(
        (Part("conv_s2d", "bn_s2d"), Part("conv_dw", "bn1", ("aa", "se")), Part("conv_pw", "bn2")),
        (), "drop_path", skips="has_skip",
    ),
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": BlockDescription(
        (
            wrapper("dw_start"), wrapper("pw_exp"), wrapper("dw_mid", then=("se",)), wrapper("pw_proj"),
            wrapper("dw_end"),
        ),
        ("layer_scale",), "drop_path", skips="has_skip",
    ),
    "timm.layers.conv_bn_act.ConvNormAct": unit("conv", "bn", "aa"),
    "timm.models._efficientnet_blocks.ConvBnAct": BlockDescription((Part("conv", "bn1", ("aa",)),), **SKIPS),
    "timm.models.levit.ConvNorm": unit("linear"),
    "timm.models.efficientvit_msra.ConvNorm": unit("conv"),
    "timm.models.tiny_vit.ConvNorm": unit("conv"),
    "timm.models.efficientformer_v2.ConvNorm": unit("conv"),
    "timm.models.repvit.ConvNorm": unit("c"),
    "timm.models.shvit.Conv2dNorm": unit("c"),
    "timm.models.efficientformer.Downsample": unit("conv", "norm"),
    "timm.models.efficientformer.ConvMlpWithNorm": BlockDescription(
        (Part("fc1", "norm1", ("act", "drop")), Part("fc2", "norm2", ("drop",)))
    ),
    "timm.models.efficientvit_mit.ConvNormAct": unit("conv", "norm", "act", before=("dropout",)),
    "timm.models.nextvit.ConvNormAct": unit("conv", "norm", "act"),
    "timm.models.nextvit.ConvAttention": unit("group_conv3x3", "norm", "act", "projection"),
    "timm.models.nextvit.PatchEmbed": unit("conv", "norm", before=("pool",)),
    "timm.models.nasnet.ActConvBn": unit("conv", before=("act",)),
    "timm.models.pnasnet.ActConvBn": unit("conv", before=("act",)),
    "timm.layers.separable_conv.SeparableConvNormAct": unit("conv_pw", before=("conv_dw",)),
    "timm.models.hgnet.ConvBNAct": unit("conv", "bn", "act", "lab"),
    "timm.models.byobnet.BasicBlock": byob(wrapper("conv1_kxk", then=("attn",)), wrapper("conv2_kxk")),
    "timm.models.byobnet.BottleneckBlock": byob(
        wrapper("conv1_1x1"), wrapper("conv2_kxk"), wrapper("conv2b_kxk", then=("attn",)), wrapper("conv3_1x1")
    ),
    "timm.models.byobnet.DarkBlock": byob(wrapper("conv1_1x1", then=("attn",)), wrapper("conv2_kxk")),
    "timm.models.byobnet.EdgeBlock": byob(wrapper("conv1_kxk", then=("attn",)), wrapper("conv2_1x1")),
    "timm.models.cspnet.BottleneckBlock": BlockDescription(
        (wrapper("conv1"), wrapper("conv2", then=("attn2",)), wrapper("conv3")),
        ("attn3",), "drop_path", IDENTITY, activation="act3",
    ),
    "timm.models.cspnet.DarkBlock": BlockDescription(
        (wrapper("conv1", then=("attn",)), wrapper("conv2")), (), "drop_path", IDENTITY
    ),
    "timm.models.cspnet.EdgeBlock": BlockDescription(
        (wrapper("conv1", then=("attn",)), wrapper("conv2")), (), "drop_path", IDENTITY
    ),
    "timm.models.dla.DlaBasic": BlockDescription(
        (Part("conv1", "bn1", ("relu",)), Part("conv2", "bn2")), shortcut=IDENTITY, activation="relu"
    ),
    "timm.models.dla.DlaBottleneck": BlockDescription(
        (Part("conv1", "bn1", ("relu",)), Part("conv2", "bn2", ("relu",)), Part("conv3", "bn3")),
        shortcut=IDENTITY, activation="relu",
    ),
    "timm.models.senet.SEResNetBlock": senet(True, True),
    "timm.models.senet.SEBottleneck": senet(True, True, False),
    "timm.models.senet.SEResNetBottleneck": senet(True, True, False),
    "timm.models.senet.SEResNeXtBottleneck": senet(True, True, False),
    "timm.models.tresnet.BasicBlock": BlockDescription(
        (wrapper("conv1"), wrapper("conv2")), ("se",), "drop_path", "downsample", activation="act"
    ),
    "timm.models.tresnet.Bottleneck": BlockDescription(
        (wrapper("conv1"), wrapper("conv2", then=("se",)), wrapper("conv3")),
        (), "drop_path", "downsample", activation="act",
    ),
    "timm.models.resnest.ResNestBottleneck": BlockDescription(
        (
            Part("conv1", "bn1", ("act1", "avd_first", "conv2", "bn2", "drop_block", "act2", "avd_last")),
            Part("conv3", "bn3"),
        ),
        shortcut="downsample", activation="act3",
    ),
    "timm.models.sknet.SelectiveKernelBottleneck": BlockDescription(
        (wrapper("conv1", then=("conv2",)), wrapper("conv3")), ("se",), "drop_path", "downsample", activation="act"
    ),
    "timm.models.xception_aligned.SeparableConv2d": BlockDescription(
        (Part("conv_dw", "bn_dw", ("act_dw",)), Part("conv_pw", "bn_pw", ("act_pw",)))
    ),
    "transformers.models.resnet.modeling_resnet.ResNetConvLayer": unit("convolution", "normalization", "activation"),
    "transformers.models.resnet.modeling_resnet.ResNetBasicLayer": transformers((), ()),
    "transformers.models.resnet.modeling_resnet.ResNetBottleNeckLayer": transformers((), (), ()),
    "transformers.models.regnet.modeling_regnet.RegNetConvLayer": unit("convolution", "normalization", "activation"),
    "transformers.models.regnet.modeling_regnet.RegNetXLayer": transformers((), (), ()),
    "transformers.models.regnet.modeling_regnet.RegNetYLayer": transformers((), ("layer.2",), ()),
    "detectron2.modeling.backbone.resnet.BasicBlock": detectron(2),
    "detectron2.modeling.backbone.resnet.BottleneckBlock": detectron(3),
    "torchvision.models.googlenet.BasicConv2d": unit("conv", relu=True),
    "torchvision.models.inception.BasicConv2d": unit("conv", relu=True),
    "torchvision.models.quantization.googlenet.QuantizableBasicConv2d": unit("conv", "bn", "relu"),
    "torchvision.models.quantization.inception.QuantizableBasicConv2d": unit("conv", "bn", "relu"),
    "torchvision.models.quantization.resnet.QuantizableBasicBlock": BlockDescription(
        (Part("conv1", "bn1", ("relu",)), Part("conv2", "bn2")), shortcut="downsample", adds="add_relu"
    ),
    "torchvision.models.quantization.resnet.QuantizableBottleneck": BlockDescription(
        (Part("conv1", "bn1", ("relu1",)), Part("conv2", "bn2", ("relu2",)), Part("conv3", "bn3")),
        shortcut="downsample", adds="skip_add_relu",
    ),
    "torchvision.models.mobilenetv2.InvertedResidual": BlockDescription(row="conv", skips="use_res_connect"),
    "torchvision.models.mobilenetv3.InvertedResidual": BlockDescription(row="block", skips="use_res_connect"),
    "torchvision.models.efficientnet.MBConv": BlockDescription(
        row="block", drop_path="stochastic_depth", skips="use_res_connect"
    ),
    "torchvision.models.efficientnet.FusedMBConv": BlockDescription(
        row="block", drop_path="stochastic_depth", skips="use_res_connect"
    ),
    "torchvision.models.mnasnet._InvertedResidual": BlockDescription(row="layers", skips="apply_residual"),
    "torchvision.models.regnet.ResBottleneckBlock": BlockDescription(
        (Part("f.a.0", "f.a.1", ("f.a.2",)), Part("f.b.0", "f.b.1", ("f.b.2", "f.se")), Part("f.c.0", "f.c.1")),
        shortcut="proj", activation="activation",
    ),
}  # fmt: skip
