"""The emulator of csrc/emu: its instructions against plain torch, and bugs that it must find in kernels."""

import re
from pathlib import Path

import pytest
import torch

from resfuse.testing import emulator
from resfuse.testing.emulator import READ, READWRITE, WRITE, EmulatorError, Library

pytestmark = pytest.mark.skipif(bool(emulator.unavailable()), reason=f"no_emulator: {emulator.unavailable()}")

SOURCES = {name: emulator.CSRC / "emu" / f"{name}.cu" for name in ("microtests", "wgmma_tile")}
ORDERS = pytest.mark.parametrize("order", [0, 1, 2], ids=["forward", "backward", "random"])


@pytest.fixture(scope="module")
def emulated() -> Library:
    return Library(emulator.build(list(SOURCES.values())))


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def library(request):
    """The kernels in the emulator, and on a GPU, which the emulator must be like."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    from resfuse.testing import nvcc

    return nvcc.Library(list(SOURCES.values()))


def run_product(library: Library, kind: str = "bf16"):
    d = torch.empty(16, 8)
    if kind == "tf32":
        a, b = ((torch.randn(n, 8).view(torch.int32) & ~0x1FFF).view(torch.float32) for n in (16, 8))
    else:
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        a, b = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    buffers = [(a, READ, "a"), (b, READ, "b"), (d, WRITE, "d")]
    library.call("mma_once", buffers, ["bf16", "f16", "tf32"].index(kind))
    torch.testing.assert_close(d, (a.double() @ b.double().T).float(), rtol=1e-6, atol=1e-6)
    assert not library.counts or library.stat("mma") == 1


def run_copy(library: Library, valid: int = 32, transpose: int = 0, order: int = 0):
    """cp.async and ldmatrix: a lane gets two neighbours of a row of each matrix, or of a column."""
    rows, out = torch.randint(-(2**15), 2**15, (32, 8), dtype=torch.int16), torch.empty(4, 32, dtype=torch.int32)
    library.call("copy", [(rows, READ, "rows"), (out, WRITE, "out")], valid, transpose, order=order)
    matrices = torch.where(torch.arange(32)[:, None] < valid, rows, torch.zeros_like(rows)).view(4, 8, 8)
    assert torch.equal(out.view(torch.int16).view(4, 8, 8), matrices.mT if transpose else matrices)
    if library.counts:
        assert library.traffic(rows) == valid * 16 and library.stat("cp_async_bytes") == 32 * 16


def run_pipeline(library: Library, order: int = 0):
    """Warp-specialised: one warp produces into a ring of two slots, two consume."""
    x, out = torch.randint(0, 100, (7, 32), dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    library.call("pipeline", [(x, READ, "x"), (out, WRITE, "out")], 7, order=order, seed=3)
    assert torch.equal(out, 2 * x.sum(0).roll(-1).int())
    if library.counts:
        assert library.traffic(x) == 7 * 32 * 4 and library.traffic(out, written=True) == 32 * 4


def run_last_block(library: Library, order: int = 0):
    """A sum over the grid by the block that finishes last."""
    x, partial, total = torch.randn(5 * 32), torch.empty(5), torch.empty(1)
    ticket = torch.zeros(1, dtype=torch.int32)
    buffers = [(x, READ, "x"), (partial, WRITE, "partial"), (ticket, READWRITE, "ticket"), (total, WRITE, "total")]
    library.call("last_block_sum", buffers, 5, order=order)
    torch.testing.assert_close(total[0], x.sum(), rtol=1e-5, atol=1e-5)


def run_microtests(library: Library):
    run_product(library)
    run_copy(library)
    run_pipeline(library)
    run_last_block(library)


def run_wgmma_tile(library: Library, register_a: int = 1, transpose_b: int = 0, order: int = 0):
    """Four steps of two stages: with fewer than three, none is used again. Ragged on every axis."""
    m, n, k = 100, 72, 200
    a, b = torch.randn(m, k).bfloat16(), torch.randn(*((k, n) if transpose_b else (n, k))).bfloat16()
    out = torch.empty(m, n)
    buffers = [(a, READ, "a"), (b, READ, "b"), (out, WRITE, "out")]
    library.call("wgmma_tile", buffers, m, n, k, register_a, transpose_b, order=order)
    left, right = a.double(), b.double()
    exact = (left.relu() if register_a else left) @ (right if transpose_b else right.T)
    torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-4)
    if library.counts:
        assert library.stat("ldmatrix_cycles") == library.stat("ldmatrix")  # the swizzle has no bank conflicts


def test_warp_operations(library):
    out = torch.empty(8, 32, dtype=torch.int32)
    library.call("warp_ops", [(out, WRITE, "out")], order=2)
    lanes = range(32)
    assert out[0].tolist() == [(i & ~7 | 5) * 3 for i in lanes]
    assert out[1].tolist() == [i if i % 16 < 3 else i - 3 for i in lanes]
    assert out[2].tolist() == [i if i % 16 + 3 >= 16 else i + 3 for i in lanes]
    assert out[3].tolist() == [i ^ 9 for i in lanes]
    assert out[4].tolist() == [sum(1 << i for i in lanes if i % 3 == 0)] * 32
    assert out[5].tolist() == [496] * 32
    assert out[6].tolist() == [49] * 8 + [-1] * 24
    assert out[7].tolist() == [1] * 32


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_matrix_product(library, kind):
    run_product(library, kind)


def test_matrix_units_cut_off(emulated):
    """What lies below the last bits of the largest product is dropped, not rounded: in long sums it shows."""
    a, b, d = torch.full((16, 16), 2.0**-26).bfloat16(), torch.ones(8, 16).bfloat16(), torch.empty(16, 8)
    a[:, 0] = 1
    exact = 1 + 15 * 2.0**-26
    assert torch.tensor(exact, dtype=torch.float64).float() > 1
    emulated.call("mma_once", [(a, READ, "a"), (b, READ, "b"), (d, WRITE, "d")], 0)
    assert torch.equal(d, torch.ones(16, 8))


@ORDERS
@pytest.mark.parametrize("valid", [0, 13, 32])
@pytest.mark.parametrize("transpose", [0, 1])
def test_copy_and_ldmatrix(library, valid, transpose, order):
    run_copy(library, valid, transpose, order)


@ORDERS
def test_last_block(library, order):
    run_last_block(library, order)


@ORDERS
def test_warp_specialised_pipeline(library, order):
    run_pipeline(library, order)


@ORDERS
@pytest.mark.parametrize("register_a", [0, 1])
@pytest.mark.parametrize("transpose_b", [0, 1])
def test_wgmma_tile(library, register_a, transpose_b, order):
    run_wgmma_tile(library, register_a, transpose_b, order)


def test_conversions_bit_for_bit(library):
    """Every bfloat16, every float16, every half-way point between neighbours, and random bits."""
    drawn = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    every = torch.arange(1 << 16, dtype=torch.int32)
    bf16, half = (every << 16).view(torch.float32), every.to(torch.int16).view(torch.float16).float()
    between = [((every << 16) + 0x8000).view(torch.float32), (half.view(torch.int32) + 0x1000).view(torch.float32)]
    edges = torch.tensor([65519.99, 65520.0, 1e-8, 2.9e-8, 3e-8, -0.0, 6e-5])
    x = torch.cat([drawn, bf16, half, *between, edges])
    x = x[~x.isnan()].contiguous()
    packed, back = torch.empty(x.numel(), dtype=torch.int32), torch.empty(x.numel(), 2)
    library.call("convert", [(x, READ, "x"), (packed, WRITE, "packed"), (back, WRITE, "back")], x.numel())
    stored = packed.view(torch.int16).view(-1, 2)
    assert torch.equal(stored[:, 0], x.bfloat16().view(torch.int16))
    assert torch.equal(stored[:, 1], x.half().view(torch.int16))
    expected = torch.stack([x.bfloat16().float(), (-x).half().float()], dim=1)
    assert torch.equal(back.view(torch.int32), expected.view(torch.int32))


def test_launches_by_other_callers(emulated):
    """Without `call`, as when an operator launches: the error stays until `reset`."""
    emulated.reset()
    emulated.set_order(1, seed=2)
    x = torch.ones(2, 32, dtype=torch.int32)
    with pytest.raises(EmulatorError, match="^out-of-bounds: .* past the end of 'x'.* microtests.cu:"):
        emulated.call("pipeline", [(x, READ, "x"), (torch.empty(32, dtype=torch.int32), WRITE, "out")], 3)
    assert emulated.error().startswith("out-of-bounds")
    emulated.reset()
    assert emulated.error() is None
    with pytest.raises(KeyError, match="no such count"):
        emulated.stat("no such count")
    with pytest.raises(ValueError, match="'x' has gaps"):
        emulated.call("warp_ops", [(x[:, ::2], READ, "x")])


def test_builds_are_reused_and_errors_shown(tmp_path):
    source = tmp_path / "kernel.cu"
    header, other = tmp_path / "beside.h", tmp_path / "other.h"
    header.write_text("")
    source.write_text('#include "beside.h"\n#include "ptx.h"\nextern "C" int one() { return 1; }\n')
    first = emulator.build([source])
    stamp = first.stat().st_mtime_ns
    other.write_text("")  # which nobody includes
    assert emulator.build([source]) == first and first.stat().st_mtime_ns == stamp
    header.write_text("// changed\n")
    assert emulator.build([source]) != first
    source.write_text('#include "ptx.h"\n__global__ void kernel() { __shared__ int x; }\n')
    with pytest.raises(RuntimeError, match="use SHARED_ARRAY"):
        emulator.build([source])


SHARED = """
#include "ptx.h"
__global__ void kernel(int* out) {
  SHARED_ARRAY(int, beside, 32);
  SHARED_DYNAMIC(int, rows);
  rows[threadIdx.x] = beside[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = rows[threadIdx.x] + beside[threadIdx.x];
}
extern "C" int with_launch(int* out, int bytes, void* stream) {
  return launch(kernel, dim3(1), dim3(32), bytes, cudaStream_t(stream), out);
}
extern "C" int without_asking(int* out, int bytes, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1), config.blockDim = dim3(32), config.dynamicSmemBytes = bytes;
  return cudaLaunchKernelEx(&config, kernel, out);
}
"""


def test_shared_memory_over_48_kilobytes_is_asked_for(tmp_path):
    """Dynamic and static together, by each launch: a GPU keeps what an earlier one asked for."""
    (tmp_path / "kernel.cu").write_text(SHARED)
    library, out = Library(emulator.build([tmp_path / "kernel.cu"])), torch.empty(32, dtype=torch.int32)
    for name, total in (("without_asking", 48 << 10), ("with_launch", 227 << 10), ("with_launch", 48 << 10)):
        library.call(name, [(out, WRITE, "out")], total - 128)
        assert torch.equal(out, 2 * torch.arange(32, dtype=torch.int32))
        if total > 48 << 10 or name == "without_asking":
            with pytest.raises(EmulatorError, match="^launch: .* dynamic and 128 static bytes of shared memory"):
                library.call(name, [(out, WRITE, "out")], total - 127)


# (name, kernel, text that occurs once, what replaces it, the message)
BUGS = [
    ("no wait for cp.async", "microtests", "  cp_async_wait<0>();\n", "", "async-copy"),
    ("no barrier after cp.async", "microtests", "  __syncwarp(0xffffffffu);\n", "", "race|async-copy"),
    ("a misaligned row for ldmatrix", "microtests",
     "ldmatrix_x4(r, address);", "ldmatrix_x4(r, address + 8);", "misaligned"),
    ("a product in part of a warp", "microtests",
     "launch(mma_kernel, dim3(1), dim3(32)", "launch(mma_kernel, dim3(1), dim3(24)", "divergence"),
    ("a barrier that no block has", "microtests",
     "named_barrier_sync(1, 64)", "named_barrier_sync(16, 64)", "undefined"),
    ("the producer does not wait for the empty slot", "microtests",
     "      if (s >= 2) mbarrier_wait(empty + (s & 1) * 8, (s >> 1 & 1) ^ 1);\n", "", "race|divergence"),
    ("a named barrier counts the producer too", "microtests",
     "named_barrier_sync(1, 64)", "named_barrier_sync(1, 96)", "divergence"),
    ("no __threadfence before the ticket", "microtests",
     "    partial[blockIdx.x] = sum;\n    __threadfence();", "    partial[blockIdx.x] = sum;", "race"),
    ("no __syncwarp", "microtests", "  __syncwarp();\n", "", "race|uninitialised"),
    ("no mbarrier wait", "wgmma_tile",
     "    mbarrier_wait(bar + (step & 1) * 8, step >> 1 & 1);\n", "", "async-copy"),
    ("the wrong mbarrier parity", "wgmma_tile", "step >> 1 & 1);", "step & 1);", "divergence|async-copy|race"),
    ("expect_tx of too few bytes", "wgmma_tile",
     "mbarrier_arrive_expect_tx(b, kStageBytes)", "mbarrier_arrive_expect_tx(b, kTileBytes)", "divergence|async-copy"),
    ("no __syncthreads after mbarrier init", "wgmma_tile",
     "  }\n  __syncthreads();\n  if (tid == 0) load", "  }\n  if (tid == 0) load", "race"),
    ("no wgmma_wait", "wgmma_tile", "    wgmma_wait<0>();\n", "    wgmma_wait<1>();\n", "async-read"),
    ("no wgmma_fence", "wgmma_tile", "    wgmma_fence();\n", "", "async-read"),
    ("a stage used again without a barrier", "wgmma_tile",
     "    __syncthreads();  // the whole", "    //", "async-read|race"),
    ("the descriptor's stride", "wgmma_tile",
     "wgmma_descriptor(tile_b + kk * 32, 1024)", "wgmma_descriptor(tile_b + kk * 32, 512)", "numbers"),
    ("shared memory written without fence.proxy.async", "wgmma_tile", "    wgmma_fence();\n",
     "    reinterpret_cast<volatile unsigned char*>(smem)[(step & 1) * kStageBytes + kTileBytes + tid] = 0;\n"
     "    __syncthreads();\n    wgmma_fence();\n", "proxy"),
]  # fmt: skip
QUICK = {
    "no __threadfence before the ticket", "no __syncwarp", "no wgmma_fence", "a named barrier counts the producer too",
}  # fmt: skip


def finding(kernel: str, library: Library) -> str:
    try:
        {"microtests": run_microtests, "wgmma_tile": run_wgmma_tile}[kernel](library)
    except EmulatorError as error:
        return str(error)
    except AssertionError as error:
        return f"numbers: {error}"
    return "nothing"


@pytest.mark.parametrize(
    "kernel, original, mutated, message",
    [pytest.param(*bug, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, *bug in BUGS],
)
def test_finds(kernel: str, original: str, mutated: str, message: str, tmp_path: Path):
    text = SOURCES[kernel].read_text()
    assert text.count(original) == 1
    source = tmp_path / f"{kernel}.cu"
    source.write_text(text.replace(original, mutated))
    found = finding(kernel, Library(emulator.build([source])))
    assert re.match(f"({message}): ", found), found
