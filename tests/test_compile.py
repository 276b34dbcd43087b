"""torch.compile over fused modules: one graph that holds our operators, the same bits, any batch, one compilation."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from units import TRITON, activation, bn, bottleneck, triton_kernels

import resfuse
from resfuse import calls, functional
from resfuse.blocks import mixin
from resfuse.functions import ops
from resfuse.testing.cases import CASES, make_block, make_gradient, make_input

KINDS = (
    "small-identity", "small-strided", "small-v1-stride", "small-groups", "small-bias", "ragged", "one-pixel",
    "small-basic-strided", "small-pooled", "small-padded", "small-scaled", "small-linear-sum", "small-plain",
    "small-preact", "small-preact-bottleneck", "small-dense-layer", "small-stem", "small-expansion", "small-depthwise",
)  # fmt: skip


@pytest.fixture(autouse=True)
def forgetful():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder:
    """A backend that runs graphs as they are and keeps the names of what they call."""

    def __init__(self):
        self.graphs = []
        self.backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, module, _):
        called = [node for node in module.graph.nodes if node.op == "call_function"]
        # An operator that writes is the first argument of the one that stands for it.
        named = [t for node in called for t in (node.target, *node.args[:1]) if isinstance(t, torch._ops.OpOverload)]
        self.graphs.append([operator.name() for operator in named])
        return make_boxed_func(module.forward)

    def calls(self, operator: str) -> int:
        return sum(graph.count(f"resfuse::{operator}") for graph in self.graphs)


def pair(name, device="cpu", **options):
    """A fused block, its twin compiled to one graph, and what recorded it."""
    recorder = Recorder()
    block = resfuse.fuse(make_block(CASES[name], device=device), config=resfuse.FuseConfig(**options))
    other = copy.deepcopy(block)
    return block, other, torch.compile(other, fullgraph=True, backend=recorder.backend), recorder


def stepped(block, x, dout, autocast=None):
    """out, dx and every parameter gradient and buffer after a step."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        out = block(x)
    out.backward(dout.to(out.dtype))
    owner = getattr(block, "_orig_mod", block)
    gradients = {f"d{name}": p.grad for name, p in owner.named_parameters()}
    return {"out": out.detach(), "dx": x.grad, **gradients, **dict(owner.named_buffers())}


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert found[name].dtype == t.dtype and found[name].stride() == t.stride(), name
        assert torch.equal(found[name], t), name


@pytest.mark.one_in(4, device="cpu")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", KINDS)
def test_training_is_the_same_to_the_bit(name, autocast, device, deterministic):
    block, _, compiled, recorder = pair(name, device)
    x = make_input(CASES[name], autocast or torch.float32, device=device)
    dout = make_gradient(CASES[name], device=device)
    for _ in range(2):
        check_same(stepped(compiled, x, dout, autocast), stepped(block, x, dout, autocast))
    assert len(recorder.graphs) == 2
    assert recorder.calls("block") + recorder.calls("norm_relu") == 1
    assert recorder.calls("block_backward") + recorder.calls("norm_relu_backward") == 1
    assert recorder.calls("update_buffers") == 1


@pytest.mark.parametrize("name", ["small-identity", "small-preact", "small-stem", "small-dense-layer"])
def test_evaluation(name, device):
    block, _, compiled, recorder = pair(name, device)
    x = make_input(CASES[name], device=device)
    block.eval(), compiled.eval()
    before = copy.deepcopy(block.state_dict())
    with torch.no_grad():
        assert torch.equal(compiled(x), block(x))
    check_same(compiled.state_dict(), {f"_orig_mod.{key}": t for key, t in before.items()})
    assert recorder.calls("block") + recorder.calls("norm_relu") == 1
    assert recorder.calls("update_buffers") == recorder.calls("block_backward") == 0


def test_nchw_and_views():
    block, _, compiled, _ = pair("small-projection")
    block.to(memory_format=torch.contiguous_format), compiled.to(memory_format=torch.contiguous_format)
    whole = make_input(CASES["small-projection"], memory_format=torch.contiguous_format)
    for x in (whole, whole.transpose(2, 3), whole[:, :, ::2, ::2], whole[:1].expand(4, -1, -1, -1)):
        dout = torch.randn(copy.deepcopy(block)(x).shape)
        check_same(stepped(compiled, x, dout), stepped(block, x, dout))


def test_any_batch_is_one_graph_more():
    """The second batch size makes the batch a symbol; no later one compiles again."""
    block, _, compiled, recorder = pair("small-stem")
    like = make_input(CASES["small-stem"])
    for n in (2, 3, 5, 9, 4):
        x = torch.randn(n, *like.shape[1:])
        dout = torch.randn_like(copy.deepcopy(block)(x))
        check_same(stepped(compiled, x, dout), stepped(block, x, dout))
    assert recorder.calls("norm_relu") == 2


def test_steps_do_not_compile_again():
    """Counters, momenta and parameters change; the graph stays."""
    block, other, compiled, recorder = pair("small-identity")
    x, dout = make_input(CASES["small-identity"]), make_gradient(CASES["small-identity"])
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (block, other)]
    for _ in range(4):
        check_same(stepped(compiled, x, dout), stepped(block, x, dout))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert recorder.calls("block") == 1 and int(other.bn1.num_batches_tracked) == 4


@pytest.mark.parametrize("name, settings", [
    ("small-identity", dict(bn1=dict(eps=0.1), bn2=dict(training=False), bn3=dict(momentum=None))),
    ("small-scaled", {"": dict(scale=0.3), "bn1": dict(momentum=0.5)}),
    ("small-stem", dict(bn=dict(eps=0.2, momentum=0.3))),
])  # fmt: skip
def test_settings_are_guarded(name, settings):
    block, other, compiled, recorder = pair(name)
    x, dout = make_input(CASES[name]), make_gradient(CASES[name])
    stepped(compiled, x, dout), stepped(block, x, dout)
    for module in (block, other):
        for inner, values in settings.items():
            vars(module.get_submodule(inner)).update(values)
        module.zero_grad()
    check_same(stepped(compiled, x, dout), stepped(block, x, dout))
    assert recorder.calls("block") + recorder.calls("norm_relu") == 2


def test_requires_grad_false():
    block, other, compiled, recorder = pair("small-identity")
    x, dout = make_input(CASES["small-identity"]), make_gradient(CASES["small-identity"])
    for module in (block, other):
        module.conv2.weight.requires_grad_(False)
        module.bn3.weight.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(block(x), compiled(x))
    for module in (block, compiled):
        module(x).backward(dout)
    for mine, theirs in zip(block.parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


def test_a_network_through_inductor():
    """A stem, blocks of both kinds and a pre-activation end, in one graph, by the compiler that users have."""
    torch.manual_seed(0)
    from torchvision.models.resnet import BasicBlock, Bottleneck

    down = nn.Sequential(nn.Conv2d(8, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    network = nn.Sequential(
        resfuse.blocks.modules.Stem(3, 8), BasicBlock(8, 8), Bottleneck(8, 8, 2, down),
        resfuse.blocks.modules.PreActBottleneck(32, 8), resfuse.blocks.modules.BNReLU(32), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 5),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    resfuse.fuse(network, strict=False)
    twin = copy.deepcopy(network)
    compiled = torch.compile(twin, fullgraph=True)
    x, y = activation(3, 3, 32, 32, dtype=torch.float32), torch.tensor([0, 3, 1])
    for module in (network, compiled):
        nn.functional.cross_entropy(module(x), y).backward()
    for (name, mine), theirs in zip(network.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6), name
    for (name, mine), theirs in zip(network.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6), name


def test_functional_calls():
    convs, norm = bottleneck(dtype=torch.float32), bn(16, dtype=torch.float32)
    x = activation(2, 8, 5, 6, dtype=torch.float32)
    gate = torch.rand(2, 8, 5, 6)
    recorder = Recorder()

    def f(x, gate):
        y = functional.conv_bn_add_relu(x, *convs[:3], shortcut=x, gate=gate, scale=0.5)
        y, stats = functional.preactivation(
            [y, x], norm, functional.Conv(torch.ones(4, 16, 1, 1)), want_stats=True
        )
        return y, stats.mean

    expected = f(x, gate)
    found = torch.compile(f, fullgraph=True, backend=recorder.backend)(x, gate)
    assert all(map(torch.equal, found, expected)) and recorder.calls("block") == 2


def test_bad_arguments_raise_while_the_graph_is_made():
    convs = bottleneck(dtype=torch.float32)
    compiled = torch.compile(lambda x: functional.bottleneck(x, *convs), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="does not fit an input of 3 channels"):
        compiled(torch.randn(2, 3, 8, 8))


def test_what_cannot_be_fused_is_compiled_as_it_was():
    _, other, compiled, recorder = pair("small-identity")
    other.relu = nn.SiLU()
    x = make_input(CASES["small-identity"])
    expected = mixin.original_class(type(other)).forward(copy.deepcopy(other), x)
    assert torch.allclose(compiled(x), expected)
    assert recorder.calls("block") == 0
    assert resfuse.report(other).skipped[0][1] == "module_type"


def test_disabled():
    _, _, compiled, recorder = pair("small-identity")
    with resfuse.disabled():
        compiled(make_input(CASES["small-identity"]))
    assert recorder.calls("block") == 0 and recorder.graphs


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_plain_aten(strict):
    block = resfuse.fuse(make_block(CASES["small-projection"])).eval()
    x = make_input(CASES["small-projection"])
    program = torch.export.export(block, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("resfuse" in target for target in targets) and any("conv2d" in target for target in targets)
    assert torch.allclose(program.module()(x), block(x), atol=1e-5)


@TRITON
@pytest.mark.slow
def test_a_graph_of_triton_kernels(monkeypatch):
    with triton_kernels(monkeypatch):
        block, _, compiled, recorder = pair("small-identity", backend="triton")
        x, dout = make_input(CASES["small-identity"]), make_gradient(CASES["small-identity"])
        check_same(stepped(compiled, x, dout), stepped(block, x, dout))
    assert recorder.calls("block") == 1


OPERATORS = {
    f"resfuse::{name}" for name in ("block", "block_backward", "norm_relu", "norm_relu_backward", "update_buffers")
}  # fmt: skip


# Operators by themselves ------------------------------------------------------------------------------------------


class Noting(TorchDispatchMode):
    """Notes our operators and their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        if operator.namespace == "resfuse" and operator.name() in OPERATORS:
            self.seen.append((operator, [_copied(a) for a in arguments]))
        return operator(*arguments, **(named or {}))


def noted(monkeypatch, name, training=True):
    """What a step of a block calls, as in a graph."""
    for function, steps in ((calls.block, ops.BLOCK), (calls.bn_relu, ops.BN_RELU)):
        monkeypatch.setitem(function.__kwdefaults__, "steps", steps)
    block = resfuse.fuse(make_block(CASES[name])).train(training)
    with Noting() as noting:
        stepped(block, make_input(CASES[name]), make_gradient(CASES[name]))
    return noting.seen


def _copied(argument):
    if isinstance(argument, torch.Tensor):
        return argument.detach().clone()
    return list(map(_copied, argument)) if isinstance(argument, list) else argument


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", KINDS)
def test_35_opcheck_of_every_operator(name, monkeypatch):
    seen = noted(monkeypatch, name)
    assert len(seen) == 3
    for operator, arguments in seen:
        opcheck(operator, arguments)


def test_constant_statistics_are_copied(monkeypatch):
    """An operator may not return its operand's memory."""
    for operator, arguments in noted(monkeypatch, "small-preact", training=False):
        opcheck(operator, arguments)


# On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", ["small-projection", "stage3", "small-stem", "small-preact"])
def test_31_a_step_in_a_cuda_graph(name, backend, deterministic):
    """Captured once, replayed on other inputs: nothing in a step waits for the device."""
    block = resfuse.fuse(make_block(CASES[name], device="cuda"), config=resfuse.FuseConfig(backend=backend))
    twin = copy.deepcopy(block)
    x = make_input(CASES[name], device="cuda").requires_grad_()
    dout = make_gradient(CASES[name], device="cuda")

    def step():
        for t in (x, *block.parameters()):
            t.grad = None
        block(x).backward(dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    twin.load_state_dict(block.state_dict())
    for seed in (1, 2):
        other = make_input(CASES[name], seed=seed, device="cuda")
        with torch.no_grad():
            x.copy_(other)
        graph.replay()
        twin.zero_grad()
        y = other.requires_grad_()
        twin(y).backward(dout)
        assert torch.equal(x.grad, y.grad)
        assert all(map(torch.equal, block.state_dict().values(), twin.state_dict().values()))
        for mine, theirs in zip(block.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_reduce_overhead(backend):
    """torch.compile's own CUDA graphs."""
    block = resfuse.fuse(make_block(CASES["stage3"], device="cuda"), config=resfuse.FuseConfig(backend=backend))
    twin = copy.deepcopy(block)
    compiled = torch.compile(twin, fullgraph=True, mode="reduce-overhead")
    x, dout = make_input(CASES["stage3"], device="cuda"), make_gradient(CASES["stage3"], device="cuda")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        for module in (block, twin):
            module.zero_grad()
        check_same({k: t.clone() for k, t in stepped(compiled, x, dout).items()}, stepped(block, x, dout))
