"""The CUDA kernels compiled for GPUs that are not there: nothing spilled, blocks enough on a multiprocessor, 16 bytes
an access, products on the matrix units."""

import re

import pytest

from resfuse.bench import command
from resfuse.testing import cubin
from resfuse.testing.emulator import CSRC

pytestmark = pytest.mark.skipif(cubin.unavailable() is not None, reason=str(cubin.unavailable()))
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a")
LONG = ("conv_backward", "expand", "expand_dgrad")  # to compile; conv_stats is like them
PRODUCTS = ("covariance_kernel", "products_kernel", "products_u_kernel")
BY_ROWS = ("conv_kernel", "expand_kernel", "dgrad_kernel", "conv_dgrad_kernel")


@pytest.mark.parametrize("source, arch", [
    pytest.param(source, arch, marks=() if arch == "sm_90a" and source.stem not in LONG else pytest.mark.slow,
                 id=f"{source.stem}-{arch}")
    for source in SOURCES for arch in ARCHITECTURES
])  # fmt: skip
def test_compiled(source, arch):
    kernels = cubin.compile_source(source, arch)
    assert kernels
    for kernel in kernels:
        name, found = kernel.name, kernel.instructions
        product, by_rows = name.startswith(PRODUCTS + BY_ROWS), name.startswith(BY_ROWS)
        options = re.findall("true|false", name.rsplit(">,", 1)[-1])
        assert kernel.stack == found["local"] == 0, f"spills: {kernel}"
        # Two blocks of 256 threads on a multiprocessor, three of 128 in products of float32. Products by rows: one of
        # 256 where tiles are wide, a projection's two, or read value by value; two of 128.
        limit = 168 if "Exact" in name or "Tf32" in name else 128
        alone = "Short" in name and "128" in name or options[:1] == ["false"]
        alone = alone or (name.startswith("expand") and options[1:] == ["true"])
        if by_rows and (alone or limit == 168):
            limit = 255
        assert kernel.registers <= limit and kernel.shared <= 48 << 10, kernel
        if options[:1] == ["true"] or name.startswith("products_u"):
            assert found["16 bytes"], kernel
            assert bool(found["copy"]) == product, kernel
        if "Warpgroups" in name:
            assert found["product"] in ((4, 8) if arch == "sm_90a" else (0,)) and not found["ldmatrix"], kernel
        elif product:
            exact = "Exact" in name
            assert bool(found["product"]) != exact and (found["multiply-add"] >= 128 or not exact), kernel
            assert bool(found["ldmatrix"]) == (not exact and "Tf32" not in name), kernel
        else:
            assert not found["product"], kernel


@pytest.mark.slow
def test_info_lists_the_kernels(capsys):
    """Of the library, or compiled for the occasion where it has none."""
    assert command.main(["info", "--kernels"]) == 0
    printed = capsys.readouterr().out
    for name in ("covariance_kernel<Short<__nv_bfloat16", "products_kernel<Tf32, true>", "finalize_kernel"):
        assert name in printed
