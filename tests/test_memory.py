"""What a fused block keeps for backward: the product's promise, in units of one [M, w] activation."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

import resfuse
from resfuse import functional
from resfuse.blocks import modules
from resfuse.testing.cases import CASES, BottleneckCase, dense_layer, make_block, make_input
from resfuse.testing.memory import saved_bytes

# Identity blocks at the four stages' channels with M = 16 w rows, the fewest that the promise speaks of.
STAGES = [BottleneckCase(f"stage{i}", 4 * w, w, 4 * w, h, batch=16 * w // h**2)
          for i, (w, h) in enumerate(((64, 32), (128, 32), (256, 32), (512, 32)), 1)]
LIMITS = {torch.bfloat16: 6.3, torch.float16: 6.3, torch.float32: 6.2}


def units(case, block, dtype):
    """The block's output counts, being what the next block keeps; its input was counted by the block before."""
    x = make_input(case, dtype).requires_grad_()
    autocast = torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else nullcontext()
    with autocast:
        kept = saved_bytes(lambda: block(x), block, [x])
    return kept / case.unit_bytes(x.element_size())


@pytest.mark.gate
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", STAGES[:2], ids=lambda case: case.name)
def test_an_identity_bottleneck(case, dtype):
    check_identity(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", STAGES[2:], ids=lambda case: case.name)
def test_a_wide_identity_bottleneck(case, dtype):
    check_identity(case, dtype)


def check_identity(case, dtype):
    assert case.rows == 16 * case.width
    fused = units(case, resfuse.fuse(make_block(case)), dtype)
    # z1, z2, out and a bit for each of its values.
    bits = 0.25 if dtype != torch.float32 else 0.125
    assert 6 + bits <= fused <= LIMITS[dtype]


def test_eager_keeps_twelve():
    """The comparison's own ground: eager keeps z1, y1, z2, y2, z3 and out beside its input."""
    assert units(STAGES[0], make_block(STAGES[0]), torch.float32) == pytest.approx(12, rel=0.01)


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
NETWORKS = [
    ("resnet50", FLOAT32, 0.50), ("resnet18", FLOAT32, 0.64),
    pytest.param("resnet50", BFLOAT16, 0.45, marks=pytest.mark.slow),
    *(pytest.param("densenet121", dtype, 0.45, marks=pytest.mark.slow) for dtype in (FLOAT32, BFLOAT16)),
]  # fmt: skip


@pytest.mark.parametrize("name, dtype, limit", NETWORKS, ids=str)
def test_networks(name, dtype, limit):
    """224 px, stem and head included; ResNets at batch 8."""
    eager = getattr(torchvision.models, name)().to(memory_format=torch.channels_last)
    x = torch.randn(2 if name == "densenet121" else 8, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    kept = []
    for model in (eager, resfuse.fuse(copy.deepcopy(eager))):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            kept.append(saved_bytes(lambda model=model: model(x), model))
    assert kept[1] <= limit * kept[0]


# Units of the block's own [M, w] tensor, x left out: what is kept, and what eager keeps.
BITS = {torch.float32: 1 / 32, torch.bfloat16: 1 / 16}
FAMILY_UNITS = {
    "basic-stage1": (3, 4, 1),  # z1, z2, out, a bit for each of its values; eager: z1, y1, z2, out
    "preact-stage1": (6, 12, 0),  # z1, z2, out; eager: y1, z1, y2, z2, y3 and out
    "preact-basic-stage2": (2, 4, 0),  # z1, out; eager: y1, z1, y2, out
}


@pytest.mark.gate
@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("name", FAMILY_UNITS)
def test_the_familys_blocks(name, dtype):
    ours, theirs, masks = FAMILY_UNITS[name]
    case = replace(CASES[name], batch=2)
    assert units(case, resfuse.fuse(make_block(case)), dtype) == pytest.approx(ours + masks * BITS[dtype], rel=0.02)
    if dtype == torch.float32:  # under autocast eager keeps cast weights too
        assert units(case, make_block(case), dtype) == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_the_stem_keeps_at_most_half(dtype):
    """Of what it makes: the image is kept by the convolution either way."""
    case = replace(CASES["stem"], batch=2)
    assert units(case, resfuse.fuse(make_block(case)), dtype) <= 0.5 * units(case, make_block(case), dtype)


def test_dense_layers_keep_features_once():
    """Three layers on one list: every feature once, and each layer's narrow product; no concatenation."""
    layers = nn.Sequential(*(dense_layer(64 + 16 * i, 16) for i in range(3)))
    resfuse.fuse(layers)
    x = torch.randn(2, 64, 28, 28).contiguous(memory_format=torch.channels_last).requires_grad_()

    def forward():
        features = [x]
        for layer in layers:
            features.append(layer(features))
        return features

    plane = 4 * 2 * 28 * 28
    assert saved_bytes(forward, layers, [x]) == pytest.approx(3 * (16 + 64) * plane, rel=0.02)


def test_side_by_side_inputs_are_not_copied():
    block = resfuse.fuse(modules.ConvBNReLU(24, 8))
    parts = [torch.randn(2, c, 28, 28).requires_grad_() for c in (16, 8)]
    # z and out; no mask, since z tells where out is rectified.
    assert saved_bytes(lambda: block(parts), block, parts) == pytest.approx(2 * 2 * 8 * 28 * 28 * 4, rel=0.005)


def test_a_given_residual_is_not_kept():
    """Its gradient needs no value of it: kept are z, out and a bit for each of its values."""
    x, residual = torch.randn(2, 16, 28, 28).requires_grad_(), torch.randn(2, 16, 28, 28).requires_grad_()
    conv = functional.ConvBN(torch.randn(16, 16, 3, 3), padding=(1, 1))
    kept = saved_bytes(
        lambda: functional.conv_bn_add_relu(x, conv, shortcut=residual), nn.Identity(), [x, conv.weight]
    )
    assert kept == pytest.approx((2 + 1 / 32) * x.nbytes, rel=0.01)


def test_a_block_whose_products_would_cost_too_much_keeps_no_more():
    """Few rows: the wide product is recomputed, not stored; so few that its weight takes more, it is kept."""
    for batch, least, most in ((12, 18, 19), (6, 34, 35)):  # vectors of few rows
        case = BottleneckCase("few rows", 1024, 64, 1024, 5, batch=batch)
        block = resfuse.fuse(make_block(case))
        assert resfuse.functional.forms(resfuse.blocks.resnet.convs(block), None)[2].rows > case.rows
        assert least < units(case, block, torch.float32) < most


def test_nothing_is_kept_without_gradients():
    block, x = resfuse.fuse(make_block(STAGES[0])), make_input(STAGES[0])
    out = x.numel() * x.element_size()
    with torch.no_grad():
        assert saved_bytes(lambda: block(x), block) == out
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    assert saved_bytes(lambda: block(x), block) == out


def test_nchw_keeps_the_input_itself():
    case = STAGES[0]
    block = resfuse.fuse(make_block(case, memory_format=torch.contiguous_format))
    x = make_input(case, memory_format=torch.contiguous_format).requires_grad_()
    assert saved_bytes(lambda: block(x), block, [x]) / case.unit_bytes(4) <= LIMITS[torch.float32]
