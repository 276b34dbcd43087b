"""The C++ kernel `apply` against plain torch, and the sentences of its refusals."""

import re
import shutil
import subprocess
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from units import NATIVE

from resfuse import _native
from resfuse.kernels.cpu.apply import apply
from resfuse.kernels.interface import Norm, Second, Sum, Unsupported, Want

pytestmark = [pytest.mark.gate, NATIVE]

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((2, 64, 5, 7), (3, 8, 1, 1), (1, 1, 3, 2), (2, 13, 4, 4), (1, 521, 3, 3), (1, 1031, 2, 1))
KINDS = ("none", "tensor", "norm", "norm without relu")


def rows(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, c, h, w).to(dtype).to(memory_format=torch.channels_last)


def operands(shape: tuple[int, ...], dtype: torch.dtype, kind: str = "none"):
    """(a, residual) of a shape [N, C, H, W]."""
    c = shape[1]
    a = Norm(rows(*shape, dtype), torch.randn(c), torch.randn(c))
    if kind == "none":
        return a, None
    r = rows(*shape, dtype)
    return a, r if kind == "tensor" else Norm(r, torch.randn(c), torch.randn(c), relu=kind == "norm")


def plain(a: Norm, residual: Tensor | Norm | None, relu: bool, precision: torch.dtype = torch.float32) -> Tensor:
    """The formula operation by operation, before rounding to storage."""

    def affine(z, scale, shift):
        return z.to(precision) * scale.to(precision)[:, None, None] + shift.to(precision)[:, None, None]

    y = affine(a.z, a.scale, a.shift)
    if isinstance(residual, Norm):
        r = affine(residual.z, residual.scale, residual.shift)
        y = y + (r.relu() if residual.relu else r)
    elif residual is not None:
        y = y + residual.to(precision)
    return y.relu() if relu else y


def bits(out: Tensor) -> Tensor:
    """The mask of a stored output, by its definition."""
    positive = (out <= 0).logical_not().permute(0, 2, 3, 1).flatten(0, 2).numpy()
    return torch.from_numpy(np.packbits(positive, axis=1, bitorder="little"))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_equal_plain_float32(shape, dtype, kind, poisoned):
    a, residual = operands(shape, dtype, kind)
    for relu, want_mask in product((True, False), repeat=2):
        out, mask, _ = apply(a, Sum(residual, relu), Want(want_mask))
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, plain(a, residual, relu).to(dtype))
        assert torch.equal(mask, bits(out)) if want_mask else mask is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_against_float64_is_rounding(dtype, kind):
    a, residual = operands((2, 24, 9, 9), dtype, kind)
    exact = plain(a, residual, True, torch.float64)
    error = (apply(a, Sum(residual), Want()).out.double() - exact).norm() / exact.norm()
    assert error < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 0, 4)])
def test_no_rows(shape, dtype):
    a, residual = operands(shape, dtype, "tensor")
    out, mask, _ = apply(a, Sum(residual), Want(mask=True))
    assert out.shape == shape and mask.shape == (0, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_behave_as_in_torch(dtype, kind, poisoned):
    a, residual = operands((2, 19, 3, 3), dtype, kind)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0], dtype=dtype)
    for t in (a.z, residual.z if isinstance(residual, Norm) else residual):
        if t is not None:
            chosen = torch.rand_like(t, dtype=torch.float32) < 0.5
            t[chosen] = special[torch.randint(len(special), (int(chosen.sum()),))]
    for relu in (True, False):
        out, mask, _ = apply(a, Sum(residual, relu), Want(mask=True))
        expected = plain(a, residual, relu).to(dtype)
        assert expected.isnan().any() and same(out, expected)
        assert torch.equal(mask, bits(expected))


def identity(values: Tensor) -> Norm:
    """Values [C] as one row under the identity map."""
    return Norm(values[None, :, None, None], torch.ones(len(values)), torch.zeros(len(values)))


def test_mask_is_taken_after_rounding_to_storage():
    # The sum is positive in float32 and 0 in bfloat16: half of the smallest bfloat16, and a little more.
    smallest = 2.0**-133
    a = identity(torch.full((3,), smallest).to(torch.bfloat16))
    scale = torch.tensor([0.5, 0.75, 1.0])
    out, mask, _ = apply(a._replace(scale=scale), Sum(), Want(mask=True))
    assert out.flatten().tolist() == [0.0, smallest, smallest]
    assert mask.tolist() == [[0b110]]


def test_bfloat16_rounds_to_nearest_even_and_keeps_every_nan():
    patterns = torch.randint(-(2**31), 2**31, (4096,)).to(torch.int32)
    patterns[:6] = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800001, 0x7FFFFFFF, -1]).to(torch.int32)
    shift = patterns.view(torch.float32)
    a = identity(torch.zeros(4096, dtype=torch.bfloat16))._replace(shift=shift)
    out, mask, _ = apply(a, Sum(relu=False), Want(mask=True))
    assert same(out.flatten(), shift.to(torch.bfloat16))
    assert torch.equal(mask, bits(out))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    a, residual = operands((3, 72, 41, 37), dtype, "norm")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(apply(a, Sum(residual), Want(mask=True))[:2])
    finally:
        torch.set_num_threads(before)
    for out, mask in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(mask, results[0][1])
    assert torch.equal(results[0][0], plain(a, residual, True).to(dtype))


def test_operands_are_not_modified():
    a, residual = operands((2, 24, 3, 3), torch.float32, "norm")
    tensors = (*a[:3], *residual[:3])
    before = [t.clone() for t in tensors]
    apply(a, Sum(residual), Want(mask=True))
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def with_changes(**changes):
    """The operator's arguments, valid but for `changes`."""
    a, r = operands((2, 16, 3, 3), torch.float32, "norm")
    valid = dict(z=a.z, scale=a.scale, shift=a.shift, residual=r.z, residual_scale=r.scale, residual_shift=r.shift,
                 residual_relu=True, before=0, row_scale=None, gate=None, total_scale=1.0, relu=True, want_mask=True,
                 want_stats=False)  # fmt: skip
    return {**valid, **changes}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(z=torch.zeros(2, 16, 3)), "z must have 4 dimensions"),
        (dict(z=torch.zeros(2, 16, 3, 3)), "z must be channels_last or a strided view"),
        (dict(z=rows(2, 16, 3, 3, torch.float64)), "z must be float32 or bfloat16, not Double"),
        (dict(scale=torch.ones(15)), r"scale must have shape \[16\]"),
        (dict(scale=torch.ones(16).double()), "scale must be float32"),
        (dict(shift=torch.ones(1, 16)), r"shift must have shape \[16\]"),
        (dict(shift=torch.ones(32)[::2]), "shift must be contiguous"),
        (dict(residual=rows(2, 16, 3, 2, torch.float32)), r"residual must have the shape \[2, 16, 3, 3\]"),
        (dict(residual=rows(2, 16, 3, 3, torch.bfloat16)), "residual must have the dtype Float"),
        (dict(residual_scale=torch.ones(3)), r"residual_scale must have shape \[16\]"),
        (dict(residual_shift=torch.ones(16).bfloat16()), "residual_shift must be float32"),
        (dict(residual_shift=None), "residual_scale and residual_shift must be given together"),
        (dict(residual=None), "residual_scale and residual_shift need residual"),
        (dict(before=1), "residual has 16 channels from 1 on, which do not fit into 16"),
        (dict(row_scale=torch.ones(3)), r"row_scale must have shape \[2\]"),
        (dict(gate=torch.zeros(2, 16, 3, 3)), "gate must be"),
    ],
)
def test_the_operator_names_the_argument_that_is_wrong(changes, sentence):
    with pytest.raises((RuntimeError, TypeError), match=sentence):
        _native.load().apply(**with_changes(**changes))


def refused(a: Norm, residual=None) -> set[str]:
    with pytest.raises(Unsupported) as caught:
        apply(a, Sum(residual), Want(mask=True))
    return {reason.code for reason in caught.value.reasons}


def test_what_it_cannot_serve_is_refused_with_a_code():
    a, r = operands((2, 16, 3, 3), torch.float32, "tensor")
    assert refused(a._replace(z=a.z.double())) == {"dtype"}
    assert refused(a._replace(z=a.z.half())) == {"dtype"}
    assert refused(a._replace(z=a.z.contiguous())) == {"layout"}
    assert refused(a, r.contiguous()) == {"layout"}
    assert refused(a._replace(z=a.z.to("meta"))) == {"device"}
    second = Second(r, torch.ones(16, 16), a.scale, a.shift)
    with pytest.raises(Unsupported, match="weighed_second"):
        apply(a, Sum(second, row_scale=torch.ones(2)), Want())


def test_the_library_holds_no_python():
    """So that one library serves every Python that has its torch."""
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("no_binutils: nm and readelf are not on PATH")
    symbols = _printed("nm", "-D", "--undefined-only", str(_native.LIBRARY)).split()
    assert not [symbol for symbol in symbols if symbol.lstrip("_").startswith("Py")]
    needed = re.findall(r"NEEDED.*\[(.*)\]", _printed("readelf", "-d", str(_native.LIBRARY)))
    assert "libtorch_cpu.so" in needed and not [name for name in needed if "python" in name]


def _printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    c = 64
    pixels = 2**31 // c + 3
    z = torch.zeros(1, pixels, 1, c, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    z[0, :, -1] = torch.arange(c, dtype=torch.bfloat16)[:, None]
    out, mask, _ = apply(Norm(z, torch.full((c,), 2.0), torch.full((c,), -4.0)), Sum(), Want(mask=True))
    assert torch.equal(out[0, :, -1, 0].float(), (2.0 * torch.arange(c) - 4.0).relu())
    assert mask[-1].tolist() == [0b11111000] + [255] * 7 and mask[0].sum() == 0
    assert not out[0, :, 0].any()
