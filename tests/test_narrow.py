"""Products of few inner channels that go through their rows: what the others give."""

from dataclasses import replace

import pytest
import torch
from operands import close, matrix
from units import TRITON, activation, triton_kernels

from resfuse.kernels.interface import BNGrad, Geometry, Masked, Norm, Sum, Want

pytestmark = TRITON
POINT = Geometry((1, 1), (0, 0), (1, 1), 1)
# Pixels, inner and outer channels: fewer blocks of rows than programs and more, whole tiles and not.
CASES = [((2, 13, 11), 64, 256), ((1, 5, 7), 20, 72), ((3, 9, 8), 16, 65), ((3, 29, 13), 33, 40)]


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.gpu)], ids=["interpreted", "gpu"])
def runner(request, monkeypatch):
    from resfuse.kernels.triton import _table

    tile = _table.tile

    def of_few_programs(name, *rest):  # so that each has several blocks of rows
        return replace(tile(name, *rest), shares=8) if "narrow" in name else tile(name, *rest)

    monkeypatch.setattr(_table, "narrow", lambda *_: True)
    monkeypatch.setattr(_table, "tile", of_few_programs)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with triton_kernels(monkeypatch, gpu=request.param) as running:
        yield running


def operands(case, dtype):
    (n, h, w), inner, outer = case
    narrow, wide = (activation(n, c, h, w, dtype=dtype, seed=c) for c in (inner, outer))
    filters = (torch.randn(outer, inner) / inner**0.5).to(dtype)
    mask = torch.randint(0, 256, (n * h * w, -(-outer // 8)), dtype=torch.uint8)
    return narrow, wide, filters, mask, [torch.rand(inner) + 0.5 for _ in range(5)]


@pytest.mark.one_in(3, runner=False)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_expansions_of_few_channels(case, dtype, runner):
    from resfuse.kernels.triton.apply import apply
    from resfuse.kernels.triton.expand import expand

    x, residual, filters, _, vectors = operands(case, dtype)
    scale, shift = torch.rand(case[2]) + 0.5, torch.rand(case[2])
    for a, stats in ((Norm(x, *vectors[:2]), True), (x[:, :, ::1, ::1], False)):
        y = apply(a, Sum(relu=True), Want()).out if isinstance(a, Norm) else a
        for beside in (residual, Norm(residual, scale, shift, relu=False)):
            found = expand(a, filters, scale, shift, Sum(beside), Want(True, stats))
            added = matrix(beside) if beside is residual else matrix(residual) * scale.double() + shift.double()
            exact = (matrix(y) @ filters.double().T * scale.double() + shift.double() + added).relu()
            close(matrix(found.out), exact, dtype)
            bits = (found.mask[:, :, None] >> torch.arange(8)) & 1
            assert torch.equal(bits.flatten(1)[:, : case[2]].bool(), matrix(found.out) > 0)
            if stats:
                close(found.stats.mean, matrix(found.out).mean(0), torch.float32)
                close(found.stats.var, matrix(found.out).var(0, correction=0), torch.float32)
    assert "_expand" not in runner.launches and runner.launches["_expand_narrow"] == 4


@pytest.mark.parametrize("strided", [False, True])
def test_a_weights_gradient_by_the_vendor(strided, runner, monkeypatch):
    """Of two tensors as they are; a recipe and pixels of a strided view are written out first."""
    from resfuse.kernels.triton import _table
    from resfuse.kernels.triton.conv_backward import conv_backward

    monkeypatch.setattr(_table, "by_vendor", lambda *_: True)
    monkeypatch.setattr(_table, "written_first", lambda *_: True)
    x, dout, filters, mask, _ = operands(CASES[0], torch.bfloat16)
    x = activation(2, 64, 26, 33, dtype=torch.bfloat16)[:, :, ::2, ::3] if strided else x
    found = conv_backward(Masked(dout, mask), x, filters[:, :, None, None], POINT, None, (True, True))
    bits = ((mask[:, :, None] >> torch.arange(8)) & 1).flatten(1)
    close(found[1][:, :, 0, 0], (matrix(dout) * bits).T @ matrix(x), torch.bfloat16)
    assert "_outer_product" not in runner.launches and ("_dense" in runner.launches) == strided


@pytest.mark.one_in(3, runner=False)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_input_gradients_of_few_channels(case, dtype, runner):
    from resfuse.kernels.triton.bn_dgrad import bn_dgrad
    from resfuse.kernels.triton.conv_backward import conv_backward
    from resfuse.kernels.triton.select import select

    dy, dout, filters, mask, vectors = operands(case, dtype)
    z, weight = activation(*dy.shape, dtype=dtype, seed=3), filters.T.contiguous()[:, :, None, None]
    for g, add in (
        (BNGrad(dy, z, *vectors), Masked(dout, mask)), (BNGrad(dy, z, *vectors[:4]), dout), (dy, Masked(dout, mask)),
    ):  # fmt: skip
        dz = bn_dgrad(g) if isinstance(g, BNGrad) else g
        beside = select(add) if isinstance(add, Masked) else add
        da, dweight = conv_backward(g, dout, weight, POINT, add, (True, False))
        assert dweight is None
        close(matrix(da), matrix(dz) @ filters.double().T + matrix(beside), dtype)
    assert "_conv_dgrad" not in runner.launches and runner.launches["_dgrad_narrow"] == 3
