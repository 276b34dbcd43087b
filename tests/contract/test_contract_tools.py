"""Lines 25, 26, 29 and 34: graphs, exported programs, converters, counters. More of the first two, and line 35, is in
test_compile.py and test_operators.py."""

import copy
from pathlib import Path

import listing
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from twins import BLOCKS, alike, fell_back, operands, step, twins

import resfuse


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


@BLOCKS
def test_29_converted_to_syncbatchnorm_before_or_after_it_is_correct(name):
    for before in (True, False):
        eager, ours = twins(name)
        if before:
            ours = resfuse.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(eager)))
        else:
            ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
        eager.eval(), ours.eval()  # in training it wants a GPU
        alike(step(ours, *operands(name)), step(eager, *operands(name)))


@BLOCKS
def test_34_floating_point_operations_are_counted(name):
    counts = []
    for block in twins(name):
        x, dout = operands(name)
        with FlopCounterMode(display=False) as counter:
            block(x).backward(dout)
        counts.append(counter.get_total_flops())
    assert 0.95 * counts[0] <= counts[1] <= 1.6 * counts[0], "products with covariances are few beside the others"


def test_the_documents_list_is_these_tests():
    page = Path(__file__).parents[2] / "docs" / "compatibility.md"
    assert "\n".join(listing.lines()) in page.read_text()
