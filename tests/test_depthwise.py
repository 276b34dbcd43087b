"""Convolutions of each channel by itself, with any activation in their prologue, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from operands import close, masked, matrix, norm_of, primitive, vector, weight
from test_activations import DTYPES, kernel_set, torch_act  # noqa: F401
from units import activation

from resfuse.kernels.interface import Activation, BNGrad, Geometry

pytestmark = [pytest.mark.usefixtures("poisoned", "kernel_set"), pytest.mark.one_in(6, kernel_set="triton")]
GEOMETRIES = [  # taps, geometry without groups
    ((3, 3), ((1, 1), (1, 1), (1, 1))), ((3, 3), ((2, 2), (1, 1), (1, 1))), ((5, 5), ((1, 1), (2, 2), (1, 1))),
    ((5, 5), ((2, 2), (2, 2), (1, 1))), ((3, 3), ((1, 1), (2, 2), (2, 2))), ((7, 7), ((1, 1), (3, 3), (1, 1))),
    ((1, 1), ((1, 1), (0, 0), (1, 1))), ((2, 3), ((1, 2), (0, 1), (1, 1))), ((3, 3), ((2, 2), (0, 0), (1, 1))),
    ((1, 3), ((3, 1), (0, 2), (1, 1))),
]  # fmt: skip
ACTS = {"tensor": None, "none": False, "relu": True, "silu": Activation("silu"), "hardswish": Activation("hardswish")}


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def dtype(request, kernel_set):  # noqa: F811
    if request.param not in DTYPES[kernel_set]:
        pytest.skip(f"dtype: the kernel set {kernel_set} does not store {request.param}")
    return request.param


def operand(kind, shape, dtype):
    """An activation or recipe, and its values [N, C, H, W]."""
    act = ACTS[kind]
    if act is None:
        x = activation(*shape, dtype=dtype, seed=1)
        return x, x.double()
    recipe, _ = norm_of(shape, dtype, act is True)
    v = recipe.z.double() * recipe.scale.double()[:, None, None] + recipe.shift.double()[:, None, None]
    if isinstance(act, Activation):
        return recipe._replace(relu=True, act=act), torch_act(act, v).to(dtype).double()
    return recipe, (v.relu() if act else v).to(dtype).double()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("channels", [2, 17, 64])
@pytest.mark.parametrize("kind", ACTS)
@pytest.mark.parametrize("taps, settings", GEOMETRIES)
def test_a_depthwise_convolution(taps, settings, kind, channels, dtype):
    if primitive.kernel_set == "triton" and (channels > 2 or isinstance(ACTS[kind], Activation)):
        pytest.skip("interpreted: the convolution is the vendor's, of tensors and ReLU's recipes")
    geometry = Geometry(*settings, channels)
    a, y = operand(kind, (3, channels, 6, 9), dtype)
    y = y.requires_grad_()
    filters = weight(channels, taps[0] * taps[1], dtype).view(channels, 1, *taps) / taps[0]
    filters64 = filters.double().requires_grad_()
    expected = F.conv2d(y, filters64, None, *geometry)
    z, stats = primitive("conv_stats")(a, filters, geometry, stats=True)
    assert z.dtype == dtype and z.is_contiguous(memory_format=torch.channels_last)
    close(z, expected.detach(), dtype)
    exact = torch.float32 if dtype != torch.float64 else dtype
    close(stats.mean, matrix(z).mean(0), exact)
    close(stats.var, matrix(z).var(0, correction=0), exact)
    plain, none = primitive("conv_stats")(a, filters, geometry, stats=False)
    assert torch.equal(plain, z) and none is None

    dz = activation(*expected.shape, dtype=dtype, seed=9)
    add, beside = masked((3, channels, 6, 9), dtype)
    da, dfilters = torch.autograd.grad(expected, (y, filters64), dz.double(), retain_graph=True)
    ours, dweight = primitive("conv_backward")(dz, a, filters, geometry, add, (True, True))
    close(matrix(ours), matrix(da) + beside, dtype)
    close(dweight, dfilters, dtype)
    for needs in ((True, False), (False, True)):
        found = primitive("conv_backward")(dz, a, filters, geometry, None, needs)
        assert [t is not None for t in found] == list(needs)

    # BatchNorm's backward, masked by its own ReLU, as the gradient.
    own, scale = activation(*expected.shape, dtype=dtype, seed=12), vector(channels, dtype, 13).abs() + 0.5
    grad = BNGrad(dz, own, *(vector(channels, dtype, i) for i in (14, 15, 16, 17)), vector(channels, dtype, 18))
    grad = grad._replace(scale=scale)
    tensor = primitive("bn_dgrad")(grad)
    da, dfilters = torch.autograd.grad(expected, (y, filters64), tensor.double())
    ours, dweight = primitive("conv_backward")(grad, a, filters, geometry, None, (True, True))
    close(ours, da, dtype, floor=8)
    close(dweight, dfilters, dtype, floor=8)


def test_views(dtype):
    """Every other pixel of a recipe."""
    if primitive.kernel_set == "triton":
        pytest.skip("activation: its convolutions refuse such recipes")
    a, _ = operand("silu", (2, 20, 8, 10), dtype)
    view = a._replace(z=a.z[:, :, ::2, ::2])
    dense = a._replace(z=view.z.contiguous(memory_format=torch.channels_last))
    filters, geometry = weight(20, 9, dtype).view(20, 1, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 20)
    found, expected = (primitive("conv_stats")(t, filters, geometry, stats=False)[0] for t in (view, dense))
    assert torch.equal(found, expected)
