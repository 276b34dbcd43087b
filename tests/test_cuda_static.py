"""The CUDA kernels compiled for GPUs that are not there: nothing spilled, two blocks on a multiprocessor, 16 bytes a
load."""

import pytest

from resfuse.testing import ptxas
from resfuse.testing.emulator import CSRC

pytestmark = pytest.mark.skipif(ptxas.unavailable() is not None, reason=str(ptxas.unavailable()))
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a")


@pytest.mark.parametrize("arch", [
    pytest.param(arch, marks=() if arch == "sm_90a" else pytest.mark.slow) for arch in ARCHITECTURES
])  # fmt: skip
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiled(source, arch):
    kernels = ptxas.compile_source(source, arch)
    assert kernels
    for kernel in kernels:
        # Two blocks of 256 threads on a multiprocessor, or three of 128 in products.
        assert kernel.spills == 0 and kernel.registers <= (168 if kernel.products else 128), kernel
        assert kernel.shared <= 48 << 10, kernel
        if ", true>" in kernel.name:
            assert kernel.wide, kernel
        if source.stem in ("covariance", "expand_products") and "," in kernel.name:
            assert kernel.products, kernel
