"""Unusual and bad inputs: eager's result, or an error that names the argument."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck
from units import activation, bottleneck, results, twin

import resfuse
from resfuse import functional, reference
from resfuse.functional import ArgumentError

STORAGE = {torch.float32: 1e-4, torch.float64: 1e-9}


def both(x_of, convs=None, dtype=torch.float64):
    """Outputs and gradients of the fused and the reference block on x_of(leaf)."""
    convs = convs or bottleneck(dtype=dtype)
    found = []
    for block, run in ((convs, functional.bottleneck), (twin(convs), reference.bottleneck)):
        leaf = activation(4, 8, 6, 6, dtype=dtype).requires_grad_()
        out = run(x_of(leaf), *block)
        torch.manual_seed(3)
        found.append(results(out, torch.randn_like(out), leaf, block))
    return found


VIEWS = {
    "sliced": lambda t: t[1:3, :, ::2, 1:],
    "transposed": lambda t: t.transpose(2, 3),
    "flipped": lambda t: t.flip(3),
    "expanded": lambda t: t[:1].expand(3, -1, -1, -1),
    "contiguous": lambda t: t.contiguous(),
    "one pixel": lambda t: t[:, :, :1, :1],
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view):
    ours, theirs = both(VIEWS[view])
    for name, value in theirs.items():
        assert torch.allclose(ours[name].double(), value.double(), rtol=1e-8, atol=1e-9), name


DOUTS = {
    "expanded": lambda: torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64).expand(4, 8, 6, 6),
    "contiguous": lambda: activation(4, 8, 6, 6, seed=5, channels_last=False),
    "flipped": lambda: activation(4, 8, 6, 6, seed=5).flip(0),
}


@pytest.mark.parametrize("dout", DOUTS)
def test_strides_of_the_incoming_gradient(dout):
    convs, grads = bottleneck(), []
    for block, run in ((convs, functional.bottleneck), (twin(convs), reference.bottleneck)):
        x = activation(4, 8, 6, 6).requires_grad_()
        run(x, *block).backward(DOUTS[dout]())
        grads.append(x.grad)
    assert torch.allclose(*grads, rtol=1e-8)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
def test_nan_and_inf_reach_what_they_reach_in_eager(value, dtype, training):
    def spoil(leaf):
        place = tuple(torch.tensor(i) for i in (1, 2, 3, 3))
        return leaf + torch.zeros_like(leaf).index_put(place, torch.tensor(value, dtype=dtype))

    ours, theirs = both(spoil, bottleneck(training=training, dtype=dtype), dtype)
    for name, expected in theirs.items():
        finite = expected.isfinite()
        if name == "out" or not training:
            assert torch.equal(ours[name].isfinite(), finite), name
        # In training one bad value spoils its channels' statistics: nothing that eager loses may look sound.
        assert not ours[name].isfinite()[~finite].any(), name
        close = torch.allclose(ours[name][finite].double(), expected[finite].double(), rtol=1e-3, atol=1e-3)
        assert close or not ours[name][finite].isfinite().all(), name


def test_nan_in_out_passes_gradient_and_inf_is_masked():
    """torch's rule: the gradient passes where `not (out <= 0)`, and a masked-out inf is 0."""
    convs = bottleneck(training=False)
    x = activation(4, 8, 6, 6).requires_grad_()
    out = functional.bottleneck(x, *convs)
    dout = torch.where(out > 0, torch.ones_like(out), torch.full_like(out, float("inf")))
    out.backward(dout)
    assert x.grad.isfinite().all()


REFUSED = {
    "rank": (lambda x, c: (x[0], c), "x must have 4 dimensions"),
    "dtype of x": (lambda x, c: (x.to(torch.int64), c), "x must be float64"),
    "empty batch": (lambda x, c: (x[:0], c), "x must not be empty"),
    "no pixels": (lambda x, c: (x[:, :, :0], c), "x must not be empty"),
    "channels": (lambda x, c: (x[:, :7], c), "conv1.weight"),
    "weight dtype": (lambda x, c: (x.float(), c), "conv1.weight is torch.float64"),
    "gamma dtype": (lambda x, c: (x, [c[0], c[1]._replace(gamma=c[1].gamma.half()), c[2]]), "conv2.gamma is torch.flo"),
    "gamma size": (lambda x, c: (x, [c[0], c[1]._replace(gamma=c[1].gamma[:3]), c[2]]), "conv2.gamma must be"),
    "weight rank": (lambda x, c: (x, [c[0], c[1]._replace(weight=c[1].weight[0]), c[2]]), "conv2.weight must be"),
    "residual shape": (lambda x, c: (x, [c[0], c[1]._replace(stride=(2, 2)), c[2]]), "conv3's output"),
    "no output": (lambda x, c: (x, [c[0], c[1]._replace(padding=(0, 0), dilation=(9, 9)), c[2]]), "conv2: an input"),
    "half the buffers": (lambda x, c: (x, [c[0]._replace(running_var=None), *c[1:]]), "conv1: running_mean"),
    "device": (lambda x, c: (x.to("meta"), c), "x must be on cpu or cuda"),
    "device mix": (lambda x, c: (x, [c[0], c[1]._replace(beta=c[1].beta.to("meta")), c[2]]), "conv2.beta is on meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_name_the_argument_and_change_nothing(case):
    change, message = REFUSED[case]
    x, convs = change(activation(2, 8, 4, 4), list(bottleneck()))
    tracked = [int(c.num_batches_tracked) for c in convs]
    with pytest.raises(ArgumentError, match=message.replace("(", "\\(")):
        functional.bottleneck(x, *convs)
    assert tracked == [int(c.num_batches_tracked) for c in convs]


def test_what_fits_under_autocast_alone_is_refused_without():
    """Though a call of the same tensors has been found to fit."""
    x, convs = activation(2, 8, 4, 4, dtype=torch.bfloat16), bottleneck(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        functional.bottleneck(x, *convs)
    with pytest.raises(ArgumentError, match="conv1.weight is torch.float32"):
        functional.bottleneck(x, *convs)


def test_autocast_takes_no_float64():
    """As eager: autocast leaves float64 alone, so it does not mix."""
    convs = [c._replace(weight=c.weight.detach().double()) for c in bottleneck(dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ArgumentError, match="conv1.weight is torch.float64"):
        functional.bottleneck(activation(2, 8, 4, 4, dtype=torch.float32), *convs)


def test_x_that_is_no_tensor():
    for x, message in ((1.0, "x must be a torch.Tensor, got float"), ([1.0], r"x\[0\] must be"), ([], "an empty one")):
        with pytest.raises(TypeError, match=message):
            functional.bottleneck(x, *bottleneck())


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend='fast'"):
        functional.bottleneck(activation(2, 8, 4, 4), *bottleneck(), backend="fast")


MODULE_INPUTS = {
    "empty batch": (lambda x: x[:0], "input_shape"),
    "rank 3": (lambda x: x[0], "input_shape"),
    "channels": (lambda x: x[:, :9], "argument"),
    "dtype": (lambda x: x.double(), "argument"),
    "integers": (lambda x: x.long(), "dtype"),
    "meta": (lambda x: x.to("meta"), "device"),
}


@pytest.mark.parametrize("case", MODULE_INPUTS)
def test_a_fused_module_does_what_eager_does(case):
    """An input that the fused path does not take gives eager's result or eager's error."""
    torch.manual_seed(0)
    change, code = MODULE_INPUTS[case]
    block, x = Bottleneck(16, 4), change(torch.randn(2, 16, 4, 4))
    fused = resfuse.fuse(nn.Sequential(Bottleneck(16, 4)))
    fused[0].load_state_dict(block.state_dict())
    outcomes = []
    for module in (block, fused):
        try:
            outcomes.append(module(x))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    ours, theirs = outcomes[1], outcomes[0]
    assert type(ours) is type(theirs)
    assert ours == theirs if isinstance(theirs, tuple) else ours.shape == theirs.shape
    assert list(fused[0].resfuse_state.fallbacks) == [code]
