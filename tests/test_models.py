"""Whole models of timm and torchvision, fused and eager: the same outputs, gradients and buffers, in float64."""

import warnings

import pytest
import torch

from resfuse.bench import coverage
from resfuse.bench.agreement import agreement

MODELS = [
    *(("torchvision", name) for name in (
        "resnet18", "regnet_x_400mf", "regnet_y_400mf", "densenet121", "mobilenet_v2", "mobilenet_v3_small",
        "mnasnet0_5", "efficientnet_b0", "shufflenet_v2_x0_5", "googlenet",
    )),
    *(("timm", name) for name in (
        "resnet18", "resnet18d", "resnet26t", "resnext50_32x4d", "seresnet50", "ecaresnet26t", "resnetblur18",
        "regnetx_002", "regnety_002", "hrnet_w18_small", "efficientnet_es",
        "efficientnet_b0", "tf_efficientnetv2_b0", "mobilenetv3_small_050", "mobilenetv4_conv_small", "lcnet_050",
        "ghostnet_050", "repghostnet_050", "dla46_c", "res2net50_48w_2s", "legacy_seresnet18", "hgnetv2_b0",
        "cs3darknet_focus_s", "repvgg_a0", "mobileone_s0", "selecsls42", "skresnet18", "resnest14d", "dpn48b",
        "ese_vovnet19b_slim_dw",
    )),
]  # fmt: skip


@pytest.mark.parametrize("library, name", MODELS)
def test_a_fused_model_agrees_with_itself(library, name):
    pytest.importorskip(library)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, size = coverage.build(library, name, meta=False)
    assert coverage.row(name, model, size).coverage > 0.25, "too little is fused to show anything"
    found = agreement(model, (2, 3, 64, 64))
    assert found.agrees, found
