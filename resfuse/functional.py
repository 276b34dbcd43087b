"""Stateless entry points: the documented contract of each fused block.

Each takes tensors and settings, validates all of them before anything runs, and updates running statistics in place
after its forward has succeeded, as `torch.nn.functional.batch_norm` does.

Common to all of them
    Activations are [N, C, H, W], float64, float32, bfloat16 or float16, of any strides. Under autocast blocks with
    convolutions cast them to autocast's dtype, and weights always to the activations'. BatchNorm parameters and buffers
    are float32 or of x's dtype (float64 for float64). Results have x's (or autocast's) dtype and are channels_last if
    x or a weight of the main branch is, else contiguous. Everything is differentiable in activations, weights, biases,
    gammas and betas, to any order (gradients of gradients are not fused). backend: "auto" or a kernel set's name.

    ArgumentError, a ValueError and TypeError, names the argument that does not fit; torch's ValueError says that there
    is one value per channel in training; `kernels.interface.Unsupported` that a named backend cannot run the call. A
    call that raises has changed no running statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments, calls, lean
from .arguments import BN, Activation, ArgumentError, Block, Conv, ConvBN, Pooled, ZeroPad
from .calls import Form, forms
from .functions import branches
from .kernels.interface import Stats, Window

__all__ = [
    "BN", "Activation", "ArgumentError", "Block", "Conv", "ConvBN", "Form", "Pooled", "Stats", "Window", "ZeroPad",
    "basic_block", "bn_relu", "bottleneck", "conv_bn_add_relu", "conv_bn_relu", "forms", "image_conv", "preactivation",
    "run", "stem",
]

AnyShortcut = ConvBN | Conv | Pooled | ZeroPad | Tensor | None


def bottleneck(
    x: Tensor, conv1: ConvBN, conv2: ConvBN, conv3: ConvBN, shortcut: AnyShortcut = None, *, backend: str = "auto"
) -> Tensor:
    """`relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))`; shortcut as in `conv_bn_add_relu`."""
    return conv_bn_add_relu(x, conv1, conv2, conv3, shortcut=shortcut, backend=backend)


def basic_block(
    x: Tensor, conv1: ConvBN, conv2: ConvBN, shortcut: AnyShortcut = None, *, backend: str = "auto"
) -> Tensor:
    """`relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`; shortcut as in `conv_bn_add_relu`."""
    return conv_bn_add_relu(x, conv1, conv2, shortcut=shortcut, backend=backend)


def conv_bn_relu(x: Tensor | Sequence[Tensor], *convs: ConvBN, relu: bool = True, backend: str = "auto") -> Tensor:
    """Convolutions in a row, each with its BatchNorm and activation; relu False leaves the last activation out.

    x: a tensor, or several side by side, whose concatenation is not kept. Between the convolutions nothing but their
    raw outputs is.
    """
    return _block(_parts(x), None, convs, branches.NOTHING, relu=relu, backend=backend)


def conv_bn_add_relu(
    x: Tensor,
    *convs: ConvBN,
    shortcut: AnyShortcut = None,
    relu: bool = True,
    scale: float = 1.0,
    row_scale: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A residual block: `act(scale * (row_scale * main + shortcut))`, main being `conv_bn_relu(x, *convs, relu=False)`.

    shortcut: None, x itself; a ConvBN or Conv of x; `Pooled`, one of x's averages; `ZeroPad`, x between channels of
    zeros; a tensor, added as it is. scale > 0 weighs the sum, row_scale [N] (no gradient) the main branch of each
    sample (stochastic depth). gate, broadcastable to the output: `act(scale * (gate * main + (1 - gate) * shortcut))`
    (highway). relu False: no activation after the sum.
    """
    return _block(
        _parts(x), None, convs, shortcut, relu=relu, scale=scale, row_scale=row_scale, gate=gate, backend=backend
    )


def preactivation(
    x: Tensor | Sequence[Tensor],
    bn: BN,
    *convs: ConvBN | Conv,
    shortcut: AnyShortcut | str = "none",
    scale: float = 1.0,
    row_scale: Tensor | None = None,
    gate: Tensor | None = None,
    stats: Stats | None = None,
    want_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Stats]:
    """BN-ReLU-convolution: `first = relu(bn(x))`, then convs from there, the last one a Conv, the others ConvBNs.

    shortcut "none": the convolutions' output alone, as in a dense layer, whose x are several tensors side by side: of
    these neither the concatenation nor its BatchNorm is kept. Otherwise a pre-activation block, `scale * (row_scale *
    main + shortcut)` without activation; shortcut and the weights of the sum as in `conv_bn_add_relu`, but that a
    convolution (`Pooled` or not) reads `first`.

    stats: the batch statistics of x, where the block that wrote x returned them; they are not taken again then.
    want_stats: return (out, Stats of out) for the block after.
    """
    if shortcut == "none":
        shortcut = branches.NOTHING
    found = _block(
        _parts(x), bn, convs, shortcut, relu=False, scale=scale, row_scale=row_scale, gate=gate, stats=stats,
        want_stats=want_stats, backend=backend,
    )
    return (found[0], Stats(*found[1:])) if want_stats else found


def run(
    x: Tensor, blocks: Sequence[Block], *, leanest: bool = False, stats: Stats | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, Stats]:
    """Residual blocks in a row, to the bit what they are one by one; backward makes the outputs between them again.

    Of each block its convolutions' raw outputs are kept, but for those of wide 1x1s that a block makes again by itself;
    leanest: no wide 1x1's, and neither the first convolution's, if that is a 1x1. stats: of x, as in `preactivation`;
    (out, Stats of out) where the last block's want_stats asks.

    While torch.compile makes a graph or a dispatch mode watches, the blocks run one by one and keep what they keep so.
    """
    if _watched():
        found = x
        for b in blocks:
            weights = dict(relu=b.relu, scale=b.scale, row_scale=b.row_scale, want_stats=b.want_stats)
            found = _block(_parts(x), b.bn, b.convs, b.shortcut, **weights, stats=stats, backend=backend)
            x, stats = (found[0], Stats(*found[1:])) if b.want_stats else (found, None)
    else:
        found = lean.run(x, blocks, stats, leanest=leanest, backend=backend)
    return found if isinstance(found, Tensor) else (found[0], Stats(*found[1:]))


def bn_relu(
    x: Tensor, bn: BN, pool: Window | None = None, *, stats: Stats | None = None, backend: str = "auto"
) -> Tensor:
    """`relu(bn(x))`, or its max pool: the stem of a ResNet after its convolution, and the end of a pre-activation one.

    x is kept and, of a pool, one byte per output. Of a window at most 255 values. stats as in `preactivation`. Not
    cast under autocast, as torch's BatchNorm is not.
    """
    if torch.compiler.is_dynamo_compiling():
        from . import graph

        return graph.bn_relu(graph.autocast(x), x, bn, pool, stats, backend=backend)
    return calls.bn_relu(x, bn, pool, stats, backend=backend)


def image_conv(
    x: Tensor, conv: Conv, stats: bool, *, backend: str = "auto"
) -> tuple[Tensor, Stats | None] | None:
    """`conv(x)` of an image's few channels, and with `stats` the batch statistics of it for `bn_relu`, where the kernel
    set has kernels of its own for it; else None, and nothing was done."""
    if torch.compiler.is_dynamo_compiling():
        return None
    arguments.check_plain(x, "x")
    return calls.image_conv(x, conv, stats, backend=backend)


def stem(x: Tensor, conv: Conv, bn: BN, pool: Window | None = None, *, backend: str = "auto") -> Tensor:
    """`bn_relu(conv(x), bn, pool)`, to the bit: x is kept, and backward convolves it again by torch's convolution.

    Under autocast the convolution is cast as torch's is. In a graph, and while a dispatch mode watches, the
    convolution's output is kept.
    """
    wanted = calls.differentiable([x, conv.weight, conv.bias, bn.gamma, bn.beta])
    if wanted and not _watched():
        return lean.stem(x, conv, bn, pool, backend=backend)
    return bn_relu(torch.conv2d(x, conv.weight, conv.bias, *conv.geometry), bn, pool, backend=backend)


def _watched() -> bool:
    """Whether calls must be those of single blocks, which are known to graphs and to modes as operators."""
    return torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _block(parts: list[Tensor], bn: BN | None, convs: Sequence[ConvBN | Conv], shortcut: AnyShortcut | str, **options):
    if torch.compiler.is_dynamo_compiling():
        from . import graph  # registers what a graph may hold; of no use elsewhere

        return graph.block(graph.autocast(parts[0]), parts, bn, convs, shortcut, **options)
    return calls.block(parts, bn, convs, shortcut, **options)


def _parts(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(x, (list, tuple)):
        arguments.check_plain(x, "x")
        return [x]
    if not x:
        raise ArgumentError("x must be a tensor or a sequence of at least one, got an empty one")
    for i, part in enumerate(x):
        arguments.check_plain(part, f"x[{i}]")
    return list(x)
