"""The CPU kernel set: any number of threads, any instruction set, any shape."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from units import NATIVE, activation

from resfuse import _native
from resfuse.kernels import cpu, dispatch, eager
from resfuse.kernels.interface import Activation, BNContext, Geometry, Masked, Norm, Second, Sum, Want

pytestmark = NATIVE
POINT, WINDOW = Geometry((1, 1), (0, 0), (1, 1), 1), Geometry((1, 1), (1, 1), (1, 1), 1)


def served_by(name: str, dtype: torch.dtype):
    """The set's own primitives, others of the eager set."""
    assert name == "eager" or not cpu.unsupported("cpu", dtype)
    return dispatch.kernels("eager" if name == "eager" else "auto", "cpu", dtype)


def mask_of(rows: int, channels: int, generator: torch.Generator) -> torch.Tensor:
    bits = torch.rand(rows, channels, generator=generator) > 0.4
    mask = torch.zeros(rows, -(-channels // 8), dtype=torch.uint8)
    for channel in range(channels):
        mask[:, channel // 8] |= bits[:, channel].to(torch.uint8) << (channel % 8)
    return mask


def everything(k, n, c, h, w, outputs, dtype, seed=0):
    """Every product of the set on one problem: name -> tensor, computed in `dtype` storage from the same numbers.

    Operands are made in bfloat16 where that is the storage, so that another dtype reads the same values.
    """
    g = torch.Generator().manual_seed(seed)

    def rows(channels):
        return activation(n, channels, h, w, dtype=torch.float64, seed=int(torch.randint(1 << 30, (), generator=g)))

    def matrix(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    storage = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    wide = torch.float64 if k is served_by("eager", torch.float64) else torch.float32
    stored = torch.float64 if wide is torch.float64 else storage

    def as_stored(t):
        t = t.to(storage).to(stored)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    def as_wide(t):
        return t.float().to(wide)

    z, x, dout, dy = as_stored(rows(c)), as_stored(rows(outputs)), as_stored(rows(outputs)), as_stored(rows(c))
    a = Norm(z, as_wide(matrix(c)), as_wide(matrix(c)))
    mask = mask_of(n * h * w, outputs, g)
    weight, narrow = as_stored(matrix(outputs, c) / c**0.5), as_stored(matrix(c, outputs) / outputs**0.5)
    filters = as_stored(matrix(outputs, c, 3, 3) / (3 * c**0.5))
    scale, shift, mean = as_wide(matrix(outputs)), as_wide(matrix(outputs)), as_wide(matrix(c))
    found = {}
    found["z"], stats = k.conv_stats(a, weight[:, :, None, None], POINT, True)
    found["mean"], found["var"] = stats
    found["window"], stats = k.conv_stats(a, filters, WINDOW, True)
    found["window mean"], found["window var"] = stats
    found["cov mean"], found["cov"] = k.covariance(a)
    second = Second(x, as_stored(matrix(outputs, outputs) / outputs**0.5), shift, scale)
    for name, residual in (("out", x), ("second", second)):
        found[name] = k.expand(a, weight, scale, shift, Sum(residual, relu=False), Want()).out
    masked = Masked(dout, mask)
    found["P"], found["sum"], _ = k.expand_products(masked, a, mean, k.scale_weight(weight, scale))
    found["da"] = k.expand_dgrad(masked, None, a, weight, None, None, None, False, None)
    invstd = as_wide(matrix(c).abs() + 0.1)
    dz, found["dgamma"], found["dbeta"] = k.bn_backward(dy, None, z, BNContext(mean, invstd, None, True))
    found["dx"], found["dweight"] = k.conv_backward(dz, x, narrow[:, :, None, None], POINT, masked, (True, True))
    taps, halves = as_stored(matrix(c, 1, 3, 3)), Geometry((2, 2), (1, 1), (1, 1), c)
    activated = a._replace(act=Activation("silu"))
    found["depthwise"], stats = k.conv_stats(activated, taps, halves, True)
    found["depthwise mean"], found["depthwise var"] = stats
    context, each = BNContext(mean, invstd, a.scale / invstd, True), halves._replace(stride=(1, 1))
    found["act dz"], found["act dgamma"], found["act dbeta"] = k.bn_act_backward(dy, activated, context)
    found["depthwise dx"], found["depthwise dweight"] = k.conv_backward(dz, activated, taps, each, dy, (True, True))
    found["window dx"], found["window dweight"] = k.conv_backward(masked, a, filters, WINDOW, dy, (True, True))
    return found


def errors(found, exact):
    """Normwise; values are of order 1, so that one that cancels is measured against a tenth of that."""
    return {
        name: ((found[name].double() - value).norm() / value.norm().clamp_min(0.1 * value.numel() ** 0.5)).item()
        for name, value in exact.items()
    }


# Storage rounds once or, where a recipe lies between, twice; float32 sums lose digits where they cancel.
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2**-6}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 5), c=st.integers(1, 150), h=st.integers(1, 12), w=st.integers(1, 12),
    outputs=st.integers(1, 200), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 1 << 20),
)  # fmt: skip
def test_any_shape_agrees_with_the_eager_set_in_float64(n, c, h, w, outputs, dtype, seed):
    exact = everything(served_by("eager", torch.float64), n, c, h, w, outputs, dtype, seed)
    found = everything(served_by("cpu", dtype), n, c, h, w, outputs, dtype, seed)
    for name, error in errors(found, exact).items():
        assert error < LIMIT[dtype], name


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_any_number_of_threads(dtype):
    """The same bits for the same number of threads, right for each: where rows are few, threads divide the channels."""
    exact = everything(served_by("eager", torch.float64), 2, 80, 17, 15, 330, dtype)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            first, again = (everything(served_by("cpu", dtype), 2, 80, 17, 15, 330, dtype) for _ in range(2))
            assert all(torch.equal(first[name], again[name]) for name in first), threads
            for name, error in errors(first, exact).items():
                assert error < LIMIT[dtype], (threads, name)
    finally:
        torch.set_num_threads(before)


CAPS = {
    "default": ({"ATEN_CPU_CAPABILITY": "default"}, {"baseline"}),
    "AVX2": ({"ATEN_CPU_CAPABILITY": "avx2"}, {"baseline", "AVX2"}),
    "no AMX": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, {"baseline", "AVX2", "AVX-512", "AVX-512 with bfloat16"}),
    "AVX-512": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, {"baseline", "AVX2", "AVX-512"}),
    "oneDNN AVX2": ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"baseline", "AVX2"}),
}


@pytest.mark.parametrize("cap, allowed", [
    pytest.param(*cap, id=name, marks=() if name in ("default", "AVX2", "no AMX") else pytest.mark.slow)
    for name, cap in CAPS.items()
])  # fmt: skip
def test_capped_instruction_sets(cap, allowed):
    """The kernels keep to the caps of torch and oneDNN, and are right there."""
    code = (
        "import torch, test_cpu_kernels as t; from resfuse import _native; print(_native.load().cpu_isa())\n"
        "for dtype in t.LIMIT:\n"
        "    exact = t.everything(t.served_by('eager', torch.float64), 2, 70, 9, 11, 130, dtype)\n"
        "    found = t.everything(t.served_by('cpu', dtype), 2, 70, 9, 11, 130, dtype)\n"
        "    wrong = {n: e for n, e in t.errors(found, exact).items() if not e < t.LIMIT[dtype]}\n"
        "    assert not wrong, (dtype, wrong)\n"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **cap, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in allowed


@pytest.fixture(scope="module")
def wide_instructions() -> dict[str, list[str]]:
    """The instructions of each function on 512-bit registers."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump_missing: disassembles the library")
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(_native.LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    if "x86-64" not in listing:
        pytest.skip("architecture: not x86-64")
    users, name = {}, ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            name = line
        elif "%zmm" in line:
            users.setdefault(name, []).append(line)
    return users


def test_tiles_keep_their_sums_in_registers(wide_instructions):
    """Of 24 sums and what they are made of few may pass through the stack, and none more than once."""
    tiles = {name: lines for name, lines in wide_instructions.items() if "tile_avx512" in name and ", 6, " in name}
    assert len(tiles) == 2 * 4, "of floats and bfloat16, for 16 to 64 columns"
    for name, lines in tiles.items():
        assert any("bf16" in line for line in lines) == ("Pairs" in name), "floats run where there is no bfloat16"
        assert sum("%rsp" in line or "%rbp" in line for line in lines) < 48, name


def test_wide_registers_are_used_in_chosen_versions_alone(wide_instructions):
    """512-bit registers stand in the versions for AVX-512, so that the library loads and runs on older processors."""
    users = wide_instructions
    assert any("tile_avx512" in user and "Pairs" in user for user in users)
    assert any("run_avx512" in user for user in users)
    versions = "run_avx512", "tile_avx512", "transpose_avx512"
    assert not [user for user in users if not any(version in user for version in versions)]


def test_the_instruction_set_is_reported():
    assert _native.load().cpu_isa() in {"baseline", "AVX2", "AVX-512", "AVX-512 with bfloat16",
                                         "AVX-512 with bfloat16 and AMX"}


def test_the_set_serves_all_but_what_it_names():
    assert set(eager.PRIMITIVES) - set(cpu.PRIMITIVES) == {"avg_pool_backward", "scale_weight"}


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_nan_stays_in_its_pixel(dtype):
    """A NaN or infinity of one pixel reaches what its window reaches and nothing else, tails and padding included."""
    k = served_by("cpu", dtype)
    for special in (float("nan"), float("inf")):
        x = activation(2, 20, 6, 7, dtype=dtype)
        x[1, 3, 2, 5] = special
        filters = torch.ones(24, 20, 3, 3, dtype=dtype)
        z, _ = k.conv_stats(x, filters, WINDOW, False)
        reached = torch.zeros(2, 6, 7, dtype=torch.bool)
        reached[1, 1:4, 4:7] = True
        assert torch.equal(~z.isfinite().all(1), reached)
        z, _ = k.conv_stats(x, filters[:, :, :1, :1], POINT, False)
        reached = torch.zeros(2, 6, 7, dtype=torch.bool)
        reached[1, 2, 5] = True
        assert torch.equal(~z.isfinite().all(1), reached)
