"""Runs of blocks and stems that keep less: to the bit what the blocks are one by one, in every kernel set."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from units import EMULATED, TRITON, triton_kernels

import resfuse
from resfuse import calls, functional
from resfuse.blocks import modules
from resfuse.functional import ArgumentError, Block, run
from resfuse.kernels import dispatch, measured
from resfuse.testing import cuda
from resfuse.testing.memory import saved_bytes

MEMORY = pytest.mark.parametrize("memory", ["lean", "leanest"])


def projection(in_, out, stride):
    return nn.Sequential(nn.Conv2d(in_, out, 1, stride, bias=False), nn.BatchNorm2d(out))


def bottlenecks(groups=1, blocks=3):
    first = Bottleneck(8, 8, 2, projection(8, 32, 2), groups, 64)
    return nn.Sequential(first, *(Bottleneck(32, 8, groups=groups) for _ in range(blocks - 1)))


def timm_bottlenecks():
    resnet, layers = pytest.importorskip("timm.models.resnet"), pytest.importorskip("timm.layers")
    first = resnet.Bottleneck(8, 8, 2, resnet.downsample_avg(8, 32, 1, 2), drop_path=layers.DropPath(0.4))
    return nn.Sequential(first, *(resnet.Bottleneck(32, 8, drop_path=layers.DropPath(0.4)) for _ in range(2)))


ROWS = {
    "bottlenecks": bottlenecks,
    "grouped": lambda: bottlenecks(groups=2),
    "basic": lambda: nn.Sequential(BasicBlock(8, 16, 2, projection(8, 16, 2)), BasicBlock(16, 16), BasicBlock(16, 16)),
    "pre-activation bottlenecks": lambda: nn.Sequential(
        modules.PreActBottleneck(8, 4, 2), *(modules.PreActBottleneck(16, 4) for _ in range(2))
    ),
    "pre-activation": lambda: nn.Sequential(
        modules.PreActBlock(8, 16, 2), modules.PreActBlock(16, 16), modules.PreActBlock(16, 16)
    ),
    "dropped, scaled, padded": lambda: nn.Sequential(
        modules.ResidualBlock(8, 16, 2, shortcut="padded", drop_path=0.4),
        modules.ResidualBlock(16, 16, width=8, scale=0.7, drop_path=0.4), modules.ResidualBlock(16, 16, relu=False),
    ),
    "timm": timm_bottlenecks,
}  # fmt: skip
MODES = {"float32": (torch.float32, False), "bf16": (torch.bfloat16, False), "autocast": (torch.float32, True)}


def make(name):
    torch.manual_seed(0)
    row = ROWS[name]()
    for module in row.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias, 0, 0.5)
            nn.init.normal_(module.running_mean, 0, 0.2), nn.init.uniform_(module.running_var, 0.5, 1.5)
    return row.to(memory_format=torch.channels_last)


def fused(model, memory, backend="auto"):
    return resfuse.fuse(copy.deepcopy(model), config=resfuse.FuseConfig(backend, memory=memory))


def step(model, x, autocast=False):
    """Everything that a step makes or leaves, the generator's state too."""
    torch.manual_seed(3)
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    found = {"out": out.detach(), "dx": x.grad, "generator": torch.get_rng_state()}
    found |= {f"d{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def image(n=3, size=10, dtype=torch.float32, seed=2, channels=8):
    x = torch.randn(n, channels, size, size - 1, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name, t in theirs.items() if not torch.equal(ours[name], t)] == []


def is_run(module):
    return isinstance(module, resfuse.blocks.mixin.FusedMixin) and module.resfuse_state.memory != "balanced"


BACKENDS = pytest.mark.parametrize("backend", ["auto", "eager"])


@pytest.mark.gate
@pytest.mark.one_in(3)
@pytest.mark.parametrize("rows", [1, 10**9], ids=["covariance", "recomputed or kept"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ROWS)
@MEMORY
@BACKENDS
def test_steps_are_those_of_the_blocks_to_the_bit(name, memory, mode, rows, backend, monkeypatch):
    monkeypatch.setattr(calls.cost, "covariance_rows", lambda *_: rows)
    (dtype, autocast), row = MODES[mode], make(name)
    row = row.to(dtype)
    for module in row.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    balanced, lean = fused(row, "balanced", backend), fused(row, memory, backend)
    assert is_run(lean) and not is_run(balanced)
    x, kept = image(dtype=dtype), []
    for model in map(copy.deepcopy, (balanced, lean)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kept.append(saved_bytes(lambda m=model: m(x), model, [x]))
    assert kept[1] < kept[0]
    for _ in range(2):
        same_bits(step(lean, x, autocast), step(balanced, x, autocast))
    assert resfuse.report(lean).splits == [] and resfuse.report(lean).fallbacks == []


@TRITON
@pytest.mark.parametrize("name, mode, rows, windows", [
    ("bottlenecks", "autocast", 10**9, False),
    pytest.param("bottlenecks", "float32", 1, False, marks=pytest.mark.slow),
    pytest.param("pre-activation", "float32", 10**9, True, marks=pytest.mark.slow),
])  # fmt: skip
def test_with_tritons_kernels(name, mode, rows, windows, monkeypatch):
    """Interpreted."""
    monkeypatch.setattr(calls.cost, "covariance_rows", lambda *_: rows)
    row, x, autocast = make(name)[:2], image(2, 5), MODES[mode][1]
    with triton_kernels(monkeypatch, windows=windows):
        ours, theirs = (step(fused(row, memory, "triton"), x, autocast) for memory in ("leanest", "balanced"))
        same_bits(ours, theirs)


@EMULATED
@pytest.mark.parametrize("name, mode", [("bottlenecks", "float32"), ("basic", "autocast"), ("pre-activation", "bf16")])
def test_with_cudas_kernels(name, mode, monkeypatch):
    """Emulated."""
    monkeypatch.setattr(dispatch, "ORDER", ("cuda", "eager"))
    monkeypatch.setattr(measured, "proven", lambda *_: True)
    monkeypatch.setattr(measured, "UNPROVEN", {})
    monkeypatch.setattr(calls.cost, "covariance_rows", lambda *_: 1)
    (dtype, autocast), row = MODES[mode], make(name)[:2]
    with cuda.emulated():
        assert "cuda" in dispatch.kernels("auto", "cpu", dtype).chosen.values()
        ours, theirs = (
            step(fused(row, memory).to(dtype), image(2, 5, dtype), autocast) for memory in ("leanest", "balanced")
        )
        same_bits(ours, theirs)


@pytest.mark.parametrize("name", ["bottlenecks", "pre-activation"])
def test_steps_done_from_notes(name):
    """The second step is noted, later ones are done from the notes."""
    dispatch.kernels.cache_clear()
    row = make(name)
    balanced, lean = fused(row, "balanced"), fused(row, "leanest")
    for seed in range(4):
        same_bits(step(lean, image(seed=seed)), step(balanced, image(seed=seed)))
    found = dispatch.kernels("auto", "cpu", torch.float32).replays
    noted = {key[0] for key, steps in found.items() if callable(steps)}
    assert noted >= {"block", "block_backward", "block_again"}
    assert ("block_first_again" in noted) == (name == "bottlenecks")


def test_an_input_that_is_not_dense():
    row, x = make("bottlenecks"), image(size=20)[:, :, ::2, 1::2]
    same_bits(step(fused(row, "leanest"), x), step(fused(row, "balanced"), x))


@MEMORY
@pytest.mark.parametrize("name", ["bottlenecks", "basic", "pre-activation bottlenecks"])
@pytest.mark.parametrize("training", [False, True])
def test_nchw_and_constant_statistics(name, memory, training):
    row = make(name).to(memory_format=torch.contiguous_format).train(training)
    row[1].eval()
    balanced, lean = fused(row, "balanced"), fused(row, memory)
    x = image(size=70).contiguous()
    same_bits(step(lean, x), step(balanced, x))


@MEMORY
def test_against_eager_in_float64(memory):
    row = make("bottlenecks").double()
    ours, theirs = step(fused(row, memory), image(dtype=torch.float64)), step(row, image(dtype=torch.float64))
    for name, t in theirs.items():
        assert torch.allclose(ours[name].double(), t.double(), rtol=1e-8, atol=1e-10), name


# What is asked of gradients --------------------------------------------------------------------------------------


@MEMORY
@pytest.mark.parametrize("frozen", [("0.",), ("0.", "1."), ("2.",), ("0.bn1", "1.conv2", "2.conv3"), ("",)])
def test_what_wants_no_gradient_gets_none(frozen, memory):
    row = make("bottlenecks")
    for name, p in row.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    x, found = image(), []
    for model in (fused(row, "balanced"), fused(row, memory)):
        out = model(x)
        if out.requires_grad:
            out.sin().sum().backward()
        gradients = {f"d{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(gradients) == sum(p.requires_grad for p in row.parameters())
        found.append(gradients | dict(model.named_buffers()))
    same_bits(*found)


@MEMORY
def test_gradients_of_some_and_again(memory):
    row, x = make("bottlenecks"), image().requires_grad_()
    found = []
    for model in (fused(row, "balanced"), fused(row, memory)):
        out = model(x)
        wanted = [model[1].conv2.weight, model[2].bn3.bias]
        some = torch.autograd.grad(out.sum(), wanted, retain_graph=True)
        everything = torch.autograd.grad(out.sum(), [x, *model.parameters()], retain_graph=True)
        again = torch.autograd.grad(out.sum(), [x, *model.parameters()])
        found.append({str(i): t for i, t in enumerate((*some, *everything, *again))})
    same_bits(*found)


@pytest.mark.parametrize("name", ["bottlenecks", "pre-activation"])
def test_gradients_of_gradients(name):
    row, found = make(name).double(), []
    for model in (row, fused(row, "leanest")):
        x = image(dtype=torch.float64).requires_grad_()
        (dx,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.pow(2).sum(), [x, *model.parameters()], allow_unused=True))
    for ours, theirs in zip(found[1], found[0], strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_without_gradients_nothing_is_kept():
    lean, x = fused(make("bottlenecks"), "lean"), image()
    out = lean(x).nbytes
    with torch.no_grad():
        assert saved_bytes(lambda: lean(x), lean) == out
    lean.requires_grad_(False)
    assert saved_bytes(lambda: lean(x), lean) == out


# What splits a run -----------------------------------------------------------------------------------------------


def splits(model):
    return [(fqn, code) for fqn, code, _, _ in resfuse.report(model).splits]


@MEMORY
def test_a_hook_on_a_block_splits_the_run_until_it_goes(memory):
    row, x = make("bottlenecks"), image()
    balanced, lean = fused(row, "balanced"), fused(row, memory)
    seen = []
    handle = lean[1].register_forward_hook(lambda _, inputs, out: seen.append(out))
    same_bits(step(lean, x), step(balanced, x))
    assert len(seen) == 1 and seen[0].shape == (3, 32, 5, 5)
    assert splits(lean) == [("", "inner_hook")] and "cut a run" in str(resfuse.report(lean))
    handle.remove()
    same_bits(step(lean, x), step(balanced, x))
    assert len(seen) == 1 and resfuse.report(lean).splits[0][3] == 1


def test_backward_hooks_on_a_block_fire():
    lean, seen = fused(make("bottlenecks"), "lean"), []
    lean[1].register_full_backward_hook(lambda *_: seen.append(1))
    step(lean, image())
    assert seen == [1] and splits(lean) == [("", "inner_hook")]


def test_a_block_that_runs_its_original_splits_the_run():
    row, x, seen = make("bottlenecks"), image(), []
    balanced, lean = fused(row, "balanced"), fused(row, "lean")
    for model in (balanced, lean):
        model[1].conv2.register_forward_hook(lambda *_: seen.append(1))
    same_bits(step(lean, x), step(balanced, x))
    assert seen == [1, 1] and splits(lean) == [("", "inner_hook")]
    assert [code for _, code, _, _ in resfuse.report(lean).fallbacks] == ["inner_hook"]


def test_another_module_between_blocks():
    row = nn.Sequential(Bottleneck(16, 4), nn.Dropout(0.3), Bottleneck(16, 4), Bottleneck(16, 4))
    balanced, lean = fused(row, "balanced"), fused(row, "lean")
    x = image(channels=16)
    same_bits(step(lean, x), step(balanced, x))
    assert splits(lean) == [("", "not_a_block")]


def test_blocks_with_modules_of_their_own_split_a_run():
    resnet, layers = pytest.importorskip("timm.models.resnet"), pytest.importorskip("timm.layers")
    row = nn.Sequential(resnet.Bottleneck(16, 4), resnet.Bottleneck(16, 4, attn_layer=layers.SEModule))
    lean = fused(row, "lean")
    same_bits(step(lean, image(channels=16)), step(fused(row, "balanced"), image(channels=16)))
    assert splits(lean) == [("", "called")]
    gated = fused(nn.Sequential(modules.ResidualBlock(8, 8, gated=True), modules.ResidualBlock(8, 8)), "lean")
    step(gated, image())
    assert splits(gated) == [("", "gate")]


def test_a_block_on_its_own_and_one_that_comes_twice():
    block = Bottleneck(16, 4)
    row = nn.Sequential(block, Bottleneck(16, 4), block)
    x = image(channels=16)
    balanced, lean = fused(row, "balanced"), fused(row, "leanest")
    same_bits(step(lean, x), step(balanced, x))
    assert int(lean[0].bn1.num_batches_tracked) == 2
    same_bits(step(lean[1], x), step(balanced[1], x))


def test_a_projection_begins_a_run(monkeypatch):
    row = nn.Sequential(*bottlenecks(), Bottleneck(32, 16, 2, projection(32, 64, 2)), Bottleneck(64, 16))
    lean, x = fused(row, "lean"), image(size=20)
    same_bits(step(lean, x), step(fused(row, "balanced"), x))
    lengths = []
    monkeypatch.setattr(functional, "run", lambda x, blocks, **k: lengths.append(len(blocks)) or run(x, blocks, **k))
    lean(x)
    assert lengths == [3, 2]


@pytest.mark.parametrize("every, outputs", [(1, 5), (2, 2), (3, 1), (6, 0)])
def test_an_output_kept_every_so_many(every, outputs):
    row, x = bottlenecks(blocks=6), image(32, 40)
    balanced, lean = fused(row, "balanced"), fused(row, "lean")
    lean.resfuse_state.every = every
    kept = saved_bytes(lambda: lean(x), lean)
    lean.resfuse_state.every = 6
    out = balanced(x).nbytes
    masks = out / 32
    assert kept - saved_bytes(lambda: lean(x), lean) == outputs * (out + masks)
    lean.resfuse_state.every = every
    fresh = fused(row, "lean")
    fresh.resfuse_state.every = every
    same_bits(step(fresh, x), step(fused(row, "balanced"), x))


# Conversion ------------------------------------------------------------------------------------------------------


def test_fuse_and_unfuse():
    row = make("bottlenecks")
    classes, keys = [type(m) for m in row.modules()], list(row.state_dict())
    model = resfuse.fuse(row, config=resfuse.FuseConfig(memory="lean"))
    assert model is row and is_run(row) and isinstance(row, nn.Sequential) and list(row.state_dict()) == keys
    assert resfuse.report(row).runs == [("", "3 blocks, lean")] and len(resfuse.report(row).fused) == 3
    resfuse.fuse(row, config=resfuse.FuseConfig(memory="leanest"))
    assert resfuse.report(row).runs == [("", "3 blocks, leanest")]
    resfuse.fuse(row)
    assert type(row) is nn.Sequential and resfuse.report(row).runs == []
    resfuse.fuse(row, config=resfuse.FuseConfig(memory="lean"))
    resfuse.unfuse(row)
    assert [type(m) for m in row.modules()] == classes
    assert not any("_resfuse_state" in m.__dict__ for m in row.modules())


def test_a_model_without_a_row_is_told():
    with pytest.warns(UserWarning, match="memory='lean' changes nothing"):
        fused(nn.ModuleList([Bottleneck(16, 4)]), "lean")


def test_slices_and_additions():
    """A Sequential makes others of its class."""
    lean, x = fused(make("bottlenecks"), "lean"), image()
    expected = lean[1](lean[0](x))
    assert torch.equal(lean[:2](x), expected)


def fail_at_the_sixth_convolution(monkeypatch):
    """Of the eager set's, for want of memory."""
    k, count = dispatch.kernels("eager", "cpu", torch.float32), []
    working = k.conv_stats

    def conv_stats(*args, **kwargs):
        count.append(1)
        if len(count) == 6:
            raise torch.OutOfMemoryError("played")
        return working(*args, **kwargs)

    monkeypatch.setattr(k, "conv_stats", conv_stats)


def test_a_run_that_fails_has_changed_nothing(monkeypatch):
    lean, x = fused(make("bottlenecks"), "lean", "eager"), image()
    before = copy.deepcopy(lean.state_dict())
    fail_at_the_sixth_convolution(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        lean(x)
    same_bits(lean.state_dict(), before)


def test_what_does_not_fit_is_named_before_anything_runs():
    a, b = (resfuse.blocks.resnet.as_block(Bottleneck(c, 4), None) for c in (16, 20))
    with pytest.raises(ArgumentError, match=r"conv1.weight .* does not fit an input of 16 channels"):
        run(image(channels=16), [a, b._replace(convs=b.convs[:2] + a.convs[2:])])
    with pytest.raises(ArgumentError, match="at least one"):
        run(image(), [])
    assert isinstance(a, Block) and int(a.convs[0].num_batches_tracked) == 0


# Stems and networks ----------------------------------------------------------------------------------------------


def stem(bias=False):
    torch.manual_seed(0)
    block = modules.Stem(8, 16).to(memory_format=torch.channels_last)
    if bias:
        block.conv.bias = nn.Parameter(torch.randn(16))
    return block


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", MODES)
@BACKENDS
def test_a_stem_convolves_again_to_the_bit(mode, bias, backend):
    dtype, autocast = MODES[mode]
    block, x = stem(bias).to(dtype), image(2, 23, dtype)
    block.bn.float()
    balanced, lean = fused(block, "balanced", backend), fused(block, "leanest", backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = [saved_bytes(lambda m=m: m(x), m, [x]) for m in map(copy.deepcopy, (balanced, lean))]
    assert kept[1] < 0.5 * kept[0]
    same_bits(step(lean, x, autocast), step(balanced, x, autocast))


def test_a_stem_in_its_other_settings():
    for change in (lambda b: b.eval(), lambda b: b.conv.requires_grad_(False), lambda b: b.bn.requires_grad_(False),
                   lambda b: b.conv.register_forward_hook(lambda *_: None)):  # fmt: skip
        block = stem()
        change(block)
        same_bits(step(fused(block, "leanest"), image()), step(fused(block, "balanced"), image()))
    block, found = stem(bias=True).double(), []
    for model in (block, fused(block, "leanest")):
        x = image(dtype=torch.float64).requires_grad_()
        (dx,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.pow(2).sum(), [x, model.conv.weight, model.bn.weight]))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(*found, strict=True))


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
LIMITS = {("lean", FLOAT32): 0.31, ("lean", BFLOAT16): 0.29, ("leanest", FLOAT32): 0.17, ("leanest", BFLOAT16): 0.165}
QUICK = (("lean", FLOAT32), ("leanest", FLOAT32))


@pytest.mark.parametrize(
    "memory, dtype",
    [pytest.param(*key, marks=() if key in QUICK else pytest.mark.slow) for key in LIMITS], ids=str,
)  # fmt: skip
def test_what_a_resnet50_keeps(memory, dtype):
    eager = torchvision.models.resnet50().to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == BFLOAT16):
        ours, theirs = (saved_bytes(lambda m=m: m(x), m) for m in (fused(eager, memory), eager))
    assert ours <= LIMITS[memory, dtype] * theirs


@MEMORY
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_networks_step_to_the_bit(name, memory):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=5).to(memory_format=torch.channels_last)
    x = image(2, 40, channels=3)
    same_bits(step(fused(model, memory), x), step(fused(model, "balanced"), x))
