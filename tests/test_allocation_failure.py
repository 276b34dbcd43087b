"""Memory that runs out anywhere in a step: the call that raises changes nothing, and the next step is as ever.

Every allocation that goes through torch's CPU allocator fails once. What the C++ kernels take by other means for their
own use (std::vector, aligned scratch memory) does not.
"""

import copy
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
from torch.utils import cpp_extension

import resfuse
from resfuse.functions import replay
from resfuse.testing.cases import CASES, make_block, make_gradient, make_input

NOTED = 3  # steps of a kind, after which it is done from notes
COMPILER = os.environ.get("CXX", "c++")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(COMPILER) is None,
    reason=f"compiler_missing: builds an allocator that fails, with {COMPILER} on Linux",
)
BLOCKS = pytest.mark.parametrize("name", ["small-strided", "small-basic-strided", "small-preact-bottleneck"])
# The C++ kernels; those with running statistics that they leave to torch's operators; torch's operators alone.
WAYS = pytest.mark.parametrize("backend, dtype, layout", [
    ("auto", torch.float32, torch.channels_last),
    ("auto", torch.bfloat16, torch.channels_last),
    ("eager", torch.float32, torch.contiguous_format),
], ids=str)  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """The failing allocator, installed: once in a process, and for good."""
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    links = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "failing_allocator.so"
        source = Path(__file__).parent / "failing_allocator.cpp"
        command = [COMPILER, "-std=c++20", "-shared", "-fPIC", *includes, str(source), *links, "-lc10", "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        found = ctypes.CDLL(str(made))
    found.start.argtypes, found.stop.restype = [ctypes.c_int64], ctypes.c_int64
    found.install()
    return found


def allocations(call) -> int:
    """How many a call makes, which is not the first of its kind in the process: those set up what stays."""
    library().start(0)
    try:
        call()
    finally:
        count = library().stop()
    return count


def failed(call, k: int) -> BaseException:
    """What a call raises whose k-th allocation fails."""
    library().start(k)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=f"injected at allocation {k},") as found:
            call()
    finally:
        library().stop()
    return found.value


def block_and_twin(name, backend, dtype, layout):
    block = make_block(CASES[name], dtype=dtype, memory_format=layout)
    return [resfuse.fuse(b, config=resfuse.FuseConfig(backend)) for b in (block, copy.deepcopy(block))]


def operands(name, dtype, layout):
    return make_input(CASES[name], dtype, layout).requires_grad_(), make_gradient(CASES[name], dtype, layout)


def buffers(block) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in block.named_buffers()}


def gradients(leaves) -> list[torch.Tensor | None]:
    return [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]


def restore(leaves, found) -> None:
    for leaf, gradient in zip(leaves, found, strict=True):
        leaf.grad = None if gradient is None else gradient.clone()


def same(ours, theirs) -> bool:
    """Bit for bit, None for None."""
    pairs = zip(ours, theirs, strict=True)
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def stepped(model, x, dout) -> list[torch.Tensor | None]:
    """All that a step makes: output, gradients, buffers."""
    leaves = [x, *model.parameters()]
    restore(leaves, [None] * len(leaves))
    out = model(x)
    out.backward(dout)
    return [out.detach(), *gradients(leaves), *buffers(model).values()]


@pytest.fixture(params=[False, True], ids=["decided anew", "from notes"])
def noted(request, monkeypatch) -> bool:
    """Whether steps are done from notes, which those before them have made."""
    monkeypatch.setattr(replay, "DEVICES", ("cpu",) if request.param else ())
    return request.param


@pytest.mark.one_in(2)
@WAYS
@BLOCKS
def test_a_forward_that_fails_at_any_allocation_changes_no_buffer(name, backend, dtype, layout, noted):
    block, twin = block_and_twin(name, backend, dtype, layout)
    x, dout = operands(name, dtype, layout)
    other, before = copy.deepcopy(block), buffers(block)
    for _ in range(NOTED):
        other(x)
    count, within = allocations(lambda: other(x)), set()
    assert count > (5 if noted else 20)
    for k in range(1, count + 1):
        error = failed(lambda: block(x), k)
        within |= {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        now = buffers(block)
        assert not [name for name, b in before.items() if not torch.equal(b, now[name])], f"allocation {k}"
    if (backend, dtype) != ("auto", torch.float32):  # there the update of all the buffers allocates nothing
        assert "update_running" in within
    assert same(stepped(block, x, dout), stepped(twin, x, dout))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("accumulated", [False, True], ids=["no gradients", "gradients of before"])
@WAYS
@BLOCKS
def test_a_backward_that_fails_at_any_allocation_changes_no_gradient(
    name, backend, dtype, layout, accumulated, noted
):
    block, twin = block_and_twin(name, backend, dtype, layout)
    x, dout = operands(name, dtype, layout)
    leaves = [x, *block.parameters()]
    for _ in range(NOTED):
        restore(leaves, [None] * len(leaves))
        block(x).backward(dout)
    if not accumulated:
        restore(leaves, [None] * len(leaves))
    before, out, finished = gradients(leaves), block(x), []
    out.grad_fn.register_hook(lambda *_: finished.append(True))

    def backward():
        out.backward(dout, retain_graph=True)

    count, failures = allocations(backward), 0
    expected = gradients(leaves)
    for k in range(1, count + 1):
        restore(leaves, before)
        finished.clear()
        failed(backward, k)
        if not finished:  # else a clone of torch's, which accumulates leaf by leaf what the block gave it
            failures += 1
            assert same(gradients(leaves), before), f"allocation {k}"
    assert failures > (5 if noted else 20)
    restore(leaves, before)
    backward()
    assert same(gradients(leaves), expected), "the graph was kept, and gives something else"
    block.load_state_dict(twin.state_dict())
    assert same(stepped(block, x, dout), stepped(twin, x, dout))


def test_eager_stops_half_way():
    """The comparison's own ground: the same failures leave an eager block with some buffers and gradients changed."""
    block = make_block(CASES["small-strided"])
    x, dout = operands("small-strided", torch.float32, torch.channels_last)
    before, parameters, partial = buffers(block), list(block.parameters()), set()
    stepped(copy.deepcopy(block), x, dout)
    count = allocations(lambda: block(x).backward(dout))
    for k in range(1, count + 1):
        block.load_state_dict(before, strict=False)
        block.zero_grad()
        failed(lambda: block(x).backward(dout), k)
        now = buffers(block)
        for what, changed in (
            ("buffers", [not torch.equal(b, now[name]) for name, b in before.items()]),
            ("gradients", [p.grad is not None for p in parameters]),
        ):
            if any(changed) and not all(changed):
                partial.add(what)
    assert partial == {"buffers", "gradients"}


@pytest.mark.parametrize("places", [12, pytest.param(None, marks=pytest.mark.slow, id="all")])
def test_a_step_of_a_network_leaves_no_block_half_way(places):
    """Blocks that were through have changed, as eager's layers have; each of the others not at all."""
    model = torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    twin = resfuse.fuse(copy.deepcopy(model))
    resfuse.fuse(model)
    x, dout = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.randn(2, 10)
    blocks = [model.bn1, *(m for m in model.modules() if isinstance(m, torchvision.models.resnet.BasicBlock))]
    start, reached = copy.deepcopy(model.state_dict()), {"buffers": set(), "gradients": set()}
    for _ in range(NOTED):
        stepped(copy.deepcopy(model), x, dout)
    count = allocations(lambda: model(x).backward(dout))
    for k in range(1, count + 1) if places is None else torch.linspace(1, count, places).int().tolist():
        model.load_state_dict(start)
        model.zero_grad()
        before = [buffers(block) for block in blocks]
        failed(lambda: model(x).backward(dout), k)
        states = {
            "buffers": [
                {not torch.equal(b, old[name]) for name, b in block.named_buffers()}
                for block, old in zip(blocks, before, strict=True)
            ],
            "gradients": [{p.grad is not None for p in block.parameters()} for block in blocks],
        }
        for what, changed in states.items():
            assert all(len(whole) == 1 for whole in changed), f"{what}, allocation {k}: {changed}"
            reached[what].add(sum(map(sum, changed)))
    assert all(len(numbers) > 2 for numbers in reached.values()), f"blocks that were through: {reached}"
    model.load_state_dict(start)
    assert same(stepped(model, x, dout), stepped(twin, x, dout))
