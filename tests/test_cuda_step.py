"""Steps of a small network by the CUDA set alone, each of its kernels emulated or on a GPU, where Triton cannot be
imported."""

import subprocess
import sys

import pytest
from units import CUDA, EMULATED

STEPS = """
import copy
import sys
from contextlib import contextmanager, nullcontext

sys.modules["triton"] = None  # from here on importing it raises

import torch
from timm.models import resnet
from torch import nn
from torchvision.ops import Conv2dNormActivation

import resfuse
from resfuse.kernels import cuda, dispatch
from resfuse.kernels.interface import PRIMITIVES
from resfuse.testing.cuda import emulated
from resfuse.testing.tolerances import relative_error

dtype, device = getattr(torch, sys.argv[1]), sys.argv[2]  # of activations
torch.manual_seed(0)
torch.backends.cudnn.allow_tf32 = False


class Network(nn.Module):
    "A stem with its pool, bottlenecks with and without a shortcut, an average before its 1x1, convolutions with SiLU."

    def __init__(self):
        super().__init__()
        self.trunk = resnet.ResNet(resnet.Bottleneck, (2, 1, 1, 1), 0, 3, avg_down=True, channels=(8, 8, 16, 16))
        made = ((64, 24, 1), (24, 16, 3))
        self.tail = nn.Sequential(*(Conv2dNormActivation(*each, activation_layer=nn.SiLU) for each in made))

    def forward(self, x):
        return self.tail(self.trunk.forward_features(x)).mean((2, 3))


def steps(model, x):
    "Outputs, gradients and buffers of a training step, and the output of an evaluation."
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype != x.dtype == torch.float32)
    with autocast:
        out = model.train()(x)
    (out * torch.arange(16, device=device) / 16).sum().backward()
    named = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    with torch.no_grad(), autocast:
        return {"out": out, "evaluation": model.eval()(x), **named}


called = set()


@contextmanager
def within(primitive, operands):
    called.add(primitive)
    yield lambda result: None


eager = Network().to(device, memory_format=torch.channels_last)
fused, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
x = torch.randn(2, 3, 64, 64).to(device, memory_format=torch.channels_last)
with emulated() if device == "cpu" else nullcontext(), dispatch.watched(within):
    resfuse.fuse(fused, config=resfuse.FuseConfig(backend="cuda"))
    assert set(dispatch.kernels("cuda", device, dtype).chosen.values()) == {"cuda"}
    found = steps(fused, x)
assert set(cuda.PRIMITIVES) == set(PRIMITIVES)
print("not called:", *sorted(set(PRIMITIVES) - called))
assert not resfuse.report(fused).fallbacks, resfuse.report(fused)
reference, theirs = steps(exact, x.double()), steps(eager, x)
for name, exactly in reference.items():
    if name.endswith("num_batches_tracked"):
        assert found[name] == exactly == 1, name
        continue
    mine, eagers = (relative_error(each[name], exactly) for each in (found, theirs))
    assert mine <= 2 * eagers + 4 * torch.finfo(dtype).eps, (name, mine, eagers)
assert not any(name.startswith("triton") for name in sys.modules if sys.modules[name] is not None)
"""


GPU = [CUDA, pytest.mark.gpu]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=EMULATED), pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_steps_without_triton(dtype, device):
    done = subprocess.run([sys.executable, "-c", STEPS, dtype, device], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    # What bn_backward and conv_backward call themselves.
    assert done.stdout.splitlines() == ["not called: bn_reduce select"]
