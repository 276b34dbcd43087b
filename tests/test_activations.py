"""Activations other than ReLU: the two primitives of every kernel set, and what a call refuses."""

import re
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from operands import close, matrix, norm_of, primitive, vector
from units import CUDA, EMULATED, NATIVE, TRITON, activation, conv_bn, results, triton_kernels, twin

from resfuse import functional, reference
from resfuse.kernels import dispatch, measured
from resfuse.kernels.interface import ACTIVATIONS, Activation, BNContext, Stats
from resfuse.testing.cuda import emulated, on_gpu

ALL = [Activation("leaky_relu", 0.1), *(Activation(kind) for kind in ACTIVATIONS if kind != "leaky_relu")]
TORCH = {"leaky_relu": F.leaky_relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
DTYPES = {
    "eager": (torch.float64, torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.float32, torch.bfloat16, torch.float16),
}  # fmt: skip
SHAPES = [(1, 1, 1, 1), (2, 7, 3, 5), (3, 16, 4, 4), (1, 65, 9, 7)]  # N, C, H, W
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.one_in(6, kernel_set="triton")]  # interpreted


@pytest.fixture(
    params=[
        "eager", pytest.param("cpu", marks=NATIVE), pytest.param("triton", marks=TRITON),
        pytest.param("triton, gpu", marks=[TRITON, pytest.mark.gpu]), pytest.param("cuda", marks=EMULATED),
        pytest.param("cuda, gpu", marks=[CUDA, pytest.mark.gpu]),
    ],  # fmt: skip
)
def kernel_set(request, monkeypatch):
    name, _, how = request.param.partition(", ")
    monkeypatch.setattr(primitive, "kernel_set", name)
    if name == "cuda":  # what it leaves to others is the eager set's
        monkeypatch.setattr(dispatch, "ORDER", ("cuda", "eager"))
        monkeypatch.setattr(measured, "proven", lambda *_: True)
        monkeypatch.setattr(measured, "UNPROVEN", {})
    way = {
        "triton": lambda: triton_kernels(monkeypatch, gpu=how == "gpu"), "cuda": on_gpu if how == "gpu" else emulated,
    }.get(name, nullcontext)  # fmt: skip
    with way():
        yield name


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request, kernel_set):
    if request.param not in DTYPES[kernel_set]:
        pytest.skip(f"dtype: the kernel set {kernel_set} does not store {request.param}")
    return request.param


def torch_act(act, v):
    return TORCH[act.kind](v, *([act.slope] if act.kind == "leaky_relu" else []))


@pytest.mark.parametrize("act", ALL, ids=lambda act: act.kind)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bn_act(act, shape, dtype):
    recipe, _ = norm_of(shape, dtype)
    recipe = recipe._replace(scale=3 * recipe.scale, act=act)  # both sides of every bend
    v = matrix(recipe.z) * recipe.scale.double() + recipe.shift.double()
    found = primitive("bn_act")(recipe)
    assert found.dtype == dtype and found.stride() == recipe.z.stride()
    close(matrix(found), torch_act(act, v), dtype)


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "constant"])
@pytest.mark.parametrize("act", ALL, ids=lambda act: act.kind)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_bn_act_backward(act, shape, batch, dtype):
    recipe, _ = norm_of(shape, dtype)
    recipe, channels = recipe._replace(scale=3 * recipe.scale, act=act), shape[1]
    z, dy = recipe.z, activation(*shape, dtype=dtype, seed=31)
    constant = Stats(vector(channels, dtype, 8), vector(channels, dtype, 9).abs() + 0.5)
    stats = primitive("bn_stats")(z) if batch else constant
    invstd = (stats.var + 1e-5).rsqrt()
    context = BNContext(stats.mean, invstd, recipe.scale / invstd, batch)
    dz, dgamma, dbeta = primitive("bn_act_backward")(dy, recipe, context)
    v = (matrix(z) * recipe.scale.double() + recipe.shift.double()).requires_grad_()
    (d,) = torch.autograd.grad(torch_act(act, v), v, matrix(dy))
    zhat = (matrix(z) - stats.mean.double()) * invstd.double()
    scale = recipe.scale.double()
    expected = scale * (d - d.mean(0) - zhat * (d * zhat).mean(0)) if batch else scale * d
    exact = {"eager": dtype}.get(primitive.kernel_set, torch.float32)  # the eager set rounds d
    exact = torch.float64 if dtype == torch.float64 else exact
    assert dz.dtype == dtype and dgamma.dtype == dbeta.dtype == invstd.dtype
    close(matrix(dz), expected, dtype)
    close(dbeta, d.sum(0), exact, floor=10)
    close(dgamma, (d * zhat).sum(0), exact, floor=10)


@pytest.mark.parametrize("act", ALL, ids=lambda act: act.kind)
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0, 3.0, -3.0, 6.0, 88.0, -88.0, -104.0]
)
def test_values_at_the_edge(act, value, kernel_set):
    """As torch has them: NaN stays, nothing overflows on the way."""
    recipe, _ = norm_of((1, 8, 2, 2), torch.float32)
    z = torch.full_like(recipe.z, value)
    recipe = recipe._replace(z=z, scale=torch.ones(8), shift=torch.zeros(8), act=act)
    found, expected = primitive("bn_act")(recipe), torch_act(act, z.double()).float()
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-37, equal_nan=True)
    dy = torch.full_like(z, 2.0)
    context = BNContext(torch.zeros(8), torch.ones(8), None, False)
    dz, _, _ = primitive("bn_act_backward")(dy, recipe, context)
    v = z.double().requires_grad_()
    (d,) = torch.autograd.grad(torch_act(act, v), v, dy.double())
    assert torch.allclose(dz, d.float(), rtol=1e-5, atol=1e-35, equal_nan=True)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("act", ALL, ids=lambda act: act.kind)
def test_a_chain_of_each_set(act, kernel_set):
    """An inverted residual, activated at its end or not, by the set alone ("cpu", "cuda": with what they leave to
    others)."""
    dtype, backend = torch.float32, "auto" if kernel_set in ("cpu", "cuda") else kernel_set
    convs = (
        conv_bn(6, 16, dtype=dtype, act=act), conv_bn(16, 16, 3, padding=(1, 1), groups=16, dtype=dtype, act=act),
        conv_bn(16, 6, dtype=dtype, act=act),
    )  # fmt: skip
    exact = twin(convs, torch.float64)
    x = activation(2, 6, 5, 7, dtype=dtype).requires_grad_()
    y = x.detach().double().requires_grad_()
    dout = activation(2, 6, 5, 7, dtype=dtype, seed=3)
    found = results(functional.conv_bn_relu(x, *convs, backend=backend), dout, x, convs)
    expected = results(reference.block(y, *exact, shortcut="none"), dout.double(), y, exact)
    for name, t in expected.items():
        assert (found[name].double() - t.double()).norm() <= 1e-5 * (1 + t.double().norm()), name


@pytest.mark.parametrize("change, sentence", [
    (dict(act="silu"), "conv1.act must be None or an Activation of leaky_relu, relu6, silu, hardswish, got 'silu'"),
    (dict(act=Activation("gelu")), "conv1.act must be None or an Activation"),
])  # fmt: skip
def test_other_things_are_refused(change, sentence):
    x, c = activation(2, 6, 5, 7), conv_bn(6, 6)
    with pytest.raises(functional.ArgumentError, match=re.escape(sentence)):
        functional.conv_bn_relu(x, c._replace(**change), c)
    assert c.num_batches_tracked == 3
    with pytest.raises(functional.ArgumentError, match=re.escape("conv1.act is silu; a sum follows")):
        functional.conv_bn_add_relu(x, c._replace(act=Activation("silu")))
