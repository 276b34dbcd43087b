"""A network's first convolution by the Triton set's own kernels: z, its moments and the weight's gradient."""

import pytest
import torch
from operands import close, matrix
from units import TRITON, activation, triton_kernels

from resfuse.kernels.interface import BNGrad, Geometry, Masked, Norm

pytestmark = TRITON

# channels, outputs, window, geometry, image: a ResNet's stem, CIFAR's, patches, rest of an image that no window reads.
CASES = {
    "7x7": (3, 64, (7, 7), Geometry((2, 2), (3, 3), (1, 1), 1), (2, 17, 18)),
    "3x3": (3, 16, (3, 3), Geometry((1, 1), (1, 1), (1, 1), 1), (3, 9, 7)),
    "patches": (1, 40, (4, 4), Geometry((4, 4), (0, 0), (1, 1), 1), (1, 17, 14)),
    "5x8": (4, 65, (5, 8), Geometry((3, 1), (2, 0), (1, 1), 1), (2, 8, 13)),
    "2x1": (2, 8, (2, 1), Geometry((1, 2), (0, 1), (1, 1), 1), (1, 5, 6)),
}


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.gpu)], ids=["interpreted", "gpu"])
def runner(request, monkeypatch):
    from resfuse.kernels.triton import _table

    monkeypatch.setattr(_table, "few_channels", lambda *_: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with triton_kernels(monkeypatch, gpu=request.param) as running:
        yield running


@pytest.mark.one_in(3, runner=False)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_convolutions_of_few_channels(name, dtype, runner):
    from resfuse.kernels.triton.bn_dgrad import bn_dgrad
    from resfuse.kernels.triton.conv_backward import conv_backward
    from resfuse.kernels.triton.conv_stats import conv_stats

    channels, outputs, window, geometry, (n, height, width) = CASES[name]
    x = activation(n, channels, height, width, dtype=dtype)
    if name == "3x3":  # an image in the other layout
        x = x.contiguous()
    filters = (torch.randn(outputs, channels, *window) / (channels * window[0] * window[1]) ** 0.5).to(dtype)
    exact = filters.double().requires_grad_()
    expected = torch.nn.functional.conv2d(x.double(), exact, None, *geometry)
    z, stats = conv_stats(x, filters, geometry, True)
    assert z.dtype == dtype and z.is_contiguous(memory_format=torch.channels_last)
    close(z, expected.detach(), dtype)
    close(stats.mean, matrix(z).mean(0), torch.float32)
    close(stats.var, matrix(z).var(0, correction=0), torch.float32)
    assert conv_stats(x, filters, geometry, False)[1] is None

    dout = activation(*z.shape, dtype=dtype, seed=5)
    mask = torch.randint(0, 256, (z.shape[0] * z.shape[2] * z.shape[3], -(-outputs // 8)), dtype=torch.uint8)
    vectors = [torch.rand(outputs) + 0.5 for _ in range(5)]
    for grad in (dout, BNGrad(Masked(dout, mask), z, *vectors)):
        dz = bn_dgrad(grad) if isinstance(grad, BNGrad) else grad
        da, dweight = conv_backward(grad, x, filters, geometry, None, (False, True))
        assert da is None and dweight.dtype == torch.float32 and dweight.stride() == filters.stride()
        close(dweight, torch.autograd.grad(expected, exact, dz.double(), retain_graph=True)[0], dtype)
    assert {"_padded", "_conv_few", "_few_wgrad"} <= set(runner.launches)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pixel_that_is_no_number(value, runner):
    """Reaches the windows that hold it, and at most one column of them more."""
    from resfuse.kernels.triton.conv_stats import conv_stats

    x, geometry = activation(1, 3, 9, 12, dtype=torch.bfloat16), Geometry((1, 1), (1, 1), (1, 1), 1)
    x[0, 1, 4, 5] = value
    filters = torch.ones(8, 3, 3, 3, dtype=torch.bfloat16)
    exact = torch.nn.functional.conv2d(x.double(), filters.double(), None, *geometry)
    z = conv_stats(x, filters, geometry, False)[0]
    wanted, found = (~t.isfinite() for t in (exact, z))
    assert not (wanted & ~found).any()
    assert torch.nonzero((found & ~wanted).any(1).any(1).any(0)).flatten().tolist() == [3]
    torch.testing.assert_close(z[~found].double(), exact[~found], rtol=2**-7, atol=2**-6)


def test_what_does_not_fit_is_the_vendors(runner):
    from resfuse.kernels.triton.conv_stats import conv_stats

    plain, dilated, grouped = (Geometry((1, 1), (1, 1), d, g) for d, g in (((1, 1), 1), ((2, 2), 1), ((1, 1), 2)))
    x, vector = activation(2, 4, 9, 9, dtype=torch.float32), torch.ones(4)
    for a, lines, across, inner, geometry in (
        (x, 3, 9, 4, plain), (x, 9, 8, 4, plain), (x, 3, 3, 4, dilated), (x, 3, 3, 2, grouped),
        (Norm(x, vector, vector), 3, 3, 4, plain),
        (activation(2, 5, 6, 9, dtype=torch.float32), 3, 3, 5, plain),
    ):  # fmt: skip
        filters = torch.randn(8, inner, lines, across)
        expected = torch.nn.functional.conv2d(
            (a.z + 1).relu() if isinstance(a, Norm) else a, filters, None, *geometry
        )
        torch.testing.assert_close(conv_stats(a, filters, geometry, False)[0], expected, rtol=1e-5, atol=1e-5)
    assert "_conv_few" not in runner.launches


def test_the_pixels_of_a_strided_view(runner):
    """Products of many channels read them one after the other."""
    from resfuse.kernels.triton import prepare as module

    whole = activation(2, 130, 7, 5, dtype=torch.bfloat16)
    view = whole[:, :, ::2, ::3]
    dense = module.prepare(view, 260)
    assert dense.is_contiguous(memory_format=torch.channels_last) and torch.equal(dense, view)
    assert module.prepare(whole, 260) is whole and runner.launches == {"_dense": 1}
