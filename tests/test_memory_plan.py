"""How lean rows of blocks become: the exact search, and the counts that it searches in, against measurements."""

import copy
import itertools
import math
import random

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import resfuse
from resfuse.memory import count, plan, search
from resfuse.memory.search import Option
from resfuse.testing.memory import peak_bytes, saved_bytes
from resfuse.testing.models import small_resnet


def random_parts(seed):
    draw = random.Random(seed)
    parts = []
    for _ in range(draw.randint(1, 5)):
        options = []
        for i in range(draw.randint(1, 5)):
            saved = draw.randint(0, 30)
            options.append(Option(str(i), 1, saved, saved + draw.randint(0, 20), draw.randint(0, 9)))
        parts.append(options)
    return parts


def outcome(options):
    """(time, peak, saved) of a choice, by the definition: the peak of each part's backward over what is kept then."""
    peaks = [sum(o.saved for o in options[:i]) + options[i].peak for i in range(len(options))]
    return sum(o.time for o in options), max(peaks), sum(o.saved for o in options)


@pytest.mark.parametrize("seed", range(40))
def test_the_search_is_exact(seed):
    parts = random_parts(seed)
    outcomes = [outcome(options) for options in itertools.product(*parts)]
    least = min(peak for _, peak, _ in outcomes)
    enough = [o for o in outcomes if o[1] <= (1 + search.ABOUT) * least]
    little = min(saved for _, _, saved in enough)
    for more in (0.0, 0.25):
        found = search.leanest(parts, more)
        assert outcome(found.options) == (found.time, found.peak, found.saved)
        assert search.peak(found.options) == found.peak
        assert (found.time, found.saved) == min((o[0], o[2]) for o in enough if o[2] <= (1 + more) * little)
    for limit in (least, least + 5, least * 2):
        best = min(o for o in outcomes if o[1] <= limit)
        found = search.fastest(parts, limit)
        assert outcome(found.options) == (found.time, found.peak, found.saved) == best
    with pytest.raises(search.Impossible, match=f"least possible peak is {least} bytes") as raised:
        search.fastest(parts, least - 1)
    assert raised.value.least == least


def resnet(block=Bottleneck, layers=(2, 3, 2, 2)):
    torch.manual_seed(0)
    return torchvision.models.ResNet(block, list(layers), num_classes=10).to(memory_format=torch.channels_last)


SIZE = 8, 3, 128, 128


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_eager_is_counted_without_data(block):
    model, x = resnet(block), torch.randn(SIZE)
    marked = {"stem": ("conv1", "maxpool"), "first": ("layer1.0", "layer1.0")}
    steps, called = count.steps(model, marked, ["layer1", "layer1.0.conv1"], SIZE)
    assert called == {"layer1", "layer1.0.conv1"}
    x = x.contiguous(memory_format=torch.channels_last)
    assert sum(step.kept for step in steps) == pytest.approx(saved_bytes(lambda: model.train()(x), model), rel=0.02)
    named = {step.name: step for step in steps}
    assert [step.name for step in steps][:2] == ["stem", "first"]
    assert named["stem"].convolved == 8 * 64 * 64 * 64 * 4 and named["first"].shape == (8, 64, 32, 32)


def peak(model, x):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return peak_bytes(lambda: model(x).square().mean().backward())


def fused(model, memory, size=SIZE):
    return resfuse.fuse(copy.deepcopy(model), config=resfuse.FuseConfig(memory=memory), input_size=size)


@pytest.mark.parametrize("memory", ["lean", *(pytest.param(m, marks=pytest.mark.slow) for m in ("leanest", 0.5)), 0.4])
def test_the_peak_is_what_was_counted(memory):
    """And a share that was asked for is met, by the allocator's own count."""
    eager = resnet()
    x = torch.randn(SIZE).contiguous(memory_format=torch.channels_last)
    model = fused(eager, memory)
    note = next(text for code, text in resfuse.report(model).notes if code == "peak")
    share = peak(model, x) / peak(eager, x)
    assert share == pytest.approx(float(note.split()[0]), rel=0.1)
    if isinstance(memory, float):
        assert share <= 1.03 * memory


def test_a_share_takes_the_least_time():
    """Less is asked for, more is made again."""
    model, made = resnet(), []
    for share in (1.0, 0.52, 0.45, 0.35):
        report = resfuse.report(fused(model, share))
        made.append(sum(2 if "leanest" in text else 1 for _, text in report.runs))
    assert made == sorted(made) and made[0] == 0 < made[1] < made[-1]


def test_what_cannot_be_is_told_and_nothing_changes():
    model = resnet()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"memory=0.05: the least possible peak of a step is 0\.\d+ of eager's"):
        resfuse.fuse(model, config=resfuse.FuseConfig(memory=0.05))
    assert [type(m) for m in model.modules()] == classes
    least = float(str(pytest.raises(ValueError, fused, model, 0.05).value).split(" of eager's")[0].split()[-1])
    assert "leanest" in str(resfuse.report(fused(model, least + 0.001)))


def test_a_model_that_cannot_be_counted():
    model = nn.Sequential(*(Bottleneck(16, 4) for _ in range(20)), nn.Flatten(), nn.Linear(16 * 9, 2))
    with pytest.raises(ValueError, match="memory=0.5 is a share .* 8x3x224x224 does not run .* see input_size"):
        resfuse.fuse(model, config=resfuse.FuseConfig(memory=0.5))
    lean = resfuse.fuse(model, config=resfuse.FuseConfig(memory="lean"))
    every = min(range(1, 22), key=lambda k: (math.ceil(22 / k) + k, -k))
    assert resfuse.report(lean).runs == [("", f"20 blocks, lean, outputs kept every {every}")]
    counted = resfuse.fuse(model, config=resfuse.FuseConfig(memory="lean"), input_size=(8, 16, 3, 3))
    assert "peak" in dict(resfuse.report(counted).notes)


def test_counting_draws_nothing_and_runs_nothing():
    model = nn.Sequential(*(resfuse.blocks.ResidualBlock(3, 3, drop_path=0.5) for _ in range(3)))
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    resfuse.fuse(model, config=resfuse.FuseConfig(memory="leanest"))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_share_and_back():
    model = small_resnet(3, seed=0)
    fuse = lambda memory: resfuse.fuse(model, config=resfuse.FuseConfig(memory=memory), input_size=(8, 3, 32, 32))  # noqa: E731
    fuse(0.6)
    assert [fqn for fqn, _ in resfuse.report(model).runs] == ["stages"]
    fuse(1.0)
    assert resfuse.report(model).runs == [] and type(model.stages) is nn.Sequential


def test_rows_that_the_forward_leaves_out():
    """A row that does not run has a run's class all the same, for whoever calls it."""
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = (nn.Sequential(Bottleneck(16, 4), Bottleneck(16, 4)) for _ in range(2))

        def forward(self, x):
            return self.used[0](x)

    size = (2, 16, 8, 8)
    lean = fused(Partly(), "lean", size)
    assert [fqn for fqn, text in resfuse.report(lean).runs if "2 blocks, lean" in text] == ["used", "spare"]
    assert resfuse.report(fused(Partly(), 1.0, size)).runs == []


def test_long_rows_without_sizes():
    assert plan.uncounted([plan.Row("a", (None,) * 36), plan.Row("b", (None,) * 6)], [], "lean").options == {
        "a": Option("lean", 6, 0, 0), "b": Option("lean", 6, 0, 0)
    }  # fmt: skip
