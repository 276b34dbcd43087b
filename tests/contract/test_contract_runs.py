"""Rows of blocks that keep less (`FuseConfig.memory`): the lines of the contract that a run of blocks could break."""

import copy

import pytest
import torch
from test_contract_distributed import run
from test_contract_state import COPIES
from torch import nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock
from twins import alike, fell_back, is_fused, step

import resfuse
from resfuse.blocks.modules import PreActBottleneck
from resfuse.testing.models import small_resnet

MEMORY = pytest.mark.parametrize("memory", ["lean", "leanest"])
ROWS = {
    "bottlenecks": lambda: small_resnet(in_channels=3, seed=0).stages,
    "basic": lambda: nn.Sequential(BasicBlock(32, 32), BasicBlock(32, 32)),
    "pre-activation": lambda: nn.Sequential(PreActBottleneck(32, 8), PreActBottleneck(32, 8)),
}
EACH = pytest.mark.parametrize("name", ROWS)


def pair(name, memory="leanest"):
    torch.manual_seed(0)
    eager = ROWS[name]().to(memory_format=torch.channels_last)
    return eager, resfuse.fuse(copy.deepcopy(eager), config=resfuse.FuseConfig(memory=memory))


def operands(eager, dtype=torch.float32):
    x = torch.randn(2, 32, 10, 10, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        out = copy.deepcopy(eager)(x)
    return x.requires_grad_(), torch.randn(out.shape, dtype=dtype)


@EACH
@MEMORY
def test_a_step(name, memory):
    eager, ours = pair(name, memory)
    x, dout = operands(eager)
    alike(step(ours, x, dout), step(eager, x, dout))
    assert is_fused(ours) and not fell_back(ours) and list(ours.state_dict()) == list(eager.state_dict())


@EACH
@pytest.mark.parametrize("way", COPIES)
def test_copies_are_runs(name, way):
    eager, ours = pair(name)
    twin = COPIES[way](ours)
    assert type(twin) is type(ours) and twin.resfuse_state.memory == "leanest" and resfuse.report(twin).runs
    x, dout = operands(eager)
    alike(step(twin, x, dout), step(eager, x, dout))
    assert all(p.grad is None for p in ours.parameters())


@EACH
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_moves_statistics_as_stock_does(name, reentrant):
    eager, ours = pair(name)
    x, dout = operands(eager)
    found = []
    for model in (ours, eager):
        model_x = x.detach().clone().requires_grad_()
        checkpoint(model, model_x, use_reentrant=reentrant).backward(dout)
        grads = {n: p.grad for n, p in model.named_parameters()}
        found.append({"dx": model_x.grad, **grads, **{f"b{n}": b for n, b in model.named_buffers()}})
    alike(*found)
    assert {int(b) for n, b in ours.named_buffers() if "tracked" in n} == {2}


@EACH
@pytest.mark.parametrize("hooks", ["copies", "save_on_cpu"])
def test_saved_tensors_hooks(name, hooks):
    eager, ours = pair(name)
    x, dout = operands(eager)
    copies = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
    with copies if hooks == "copies" else torch.autograd.graph.save_on_cpu():
        found = step(ours, x, dout)
    alike(found, step(eager, x, dout))


@EACH
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_graph_has_the_blocks_one_by_one(name, training):
    eager, ours = pair(name)
    x, dout = operands(eager)
    eager.train(training), ours.train(training)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found = step(compiled, x, dout)
    alike({n.replace("_orig_mod.", ""): t for n, t in found.items()}, step(eager, x, dout))
    assert not fell_back(ours)
    assert "run_by_blocks" in dict(resfuse.report(ours).notes)
    torch.compiler.reset()


@EACH
def test_transforms_and_programs(name):
    eager, ours = pair(name)
    eager, ours = eager.double().eval(), ours.double().eval()
    x = operands(eager, torch.float64)[0].detach()
    parameters = dict(eager.named_parameters())

    def loss(model, p):
        return functional_call(model, p, (x,)).square().sum()

    ours_grad, theirs = (grad(lambda p, m=m: loss(m, p))(parameters) for m in (ours, eager))
    alike(ours_grad, theirs)
    assert fell_back(ours) == {"functorch"}
    assert "resfuse" not in torch.export.export(ours, (x,)).graph_module.code
    alike({"out": torch.jit.trace(ours, x)(x).detach()}, {"out": eager(x).detach()})


@EACH
def test_a_mode_sees_the_blocks_as_operators(name):
    eager, ours = pair(name)
    balanced = resfuse.fuse(copy.deepcopy(eager))
    x, dout = operands(eager)
    counts = []
    for model in (ours, balanced):
        with FlopCounterMode(display=False) as counter:
            step(model, x, dout)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_disabled_and_inference():
    eager, ours = pair("bottlenecks")
    x, dout = operands(eager)
    with resfuse.disabled():
        alike(step(ours, x, dout), step(eager, x, dout), tolerance=0)
    ours.load_state_dict(eager.state_dict())
    with torch.inference_mode():
        alike({"out": ours(x)}, {"out": eager(x)})


def test_an_empty_batch_and_one_value_per_channel():
    eager, ours = pair("basic")
    assert torch.equal(ours(torch.zeros(0, 32, 4, 4)), eager(torch.zeros(0, 32, 4, 4)))
    assert fell_back(ours) == {"input_shape"}
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ours(torch.zeros(1, 32, 1, 1))
    assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items())


@pytest.mark.parametrize(
    "what", ["run_ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("run_fsdp", "run_sync"))]
)
def test_processes(what, tmp_path):
    """DDP around a run; blocks that are FSDP's units, which split it; statistics that processes share."""
    for ours, theirs in run(tmp_path, what):
        alike(ours, theirs)
