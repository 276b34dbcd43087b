"""Whole models of timm and torchvision, fused and eager: the same outputs, gradients and buffers, in float64."""

import warnings

import pytest
import torch

from resfuse.bench import coverage
from resfuse.bench.agreement import agreement

MODELS = [
    ("torchvision", name, 64)
    for name in (
        "resnet18", "regnet_x_400mf", "regnet_y_400mf", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5",
        "mnasnet0_5", "efficientnet_b0", "densenet121", "vgg11_bn",
    )
] + [("torchvision", "googlenet", 96)] + [
    ("timm", name, 64)
    for name in (
        "resnet18", "resnet18d", "resnet26t", "seresnet50", "resnetblur18", "ecaresnet26t", "resnext26ts", "skresnet18",
        "regnetx_002", "regnety_002", "regnetz_005", "mobilenetv2_050", "mobilenetv3_small_050",
        "mobilenetv4_conv_small",
        "tf_efficientnet_lite0", "efficientnet_es", "mnasnet_small", "mixnet_s", "hrnet_w18_small", "dla46_c",
        "repvgg_a0", "ghostnet_050", "densenet121", "selecsls42", "cs3darknet_s", "res2net50_14w_8s",
        "legacy_seresnet18",
        "levit_conv_128s",
    )
]  # fmt: skip


@pytest.mark.parametrize("library, name, side", MODELS, ids=lambda value: str(value))
def test_a_fused_model_agrees_with_itself(library, name, side):
    pytest.importorskip(library)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, size = coverage.build(library, name, meta=False)
    side = size[-1] if name.startswith("levit") else side  # of a fixed size
    found = agreement(model, (2, 3, side, side))
    assert found.worst < 1e-7 and not found.fallbacks, found
