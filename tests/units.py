"""Random bottlenecks as `functional.ConvBN`s, twins of them, and their gradients."""

import importlib
import os
import sys
from contextlib import contextmanager

import pytest
import torch

from resfuse import _native
from resfuse.functional import BN, Conv, ConvBN
from resfuse.kernels import triton
from resfuse.testing import emulator

BUILT = os.environ.get("RESFUSE_NATIVE", "1" if sys.platform == "linux" else "0") == "1"
NATIVE = pytest.mark.skipif(not BUILT, reason="native_missing: RESFUSE_NATIVE=0")
TRITON = pytest.mark.skipif(bool(triton.unavailable()), reason="; ".join(": ".join(r) for r in triton.unavailable()))
CUDA = pytest.mark.skipif(
    not _native.build_record().get("cuda_archs"),
    reason=f"cuda_left_out: {_native.build_record().get('cuda_left_out')}",
)
EMULATED = pytest.mark.skipif(emulator.unavailable() is not None, reason=f"emulator: {emulator.unavailable()}")
PARAMETERS = ("weight", "bias", "gamma", "beta")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def conv_bn(in_channels, out_channels, kernel=1, *, dtype=torch.float64, bias=False, seed=0, **settings) -> ConvBN:
    """A random pair with non-trivial gamma, beta and buffers; settings override ConvBN's fields."""
    generator = torch.Generator().manual_seed(seed + 97 * in_channels + out_channels + 1000 * kernel)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)

    fan_in = in_channels // settings.get("groups", 1) * kernel**2
    fields = dict(
        weight=normal(out_channels, in_channels // settings.get("groups", 1), kernel, kernel, scale=fan_in**-0.5),
        gamma=1 + normal(out_channels, scale=0.3),
        beta=normal(out_channels, scale=0.3),
        running_mean=normal(out_channels, scale=0.2),
        running_var=1 + normal(out_channels, scale=0.2).abs(),
        num_batches_tracked=torch.tensor(3),
        bias=normal(out_channels) if bias else None,
    )
    fields.update(settings)
    for name in PARAMETERS:
        if fields[name] is not None:
            fields[name].requires_grad_()
    return ConvBN(**fields)


def bn(channels, *, dtype=torch.float64, seed=0, **settings) -> BN:
    """A random BatchNorm; settings override BN's fields."""
    pair = conv_bn(1, channels, dtype=dtype, seed=seed)
    return BN(**{name: getattr(pair, name) for name in BN._fields})._replace(**settings)


def conv(in_channels, out_channels, kernel=1, *, dtype=torch.float64, bias=False, seed=0, **settings) -> Conv:
    """A random convolution; settings override Conv's fields."""
    pair = conv_bn(in_channels, out_channels, kernel, dtype=dtype, bias=bias, seed=seed, **settings)
    return Conv(**{name: getattr(pair, name) for name in Conv._fields})


def bottleneck(
    in_channels=8, width=4, out_channels=8, *, shortcut="identity", stride=1, v1=False, groups=1, dilation=1, **common
) -> tuple[ConvBN, ...]:
    """conv1, conv2, conv3 and, for shortcut "projection", the projection."""
    first, second = ((stride, stride), (1, 1)) if v1 else ((1, 1), (stride, stride))
    convs = [
        conv_bn(in_channels, width, stride=first, seed=1, **common),
        conv_bn(width, width, 3, stride=second, padding=(dilation, dilation), dilation=(dilation, dilation),
                groups=groups, seed=2, **common),
        conv_bn(width, out_channels, seed=3, **common),
    ]
    if shortcut == "projection":
        convs.append(conv_bn(in_channels, out_channels, stride=(stride, stride), seed=4, **common))
    return tuple(convs)


def twin(convs: tuple[ConvBN, ...], dtype=None) -> tuple[ConvBN, ...]:
    """Copies that share nothing, in another floating dtype if given; parameters are leaves."""

    def copy(name, t):
        if t is None:
            return None
        t = t.detach().clone() if dtype is None or not t.is_floating_point() else t.detach().to(dtype, copy=True)
        return t.requires_grad_() if name in PARAMETERS else t

    return tuple(c._replace(**{n: copy(n, getattr(c, n)) for n in PARAMETERS + BUFFERS}) for c in convs)


def results(out, dout, x, convs) -> dict[str, torch.Tensor]:
    """Runs backward; out, dx, every parameter gradient and buffer by name."""
    out.backward(dout)
    found = {"out": out.detach(), "dx": x.grad}
    for i, c in enumerate(convs, 1):
        found.update({f"d{n}{i}": getattr(c, n).grad for n in PARAMETERS if getattr(c, n) is not None})
        found.update({f"{n}{i}": getattr(c, n) for n in BUFFERS if getattr(c, n) is not None})
    return found


def activation(n, c, h, w, *, dtype=torch.float64, channels_last=True, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def own(name: str):
    """The CUDA set's primitive."""
    return getattr(importlib.import_module(f"resfuse.kernels.cuda.{name}"), name)


@contextmanager
def triton_kernels(monkeypatch, gpu: bool = False, tf32: bool = False, windows: bool = False):
    """The Triton set serves the CPU's tensors: interpreted, or on a GPU between margins. Float32 products are exact, or
    as torch's convolutions take them on a GPU. windows: convolutions that are not 1x1 are its own."""
    from resfuse.kernels.triton import _table
    from resfuse.testing.triton.interpreter import interpreted
    from resfuse.testing.triton.runners import OnGPU, instead

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    monkeypatch.setattr(_table, "ours", lambda *_: windows)
    with instead(OnGPU()) if gpu else interpreted() as runner:
        yield runner
