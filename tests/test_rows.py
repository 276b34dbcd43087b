"""The eager set's rows: masks, and what products read."""

import pytest
import torch

from resfuse.kernels.eager import _rows


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 64, 65])
def test_mask_bits(channels):
    kept = torch.rand(11, channels) > 0.5
    mask = torch.full((11, -(-channels // 8)), 255, dtype=torch.uint8)
    _rows.pack_mask(kept, mask)
    for channel in range(8 * mask.shape[1]):
        bit = mask[:, channel // 8] >> (channel % 8) & 1
        assert torch.equal(bit.bool(), kept[:, channel]) if channel < channels else not bit.any()
    other = torch.empty_like(mask)
    _rows.pack_mask(kept.t().contiguous().t(), other)
    assert torch.equal(other, mask), "NCHW order"
    for like in (torch.empty(11, channels), torch.empty(channels, 11).t()):
        assert torch.equal(_rows.unpack_mask(mask, like) != 0, kept)


@pytest.mark.parametrize("switch, rounded", [("bf16", torch.Tensor.bfloat16), ("tf32", _rows.round_to_tf32)])
def test_statistics_are_of_what_products_read(monkeypatch, switch, rounded):
    """Where torch's switches shorten the operands of float32 products, statistics are of the shortened ones."""
    monkeypatch.setattr(_rows, "reduced_products", lambda device: switch)
    t = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_rows.as_read(t), rounded(t).double()) and not torch.equal(_rows.as_read(t), t.double())


def test_round_to_tf32():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -3.14159265, 0.0, float("inf")])
    expected = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -3.140625, 0.0, float("inf")])
    assert torch.equal(_rows.round_to_tf32(x), expected)
