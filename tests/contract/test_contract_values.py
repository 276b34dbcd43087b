"""Lines 13 to 17 and 32: dtypes, layouts, and the same bits again."""

import pytest
import torch
from torch import nn
from twins import BLOCKS, alike, operands, step, twins


@BLOCKS
def test_13_bfloat16_activations_and_float32_batchnorms(name):
    eager, fused = twins(name)
    for block in (eager, fused):
        block.bfloat16()
        for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.float()
    x, dout = operands(name, torch.bfloat16)
    alike(step(fused, x, dout), step(eager, x, dout), 0.1)


@BLOCKS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_13_other_mixes_raise_as_eager_does(name, dtype):
    x = operands(name, dtype)[0]
    for block in twins(name):
        with pytest.raises(RuntimeError):
            block(x)


@BLOCKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_14_autocast_gives_float32_gradients(name, dtype):
    eager, fused = twins(name)
    x, dout = operands(name, dtype)  # as a convolution before it gives them
    with torch.autocast("cpu", dtype=dtype):
        found, expected = step(fused, x, dout), step(eager, x, dout)
    alike(found, expected, 0.1)
    assert found["out"].dtype == dtype
    assert all(p.grad.dtype == torch.float32 for p in fused.parameters())


@BLOCKS
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_15_a_gradscaler_sees_what_overflows(name, value):
    skipped = []
    for block in twins(name):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        optimizer = torch.optim.SGD(block.parameters(), 0.1)
        before = {n: p.detach().clone() for n, p in block.named_parameters()}
        x, dout = operands(name)
        dout = dout.clone()
        dout[0, 0] = value
        scaler.scale(block(x)).backward(dout)
        scaler.step(optimizer)
        scaler.update()
        skipped.append((scaler.get_scale(), all(torch.equal(p, before[n]) for n, p in block.named_parameters())))
    assert skipped[0] == skipped[1] == (1.0, True)


LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@BLOCKS
@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_strides_of_output_and_gradients(name, layout, weights):
    found, (eager, fused) = [], twins(name)
    for block in (eager, fused):
        block.to(memory_format=LAYOUTS[weights])
        x, dout = (t.detach().contiguous(memory_format=LAYOUTS[layout]) for t in operands(name))
        made = step(block, x, dout)
        found.append((made["out"].stride(), made["dx"].stride()))
        if block is fused:
            assert all(p.grad.stride() == p.stride() for p in block.parameters())
    assert found[0] == found[1]


VIEWS = {
    "expanded": lambda x: x[:1].expand_as(x), "every other": lambda x: torch.stack([x, x], 4)[..., 0],
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], "transposed": lambda x: x.transpose(2, 3),
}  # fmt: skip


@BLOCKS
@pytest.mark.parametrize("view", VIEWS)
def test_17_inputs_that_are_not_dense(name, view):
    eager, fused = twins(name)
    x = VIEWS[view](operands(name)[0].detach())
    found = []
    for block in (fused, eager):
        leaf = x.detach().requires_grad_()
        block.zero_grad()
        out = block(leaf)
        out.sin().sum().backward()
        found.append({"out": out.detach(), "dx": leaf.grad, **{n: p.grad for n, p in block.named_parameters()}})
    alike(*found)


@BLOCKS
def test_32_ten_runs_give_the_same_bits(name):
    _, fused = twins(name)
    x, dout = operands(name)
    torch.use_deterministic_algorithms(True)
    try:
        buffers = {n: b.clone() for n, b in fused.named_buffers()}
        runs = []
        for _ in range(10):
            fused.load_state_dict(buffers, strict=False)
            runs.append(step(fused, x, dout))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(run[n], runs[0][n]) for run in runs[1:] for n in runs[0])
