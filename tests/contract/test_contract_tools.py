"""Lines 25, 26, 29 and 34: graphs, exported programs, converters, counters. More of the first two, and line 35, is in
test_compile.py and test_operators.py."""

import copy
import io
import itertools
from pathlib import Path

import listing
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from twins import BLOCKS, alike, fell_back, operands, step, twins

import resfuse
from resfuse import calls
from resfuse.functions import cost, unit

FAMILY = (  # without groups, of which torch overcounts the gradient
    "small-strided", "small-projection", "small-identity", "small-basic-strided", "small-pooled",
    "small-preact", "small-preact-bottleneck", "small-padded",
)  # fmt: skip
# Of the parameters: none, weights, gammas, those of the first convolutions.
FROZEN = slice(0), slice(0, None, 3), slice(1, None, 3), slice(5), slice(9)


@pytest.mark.one_in(3)
@BLOCKS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_25_one_graph(name, training):
    eager, fused = twins(name)
    eager.train(training), fused.train(training)
    torch.compiler.reset()
    graph = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x, dout = operands(name)
    out = graph(x)
    out.backward(dout)
    found = {"out": out.detach(), "dx": x.grad, **{n: p.grad for n, p in fused.named_parameters()}}
    expected = step(eager, x, dout)
    alike(found, {n: expected[n if n in expected else f"d{n}"] for n in found})
    assert not fell_back(fused)


@BLOCKS
def test_26_exported_and_traced_programs_are_plain_aten(name):
    eager, fused = twins(name)
    eager.eval(), fused.eval()
    x = operands(name)[0].detach()
    exported = torch.export.export(fused, (x,)).graph_module.code
    traced = torch.jit.trace(fused, x)
    assert "resfuse" not in exported and "resfuse::" not in str(traced.inlined_graph)
    alike({"out": traced(x).detach()}, {"out": eager(x).detach()})


@pytest.mark.one_in(3)
@BLOCKS
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_26_onnx_has_its_own_operators_alone(name, dynamo):
    pytest.importorskip("onnxscript")
    from onnx import load_from_string
    from onnx.reference import ReferenceEvaluator

    eager, fused = twins(name)
    eager.eval(), fused.eval()
    x, written = operands(name)[0].detach(), io.BytesIO()
    torch.onnx.export(fused, (x,), written, dynamo=dynamo, verbose=False)
    model = load_from_string(written.getvalue())
    assert {node.domain for node in model.graph.node} == {""}
    (out,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    alike({"out": torch.from_numpy(out)}, {"out": eager(x).detach()})


@BLOCKS
def test_26_torch_jit_script_says_to_unfuse_first(name):
    _, fused = twins(name)
    for model in (fused, nn.Sequential(fused)):
        with pytest.raises(RuntimeError, match=r"resfuse\.unfuse\(model\) first"):
            torch.jit.script(model)


def test_26_torch_jit_script_after_unfuse():
    import torchvision

    model = resfuse.unfuse(resfuse.fuse(torchvision.models.resnet18().eval()))
    x = torch.randn(1, 3, 64, 64)
    alike({"out": torch.jit.script(model)(x).detach()}, {"out": model(x).detach()})


@BLOCKS
@pytest.mark.parametrize("converter", ["torch", "timm"])
def test_29_converted_to_syncbatchnorm_before_or_after_it_is_correct(name, converter):
    if converter == "torch":
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
    else:
        convert = pytest.importorskip("timm.layers").convert_sync_batchnorm
    for before in (True, False):
        eager, ours = twins(name)
        ours = resfuse.fuse(convert(copy.deepcopy(eager))) if before else convert(ours)
        assert any(isinstance(m, nn.SyncBatchNorm) for m in ours.modules())
        alike(step(ours, *operands(name)), step(eager, *operands(name)))
        eager.eval(), ours.eval()
        alike(step(ours, *operands(name)), step(eager, *operands(name)))
        assert not fell_back(ours)


def addmm_(_, a, b, *, out_shape=None, **__):  # torch counts the one that is not in place
    return 2 * a[0] * a[1] * b[1]


def counted(block, x, dout):
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
        block(x).backward(dout)
    return counter.get_total_flops()


@BLOCKS
def test_34_floating_point_operations_are_counted(name):
    eager, fused = (counted(block, *operands(name)) for block in twins(name))
    assert 0.95 * eager <= fused <= 1.6 * eager, "products with covariances are few beside the others"


@pytest.mark.parametrize("form", ["covariance", "covariance again", "recompute"])
def test_34_formulas_count_what_a_kernel_set_computes(form, monkeypatch):
    """torch's own count of the eager set's matrix products and convolutions, but for products with a vector."""
    if form == "recompute":
        monkeypatch.setattr(cost, "has_covariance_form", lambda *_: False)
    if form == "covariance again":
        monkeypatch.setattr(unit, "KEPT_COVARIANCE_RATIO", 1e9)
    forms = set()
    for name, frozen in itertools.product(FAMILY, FROZEN[:1] if form == "covariance again" else FROZEN):
        eager, _ = twins(name)
        for p in list(eager.parameters())[frozen]:
            p.requires_grad_(False)
        if not any(p.requires_grad for p in eager.parameters()):
            continue
        fused = resfuse.fuse(eager, config=resfuse.FuseConfig("eager"))
        x, dout = (torch.cat([t.detach()] * 20).requires_grad_(frozen == slice(0)) for t in operands(name))
        as_operators = counted(fused, x, dout)
        with monkeypatch.context() as patch:
            patch.setattr(calls, "_watched", lambda steps, *_: steps)
            by_torch = counted(fused, x, dout)
        assert 0 <= by_torch - as_operators <= 3e-4 * by_torch, (name, frozen)
        forms.add(str(resfuse.report(fused, input_size=x.shape).fused))
    assert any(form.removesuffix(" again") in its for its in forms)


def test_the_documents_list_is_these_tests():
    page = Path(__file__).parents[2] / "docs" / "compatibility.md"
    assert "\n".join(listing.lines()) in page.read_text()
