"""Native operators as torch sees them: schemas that are kept, fakes that tell the truth, symbols for sizes."""

import re
from pathlib import Path

import pytest
import torch
from units import EMULATED, NATIVE, activation

from resfuse import _native
from resfuse.kernels import fakes
from resfuse.testing import cuda

CSRC = Path(__file__).parents[1] / "csrc"
N, H, W = 2, 5, 4
M = N * H * W
RAGGED, WHOLE = (12, 20), (16, 24)  # channels, inner and outer, of which the last eight are not whole, or are
NONE = (None,) * 6


def vectors(count, channels):
    generator = torch.Generator().manual_seed(channels)
    return [torch.rand(channels, generator=generator) + 0.5 for _ in range(count)]


def mask(channels):
    return torch.randint(0, 256, (M, -(-channels // 8)), dtype=torch.uint8)


def calls(dtype, channels):
    """Arguments of each operator, in two variants that differ in every option."""
    C, K = channels
    x, z, dout = (activation(N, c, H, W, dtype=dtype, seed=c) for c in (C, K, K))
    scale, shift, mean, var = vectors(4, C)
    outer_scale, outer_shift, outer_mean, outer_invstd = vectors(4, K)
    tensor, recipe = (x, None, None, False), (x, scale, shift, True)
    plain, masked = (dout, None, None, 1.0), (dout, mask(K), *vectors(1, N), 0.5)
    given = (*plain, *NONE)
    below = (*masked, z, outer_scale, outer_shift, outer_mean, *vectors(2, K))
    matrix, window = (torch.randn(K, C, *size).to(dtype) for size in ((), (3, 3)))
    filters = torch.randn(K, C, 3, 3).to(dtype)
    alone = (None, None, None, False, 0, None, None, 1.0)
    with_residual = (z, outer_scale, outer_shift, True, 0, *vectors(1, N), None, 0.5)
    products, cov, product = torch.randn(K, C), torch.eye(C), (matrix, outer_scale, outer_shift)
    geometry = ([2, 1], [1, 1], [1, 1])
    each, below_each = torch.randn(C, 1, 3, 3).to(dtype), activation(N, C, 3, 4, dtype=dtype, seed=8)
    taken = activation(N, K, 3, 4, dtype=dtype, seed=9)
    pool = ([3, 3], [2, 1], [1, 1], [1, 1])
    places = torch.zeros(N, C, 3, 4, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    return {
        "apply": [(z, outer_scale, outer_shift, *alone, False, False, False),
                  (z, outer_scale, outer_shift, *with_residual, True, True, False)],
        "bn_act": [(x, scale, shift, 4, 0.0), (x, scale, shift, 2, 0.1)],
        "bn_act_backward": [(x, x, scale, shift, 4, 0.0, mean, var, True),
                            (x, x, scale, shift, 3, 0.0, mean, var, False)],
        "bn_dgrad": [given, below],
        "bn_reduce": [(*plain, z, None, None, outer_mean, outer_invstd, None),
                      (*masked, z, outer_scale, outer_shift, outer_mean, outer_invstd, outer_scale)],
        "bn_relu_max_pool": [(x, scale, shift, True, 3, 4, *pool)],
        "bn_stats": [(x,)],
        "conv_backward": [(*given, *tensor, matrix, None, None, None, 1.0, True, False),
                          (*below, *recipe, matrix, x, mask(C), None, 1.0, False, True)],
        "conv_depthwise": [(x, None, None, 0, 0.0, each, *geometry, 3, 4, False),
                           (x, scale, shift, 4, 0.0, each, *geometry, 3, 4, True)],
        "conv_depthwise_dgrad": [(below_each, None, None, 1.0, *NONE, each, H, W, *geometry, None, None, None, 1.0)],
        "conv_depthwise_wgrad": [(below_each, None, None, 1.0, *NONE, x, scale, shift, 5, 0.0, [3, 3], *geometry)],
        "conv_stats": [(*tensor, matrix, False), (*recipe, matrix, True)],
        "conv_window": [(*tensor, window, *geometry, 3, 4, False), (*recipe, window, *geometry, 3, 4, True)],
        "conv_window_dgrad": [(taken, None, None, 1.0, *NONE, filters, H, W, *geometry, None, None, None, 1.0)],
        "conv_window_wgrad": [(taken, None, None, 1.0, *NONE, *recipe, [3, 3], *geometry)],
        "covariance": [tensor, recipe],
        "expand": [(*tensor, *product, None, None, None, False, None, *alone, True, False, False),
                   (*recipe, *product, *recipe, matrix, None, *vectors(2, K), *alone[3:], True, True, True)],
        "expand_coefficients": [(products, *vectors(1, K), matrix, matrix, mean, cov, outer_scale, outer_invstd, M)],
        "expand_dgrad": [(*masked, None, *recipe, matrix, None, None, None, True),
                         (*masked, x, *recipe, matrix, torch.eye(C).to(dtype), torch.tensor(1.0), shift, False)],
        "expand_products": [(*plain, *tensor, None, None), (*masked, *recipe, mean, matrix)],
        "expand_stats": [(matrix, mean, cov)],
        "finalize": [(mean, var, None, None, 1e-5), (mean, var, scale, shift, 1e-5)],
        "max_pool_backward": [(activation(N, C, 3, 4, dtype=dtype), places, x, *pool)],
        "update_running": [(mean, var, M, scale, shift, torch.tensor(3), None),
                           (mean, var, M, scale, shift, None, 0.1)],
    }  # fmt: skip


CASES = [(name, i) for name, variants in calls(torch.float32, RAGGED).items() for i in range(len(variants))]
CUDA_NAMES = [n for path in (CSRC / "cuda").glob("*.cpp") for n in re.findall(r'm\.impl\("(\w+)"', path.read_text())]


def check(namespace, name, variant, dtype, channels):
    arguments = calls(dtype, channels)[name][variant]
    found = torch.library.opcheck(
        getattr(namespace, name).default, arguments, raise_exception=True,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip
    assert set(found.values()) == {"SUCCESS"}


@NATIVE
@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, variant", CASES)
def test_on_the_cpu(name, variant, dtype):
    check(_native.load(), name, variant, dtype, RAGGED)


@EMULATED
@pytest.mark.parametrize("name, variant", [case for case in CASES if case[0] in CUDA_NAMES])
def test_of_cuda(name, variant):
    with cuda.emulated():
        check(torch.ops.resfuse_emulated, name, variant, torch.bfloat16, WHOLE)


@NATIVE
def test_every_operator_has_a_fake_and_a_case():
    """Of the schemas, but the question which instructions the processor has."""
    defined = set(re.findall(r'm\.def\("(\w+)\(', (CSRC / "schemas.h").read_text())) - {"cpu_isa"}
    assert defined == set(fakes.FAKES) == set(calls(torch.float32, RAGGED))
