"""Lines 19 to 24 and 30: what autograd, transforms, hooks and other tools do with a fused block."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from twins import BLOCKS, alike, fell_back, operands, step, twins

import resfuse


@BLOCKS
def test_19_a_graph_that_is_kept_gives_the_same_again(name):
    _, fused = twins(name)
    x, dout = operands(name)
    out = fused(x)
    first = torch.autograd.grad(out, [x, *fused.parameters()], dout, retain_graph=True)
    second = torch.autograd.grad(out, [x, *fused.parameters()], dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@BLOCKS
@pytest.mark.parametrize("hooks", ["copies", "save_on_cpu"])
def test_19_saved_tensors_hooks(name, hooks):
    (eager, fused), given = twins(name), operands(name)
    packed = []

    def pack(t):
        packed.append(t)
        return t.clone()

    chosen = {
        "copies": lambda: torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        "save_on_cpu": torch.autograd.graph.save_on_cpu,
    }[hooks]
    with chosen():
        found = step(fused, *given)
    alike(found, step(eager, *given))
    assert packed or hooks == "save_on_cpu"


@BLOCKS
@pytest.mark.parametrize("reentrant", [False, True])
def test_20_checkpoint_moves_statistics_as_stock_does(name, reentrant):
    eager, fused = twins(name)
    found = []
    for block in (fused, eager):
        x, dout = operands(name)
        out = checkpoint(block, x, use_reentrant=reentrant)
        out.backward(dout)
        found.append({"dx": x.grad, **{n: p.grad for n, p in block.named_parameters()}, **dict(block.named_buffers())})
    alike(*found)


@BLOCKS
def test_21_double_backward(name):
    found = []
    for block in reversed(twins(name)):
        block.double()
        x, dout = operands(name, torch.float64)
        (dx,) = torch.autograd.grad(block(x), x, dout, create_graph=True)
        grads = torch.autograd.grad(dx.pow(2).sum(), [x, *block.parameters()], allow_unused=True)
        found.append({str(i): g for i, g in enumerate(grads) if g is not None})
    alike(*found, tolerance=1e-8)


@BLOCKS
def test_22_transforms(name):
    eager, fused = twins(name)
    eager.eval(), fused.eval()
    x, dout = (t.detach() for t in operands(name))

    def loss(block):
        return lambda parameters, x: (torch.func.functional_call(block, parameters, (x,)) * dout).sum()

    found = []
    for block in (fused, eager):
        parameters = {n: p.detach() for n, p in block.named_parameters()}
        grads = torch.func.grad(loss(block))(parameters, x)
        _, tangent = torch.func.jvp(block, (x,), (torch.ones_like(x),))
        each = torch.vmap(lambda one, block=block: block(one[None])[0])(x)
        found.append({**{f"d{n}": g for n, g in grads.items()}, "jvp": tangent, "vmap": each})
    alike(*found)
    assert fell_back(fused)


@BLOCKS
def test_23_hooks_on_the_block_fire_and_it_stays_fused(name):
    _, fused = twins(name)
    fired = []
    fused.register_forward_pre_hook(lambda *_: fired.append("before"))
    fused.register_forward_hook(lambda *_: fired.append("after"))
    fused.register_full_backward_hook(lambda *_: fired.append("backward"))
    step(fused, *operands(name))
    assert fired == ["before", "after", "backward"] and not fell_back(fused)


@BLOCKS
def test_23_hooks_inside_fire_and_their_end_gives_fusion_back(name):
    eager, fused = twins(name)
    for inner, module in fused.named_modules():
        if not inner or list(module.children()):
            continue
        fired = []
        handle = module.register_forward_hook(lambda *_, fired=fired: fired.append(1))
        fused(operands(name)[0])
        assert fired, inner
        handle.remove()
    assert fell_back(fused)
    fused.load_state_dict(eager.state_dict())
    again = copy.deepcopy(fused)
    alike(step(again, *operands(name)), step(eager, *operands(name)))


def test_24_feature_extraction():
    import torchvision
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    torch.manual_seed(0)
    eager = torchvision.models.resnet18().eval()
    fused = resfuse.fuse(copy.deepcopy(eager))
    x = torch.randn(1, 3, 64, 64)
    assert get_graph_node_names(fused) == get_graph_node_names(eager)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [create_feature_extractor(m, ["layer2", "layer4.1.relu"])(x) for m in (fused, eager)]
    alike(*({n: t.detach() for n, t in f.items()} for f in found))
    untraced = resfuse.fuse(copy.deepcopy(eager))
    getters = [IntermediateLayerGetter(m, {"layer1": "a", "layer3": "b"}) for m in (untraced, eager)]
    alike(*({n: t.detach() for n, t in getter(x).items()} for getter in getters))
    assert not fell_back(untraced)


def pruned(block):
    for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
        prune.l1_unstructured(conv, "weight", 0.5)


def parametrized(block):
    for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
        parametrizations.weight_norm(conv)


def quantized(block):
    quantization = pytest.importorskip("torch.ao.quantization")
    block.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(block.train(), inplace=True)


@BLOCKS
@pytest.mark.parametrize("tool", [pruned, parametrized, quantized], ids=["prune", "parametrize", "quantize"])
def test_30_tools_that_change_a_convolution_afterwards(name, tool):
    eager, fused = (block.to(memory_format=torch.contiguous_format) for block in twins(name))  # prune takes no other
    tool(eager), tool(fused)
    assert list(eager.state_dict()) == list(fused.state_dict())
    alike(step(fused, *operands(name)), step(eager, *operands(name)))
