"""The alternatives compute what eager computes, keep less, or say why they are not here."""

import copy
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from benchmarks import peers
from resfuse.bench import alternatives
from resfuse.bench.alternatives import ALTERNATIVES
from resfuse.testing.comparison import MODES
from resfuse.testing.memory import saved_bytes
from resfuse.testing.models import small_resnet

CPU = torch.device("cpu")


def results(model, x):
    out = model(x)
    gradients = torch.autograd.grad(out.sin().sum(), list(model.parameters()))
    return [out.detach(), *gradients]


@pytest.mark.parametrize("prepare", [alternatives.checkpointed, alternatives.recomputed])
def test_they_compute_what_eager_computes_and_keep_less(prepare):
    model, x = small_resnet(seed=0), torch.randn(4, 1, 8, 8)
    other = prepare(copy.deepcopy(model))
    assert all(torch.equal(a, b) for a, b in zip(results(model, x), results(other, x), strict=True))
    kept = [saved_bytes(lambda m=m: m(x), m) for m in (model, other)]
    assert kept[1] < 0.7 * kept[0]


def test_a_block_alone_is_checkpointed_whole():
    block = small_resnet(seed=0).stages[0]
    x = torch.randn(2, 32, 8, 8, requires_grad=True)
    kept = [saved_bytes(lambda m=m: m(x), m, [x]) for m in (block, alternatives.checkpointed(copy.deepcopy(block)))]
    assert kept[1] == x.nbytes < kept[0]  # its output, which has x's size


def test_every_pair_of_a_resnet_is_recomputed():
    model = alternatives.recomputed(small_resnet())
    pairs = [m for m in model.modules() if isinstance(m, alternatives.RecomputedConvBN)]
    assert len(pairs) == sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 14


def test_a_budget_holds_while_it_compiles_and_no_longer(monkeypatch):
    from torch._functorch import config

    seen, before = [], config.activation_memory_budget

    def compiled(model):
        def run(x):
            seen.append(config.activation_memory_budget)
            return model(x)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    assert alternatives.Budgeted(nn.ReLU())(torch.ones(1)) == 1
    assert seen == [alternatives.BUDGET] and config.activation_memory_budget == before != alternatives.BUDGET


def test_what_is_not_here_says_why(monkeypatch):
    mode = MODES["float32"]
    reasons = {a.name: a.absent(CPU, mode) for a in ALTERNATIVES}
    assert {name for name, reason in reasons.items() if reason is None} >= {"eager", "resfuse", "conv-BN recomputed"}
    assert reasons["torch.compile max-autotune"].code == "gpu_only"
    monkeypatch.setattr(alternatives.importlib.util, "find_spec", lambda name: None)
    for name in ("inplace_abn", "cuDNN frontend", "apex groupbn"):
        (other,) = (a for a in ALTERNATIVES if a.name == name)
        assert other.absent(CPU, mode).code == "package_missing"
    monkeypatch.setattr(alternatives.importlib.util, "find_spec", lambda name: object())
    assert other.absent(CPU, mode).code == "not_wired"
    with pytest.raises(NotImplementedError):
        other.implementation.prepare(nn.ReLU())


class Leaky(nn.BatchNorm2d):
    """In the place of inplace_abn's: what it computes."""

    def __init__(self, channels, eps, momentum, activation):
        super().__init__(channels, eps, momentum)
        assert activation == "leaky_relu"

    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.01)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_in_place_normalization_is_another_model_of_the_same_parts(block, monkeypatch):
    monkeypatch.setitem(sys.modules, "inplace_abn", types.SimpleNamespace(InPlaceABN=Leaky))
    model, x = ResNet(block, [1, 1, 1, 1], num_classes=5), torch.randn(2, 3, 32, 32)
    nn.init.normal_(model.bn1.bias)
    other = alternatives.in_place_abn(copy.deepcopy(model))
    leaky = [name for name, module in other.named_modules() if type(module) is Leaky]
    inner = ("bn1", "bn2") if block is Bottleneck else ("bn1",)
    assert leaky == ["bn1", *(f"layer{i}.0.{name}" for i in range(1, 5) for name in inner)]
    assert other.state_dict().keys() == model.state_dict().keys() and torch.equal(other.bn1.bias, model.bn1.bias)
    monkeypatch.setattr(F, "leaky_relu", lambda x, _: F.relu(x))
    torch.testing.assert_close(results(other, x), results(model, x))
    with pytest.raises(NotImplementedError, match="torchvision"):
        alternatives.in_place_abn(nn.ReLU())


def test_in_place_normalization_says_which_dtypes_it_lacks(monkeypatch):
    monkeypatch.setattr(alternatives.importlib.util, "find_spec", lambda name: object())
    (other,) = (a for a in ALTERNATIVES if a.name == "inplace_abn")
    assert other.absent(CPU, MODES["float32"]) is None
    assert other.absent(torch.device("cuda"), MODES["autocast-float16"]) is None
    for device, mode in ((CPU, "autocast-float16"), (torch.device("cuda"), "autocast-bfloat16")):
        assert other.absent(device, MODES[mode]).code == "dtype"


def test_the_largest_batch_is_where_the_peak_fills_the_memory():
    peaks = {"4": 140, "8": 240}  # 40, and 25 an image
    assert peers.largest_batch(peaks, held=60, memory=350) == 10
    assert peers.largest_batch(peaks, held=60, memory=349) == 9
    assert peers.largest_batch(peaks, held=60, memory=50) == 0


@pytest.mark.slow
def test_the_command_counts_and_times_and_tells_what_is_missing(tmp_path, capsys):
    path, names = tmp_path / "p.json", "eager;resfuse;apex groupbn"
    options = ["--subject", "small-resnet", "--batches", "1,2", "--names", names, "--seconds", "0.5"]
    options += ["--out", str(path)]
    assert peers.main(options) == 0
    content = json.loads(path.read_text())
    eager, ours, apex = content["rows"]
    assert ours["saved_bytes"] < eager["saved_bytes"] and eager["peaks"]["1"] < eager["peaks"]["2"]
    assert apex["reason"].startswith(("package_missing", "not_wired")) and not apex["peaks"]
    assert [row["name"] for row in content["times"]] == ["eager", "resfuse"] and content["times"][1]["speedup"]
    capsys.readouterr()
    assert peers.main(["--table", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
