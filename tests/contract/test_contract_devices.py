"""Line 33: streams, devices, and tensors of more than 2^31 elements."""

import os

import pytest
import torch
from torch import nn
from twins import BLOCKS, alike, operands, step, twins

import resfuse

LARGE = 16400  # its square, times the channels, is more than 2^31
CHANNELS = 8
gpu = pytest.mark.gpu


@gpu
@BLOCKS
def test_33_other_streams(name):
    _, fused = twins(name)
    fused.cuda()
    x, dout = (t.detach().cuda() for t in operands(name))
    buffers = {n: b.clone() for n, b in fused.named_buffers()}
    found = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        fused.load_state_dict(buffers, strict=False)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # work of another stream would overtake
            late = x * 1
            found.append(step(fused, late, dout))
        torch.cuda.current_stream().wait_stream(stream)
    for other in found[1:]:
        alike(other, found[0])


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one_gpu: there is no other")
@BLOCKS
def test_33_other_devices(name):
    eager, fused = (block.to("cuda:1") for block in twins(name))
    x, dout = (t.detach().to("cuda:1") for t in operands(name))
    assert torch.cuda.current_device() == 0
    alike(step(fused, x, dout), step(eager, x, dout))


def large(device: str) -> torch.Tensor:
    """Strips of the same random rows, each louder than the one before."""
    size = (1, CHANNELS, LARGE, LARGE)
    x = torch.empty(size, dtype=torch.bfloat16, device=device, memory_format=torch.channels_last)
    strip = torch.randn(1, CHANNELS, LARGE // 41, LARGE, device=device)
    for i, part in enumerate(x.chunk(41, 2)):
        part.copy_(strip * (1 + i / 41))
    return x


@torch.no_grad()
def reference(block: nn.Module, x: torch.Tensor) -> nn.Module:
    """BatchNorm with the statistics of the whole, in float64."""
    sums, squares = torch.zeros(2, CHANNELS, dtype=torch.float64, device=x.device)
    for part in x.chunk(164, 2):
        z = block.conv(part).double()
        sums, squares = sums + z.sum((0, 2, 3)), squares + (z**2).sum((0, 2, 3))
    norm = nn.BatchNorm2d(CHANNELS, device=x.device, dtype=torch.float64).eval()
    norm.running_mean = sums / LARGE**2
    norm.running_var = squares / LARGE**2 - norm.running_mean**2
    return norm


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_33_more_than_2_to_the_31_elements(device):
    if device == "cpu" and os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 15 << 30:
        pytest.skip("memory: less than 15 GiB are free")
    torch.manual_seed(0)
    block = resfuse.blocks.ConvBNReLU(CHANNELS, CHANNELS, 1).to(device, torch.bfloat16)
    x = large(device)
    assert x.numel() > 1 << 31
    out = block(x)
    assert not resfuse.report(block).fallbacks
    norm = reference(block, x)
    for rows in (slice(0, 50), slice(LARGE // 2, LARGE // 2 + 50), slice(LARGE - 50, LARGE)):
        ours = out[:, :, rows].double()
        theirs = torch.relu(norm(block.conv(x[:, :, rows]).double()))
        assert (ours - theirs).norm() <= 0.01 * theirs.norm()
    error = block.bn.running_mean.double() - 0.1 * norm.running_mean
    assert error.norm() <= 1e-3 * (norm.running_mean.norm() + norm.running_var.sqrt().norm())
